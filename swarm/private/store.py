"""The revocations that a peer has heard of, kept on disk, so that a swarm that was off does not forget them.

    $SWARM_CACHE/revocations/AUTHORITY.bin ──load──► statements, believed no further than those of any peer ◄──save──

They are signed, so nobody gains by changing the file; who deletes it makes this peer forget until others tell it again.
"""

import logging
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from swarm.checkpoint.cache import default_cache_dir
from swarm.errors import SwarmError
from swarm.private.revocations import Revocation, decode_revocations, encode_revocations

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 8 << 20


class RevocationStore:
    """One file.

    Args:
        directory: where; None for the cache directory.
        authority: certificate of the swarm's authority, in DER: each swarm has a file of its own.
    """

    def __init__(self, directory: Path | None, authority: bytes) -> None:
        self._directory = directory
        self._name = f"{blake2b(authority, digest_size=16).hexdigest()}.bin"

    def load(self) -> tuple[Revocation, ...]:
        """What was saved; nothing where that can't be read."""
        try:
            with self._path.open("rb") as file:
                return decode_revocations(file.read(MAX_FILE_BYTES))
        except FileNotFoundError:
            return ()
        except (OSError, SwarmError) as error:
            logger.warning("can't read the revocations that were known: %s", error)
            return ()

    def save(self, statements: Iterable[Revocation]) -> None:
        """Keep these; where that fails, they are known for as long as this process lives."""
        try:
            path = self._path
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.new")
            temporary.write_bytes(encode_revocations(statements))
            temporary.replace(path)
        except (OSError, SwarmError) as error:
            logger.warning("can't keep revocations over a restart: %s", error)

    @property
    def _path(self) -> Path:
        return (self._directory or default_cache_dir()) / "revocations" / self._name
