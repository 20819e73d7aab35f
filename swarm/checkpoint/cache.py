"""The directory where checkpoints' by-products are kept: converted models and the SHA-256 of big files.

    SWARM_CACHE, else XDG_CACHE_HOME/swarm, else ~/.cache/swarm
        embedded/   converted models        (swarm.checkpoint.embedded)
        hub/        which commit a name was (swarm.checkpoint.hub)
        sha256/     one small JSON file per hashed file: its size, times and digest

Knows nothing of models. Several processes may use one directory at once: files appear by rename, long work is done
under a lock that the kernel releases when its holder dies.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm.errors import ConfigError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_REMEMBER_BYTES = 4 << 20
"""Smaller files are hashed in less time than it is worth remembering."""
_SHOW_PROGRESS_BYTES = 1 << 30
"""Hashing less than this takes a second or two, and needs no progress bar."""


def default_cache_dir() -> Path:
    """Where by-products are kept unless the caller says otherwise."""
    if chosen := os.environ.get("SWARM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "swarm"


def file_sha256(path: Path, *, cache_dir: Path) -> str:
    """SHA-256 of a file's content, in hex.

    It is computed once: the answer is remembered with the file's path, size, inode and times, so that a file that
    was touched, replaced or edited is read again.
    """
    if path.stat().st_size < _REMEMBER_BYTES:
        return _hash(path)
    note = _note_path(path, cache_dir)
    stamp = _stamp(path)
    if known := _read_note(note, stamp):
        return known
    digest = _hash(path)
    if _stamp(path) == stamp:  # else it changed while we read
        try:
            write_atomically(note, json.dumps({**stamp, "sha256": digest}).encode())
        except ConfigError as error:
            logger.warning("%s; every start will hash %s again", error, path)
    return digest


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old one or the whole new one.

    Raises:
        ConfigError: the directory can't be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"can't write to the cache directory {path.parent}: {error} (set SWARM_CACHE)") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for other processes that do.

    Raises:
        ConfigError: the directory can't be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigError(f"can't write to the cache directory {path.parent}: {error} (set SWARM_CACHE)") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _note_path(path: Path, cache_dir: Path) -> Path:
    return cache_dir / "sha256" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _stamp(path: Path) -> dict[str, int | str]:
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read_note(note: Path, stamp: dict[str, int | str]) -> str | None:
    try:
        known = json.loads(note.read_bytes())
        digest = known.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest if known == stamp and isinstance(digest, str) and len(digest) == 64 else None


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size < _SHOW_PROGRESS_BYTES:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    from tqdm import tqdm

    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {path.name}") as bar:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
