"""Pages on the move: copies within the cache, sessions that lie in host memory for a while, adapters that come and go.

    scheduler ─► CopyPage | SwapOut | SwapIn, in order ─► executor: carry_out ─► span.copy/read/write_pages
                                                                      Swapped.content: the bytes in between
              ─► Attach | Detach ────────────────────────────────────────────► span.attach/detach

The scheduler decides and counts, `carry_out` moves the bytes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.adapters.delta import BlockDelta
from swarm.errors import PeerError, SwarmError

logger = logging.getLogger(__name__)

HOST_BYTES = 1 << 30
"""Host memory for swapped sessions."""


class HostBudget:
    """Bytes of host memory that swapped sessions may take.

    Args:
        capacity: all of it; 0 swaps nothing.
    """

    def __init__(self, capacity: int = HOST_BYTES):
        self.capacity = capacity
        self.used = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much may be taken."""
        return self.used + num_bytes <= self.capacity

    def take(self, num_bytes: int) -> None:
        """Count so much as used; more than there is room for only as long as it takes to move a session back."""
        self.used += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self.used -= num_bytes


@dataclass(slots=True, kw_only=True, eq=False)
class Swapped:
    """The cache of a session in host memory."""

    num_pages: int
    """Different pages that it had."""
    layouts: tuple[tuple[int, ...], ...]
    """For each row, which of these its pages were, in token order."""
    num_bytes: int
    content: Any = None
    """What `BlockSpan.read_pages` gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPage:
    """Copy-on-write: `destination` becomes what `source` is."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOut:
    """Save these pages, which others will write, and the session's recurrent states."""

    session: Any
    swapped: Swapped
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapIn:
    """Put what was saved into these pages, and the session's recurrent states back."""

    session: Any
    swapped: Swapped
    pages: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """An adapter's place on the device, from one Attach to the next Detach."""

    digest: str
    handle: int = -1
    """What `BlockSpan.attach` gave; -1 before and after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Copy an adapter into these pages, or (None) into memory of its own; rows may use its seat from then on."""

    seat: Seat
    deltas: Mapping[int, BlockDelta]
    pages: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detach:
    """No row uses this seat any more; the pages of its adapter belong to others."""

    seat: Seat


Move = CopyPage | SwapOut | SwapIn | Attach | Detach


def carry_out(moves: Iterable[Move], span: Any) -> dict[str, SwarmError]:
    """Move the bytes of a `swarm.server.blocks.BlockSpan`, in order: a page may be saved and then written.

    Returns:
        What went wrong with adapters, by digest: that is the matter of those who use them, and of nobody else.
    """
    moves = list(moves)
    for move in moves:
        if isinstance(move, Detach) and move.seat.handle >= 0:
            span.detach(move.seat.handle)
            move.seat.handle = -1
    failures: dict[str, SwarmError] = {}
    for move in moves:
        if isinstance(move, Attach):
            if (failure := _attach(move, span)) is not None:
                failures[move.seat.digest] = failure
            continue
        if isinstance(move, CopyPage):
            span.copy_pages([(move.source, move.destination)])
        if not isinstance(move, SwapOut | SwapIn):
            continue
        states = [row.state for row in move.session.rows if row.state is not None]
        if isinstance(move, SwapOut):
            move.swapped.content = span.read_pages(move.pages, move.session.blocks)
            span.park_states(states)
        else:
            span.write_pages(move.pages, move.session.blocks, move.swapped.content)
            span.unpark_states(states)
            move.swapped.content = None
    return failures


def _attach(move: Attach, span: Any) -> SwarmError | None:
    try:
        move.seat.handle = span.attach(move.deltas, move.pages)
    except SwarmError as error:
        return error
    except (RuntimeError, MemoryError, ValueError) as error:
        logger.exception("adapter %.12s can't be attached", move.seat.digest)
        return PeerError(f"adapter {move.seat.digest[:12]} can't be attached: {error}")
    return None
