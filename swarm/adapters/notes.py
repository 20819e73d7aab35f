"""What a server says in its record about the adapters that it has: a few bytes each, and no more than MAX_NOTES.

    digest, rank, on the device? ─► AdapterNote ─► 5 bytes: digest's first 4, flag | rank / 8

Four bytes are enough to be right but once in 10^8 times, and a wrong guess costs a question. Nobody learns the digest
from them, which is what one needs to ask for an adapter. They say what is there, not what is in use.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from swarm.errors import InvalidRequest

MAX_NOTES = 32
"""In one record: the most recently used ones."""
_RANK_STEP = 8
_ON_DEVICE = 0x80
_note = struct.Struct("!4sB")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterNote:
    """One adapter that a server has, all that it needs of it for its blocks."""

    short: bytes
    """First 4 bytes of its digest."""
    max_rank: int
    """Rounded up to a multiple of 8, at most 1016; 0 for one without rank matrices."""
    on_device: bool

    @classmethod
    def of(cls, digest: str, max_rank: int, *, on_device: bool) -> "AdapterNote":
        """About the adapter of this digest."""
        steps = min(-(-max_rank // _RANK_STEP), _ON_DEVICE - 1)
        return cls(short=bytes.fromhex(digest[:8]), max_rank=steps * _RANK_STEP, on_device=on_device)

    def is_about(self, digest: str) -> bool:
        """Whether it speaks of this adapter, in all likelihood."""
        return self.short.hex() == digest[:8]


def pack_notes(notes: Iterable[AdapterNote]) -> bytes:
    """A byte with their number, then 5 bytes each; those beyond MAX_NOTES are left out."""
    packed = [_note.pack(it.short, it.max_rank // _RANK_STEP | _ON_DEVICE * it.on_device) for it in notes][:MAX_NOTES]
    return bytes([len(packed)]) + b"".join(packed)


def unpack_notes(data: bytes) -> tuple[AdapterNote, ...]:
    """Read what `pack_notes` gave.

    Raises:
        InvalidRequest: it is anything else.
    """
    if not data or data[0] > MAX_NOTES or len(data) != 1 + data[0] * _note.size:
        raise InvalidRequest(f"{len(data)} bytes of notes on adapters")
    return tuple(
        AdapterNote(short=short, max_rank=(level & ~_ON_DEVICE) * _RANK_STEP, on_device=level >= _ON_DEVICE)
        for short, level in _note.iter_unpack(data[1:])
    )
