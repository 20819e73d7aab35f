"""API keys: files of hashes, and which account a key belongs to.

    python -m swarm.api.keys FILE NAME ─► a new key on stdout, once; "NAME SHA256" added to FILE
    "Bearer sk-swarm-..." ─Keys.account─► NAME | None

A key has 256 random bits, so a plain SHA-256 of it can't be guessed back; nothing slower is needed. Files are read
again when they change: a line that is deleted locks its key out with the next request.
"""

import argparse
import hashlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from swarm.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "sk-swarm-"
MAX_KEY_CHARS = 256
_NAME = re.compile(r"[A-Za-z0-9][\w.@\-]{0,63}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")


class Keys:
    """The keys of some files.

    Args:
        paths: files with a "NAME SHA256" per line; empty lines and those with # are comments.

    Raises:
        ConfigError: a file can't be read or a line is malformed.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = tuple(Path(path).expanduser() for path in paths)
        self._stamps: tuple[int, ...] = ()
        self._accounts: dict[str, str] = {}
        self._read(is_first=True)

    def account(self, key: str) -> str | None:
        """Whose key this is; None for a key that nobody has."""
        self._refresh()
        return self._accounts.get(fingerprint(key)) if len(key) <= MAX_KEY_CHARS else None

    def _refresh(self) -> None:
        """Read the files again if they changed; one that is broken just now leaves everything as it was."""
        try:
            if self._stamps != self._look():
                self._read()
        except (ConfigError, OSError) as error:
            logger.warning("keeping the API keys as they were: %s", error)

    def _look(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in self._paths)

    def _read(self, *, is_first: bool = False) -> None:
        accounts: dict[str, str] = {}
        try:
            stamps = self._look()
            for path in self._paths:
                if is_first or path.exists():  # one that was deleted since locks all of its keys out
                    accounts |= _parse(path, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"API keys: {error}") from error
        self._stamps, self._accounts = stamps, accounts


def fingerprint(key: str) -> str:
    """What a file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def add_key(path: str | Path, name: str) -> str:
    """Make a new key for `name` and add its hash to the file, which is created (mode 0600) when missing.

    Raises:
        ConfigError: the name can't be one, or the file can't be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} can't be an account: use up to 64 letters, digits and . _ - @")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        descriptor = os.open(Path(path).expanduser(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{name} {fingerprint(key)}\n")
    except OSError as error:
        raise ConfigError(f"API keys: {error}") from error
    return key


def main(argv: Sequence[str] | None = None) -> int:
    """Print a new key."""
    parser = argparse.ArgumentParser(
        prog="python -m swarm.api.keys",
        description="Make an API key: it is printed once, and the file keeps its hash.",
    )
    parser.add_argument("file", help="file of keys, created when missing; give it to swarm.api as --api-keys")
    parser.add_argument("name", help="account of the key; several keys may have one account")
    args = parser.parse_args(argv)
    try:
        print(add_key(args.file, args.name))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(path: Path, text: str) -> dict[str, str]:
    accounts = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or not _HASH.fullmatch(words[1]):
            raise ConfigError(f"{path}, line {number}: expected a name and a SHA-256 in hex")
        accounts[words[1]] = words[0]
    return accounts


if __name__ == "__main__":
    sys.exit(main())
