"""Which sessions a server with too little cache asks to move to servers with room: a greedy rule, and pure.

    sessions: pages, adapters, how long they are here ─┐
    replicas: free pages, adapters ────────────────────┴─► sessions_to_move ─► MoveAway

Sessions of one adapter are asked one after the other, those first whose adapters are where there is room, so that
adapters leave with their sessions as far as that goes. Nobody is asked twice within a while, nor who has come from
another server lately; and what moves takes at most half of what is free elsewhere. So two servers that are both short
send each other nothing, and nobody goes to and fro. Who found nobody to go to is asked again sooner, since that may be
other next time. Who is short, and where a session goes, is decided elsewhere.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
SETTLE_S = 300.0
"""A session stays for so long after it has moved, or was asked to ..."""
RETRY_S = 30.0
"""... or for so long after its client has found nobody who takes it."""
SHARE = 0.5
"""Part of a replica's free pages that may be filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest(Generic[T]):
    """A session at this server."""

    key: T
    num_pages: int
    stays_until: float
    """Before, it is not asked to move."""
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Another server of all our blocks."""

    free_pages: int
    adapters: frozenset[str] = field(default_factory=frozenset)
    """Those of our sessions' that it has."""


def sessions_to_move(guests: Sequence[Guest[T]], replicas: Sequence[Replica], num_pages: int, now: float) -> list[T]:
    """The sessions to ask, so that what is left has room in `num_pages`, or as near to that as may be.

    Args:
        guests: all sessions.
        replicas: where they could go; which of them each goes to is its client's choice.
        num_pages: of our cache.
        now: the time.
    """
    excess = sum(guest.num_pages for guest in guests) - num_pages
    room = [int(replica.free_pages * SHARE) for replica in replicas]
    movable = [guest for guest in guests if guest.num_pages and now >= guest.stays_until]
    chosen: list[T] = []
    for group in _groups(movable, replicas):
        for guest in sorted(group, key=lambda guest: guest.num_pages):
            if excess <= 0:
                return chosen
            place = _place(guest, replicas, room)
            if place is not None:
                room[place] -= guest.num_pages
                excess -= guest.num_pages
                chosen.append(guest.key)
    return chosen


def _groups(guests: Sequence[Guest[T]], replicas: Sequence[Replica]) -> list[list[Guest[T]]]:
    """Sessions with the same adapters; first those whose adapters are elsewhere, then the smallest groups."""
    groups: defaultdict[frozenset[str], list[Guest[T]]] = defaultdict(list)
    for guest in guests:
        groups[guest.adapters].append(guest)

    def order(adapters: frozenset[str]) -> tuple[bool, int]:
        is_known = any(adapters <= replica.adapters for replica in replicas)
        return not is_known, sum(guest.num_pages for guest in groups[adapters])

    return [groups[adapters] for adapters in sorted(groups, key=order)]


def _place(guest: Guest[T], replicas: Sequence[Replica], room: Sequence[int]) -> int | None:
    """A replica with room, one with its adapters if there is any; None where nobody has room."""
    fitting = [index for index, free in enumerate(room) if guest.num_pages <= free]
    return max(fitting, key=lambda index: (guest.adapters <= replicas[index].adapters, room[index]), default=None)
