"""What a fuzz target is, and how several messages are one input."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from swarm.errors import SwarmError

MSGPACK = (msgspec.MsgspecError, UnicodeDecodeError)
"""What msgspec raises of strangers' bytes, where the caller looks for it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader of hostile bytes."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    expected: tuple[type[BaseException], ...] = (SwarmError,)


def pieces(data: bytes) -> list[bytes]:
    """Pieces behind their length in 2 bytes; the last one may be short."""
    found = []
    while len(data) > 2:
        size = int.from_bytes(data[:2], "big")
        found.append(data[2 : 2 + size])
        data = data[2 + size :]
    return found


def framed(parts: Iterable[bytes]) -> bytes:
    """The input of which `pieces` makes these parts."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)
