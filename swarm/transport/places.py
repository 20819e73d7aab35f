"""Who leaves when the places for connections are taken: so that those who only sit there keep nobody out. Pure.

    make_place(connections, peer, limits, now) ──► nobody, one to close, or PeerBusy

A connection that has not said HELLO goes for a newer one: an honest peer says it at once. A connection without streams
goes for one that may have some: its peer makes another when it needs one.
"""

from collections.abc import Collection
from typing import Protocol, TypeVar

from swarm.errors import PeerBusy
from swarm.transport.limits import Limits

YOUNG_S = 0.5
"""Who came, or was in use, so lately stays."""
RETRY_S = 5.0


class Place(Protocol):
    """What decides about a connection."""

    @property
    def peer_id(self) -> str:
        """Whose it is; empty until that is known."""

    @property
    def is_greeted(self) -> bool:
        """Whether its peer has said HELLO."""

    @property
    def is_ours(self) -> bool:
        """Whether we made it."""

    @property
    def made_at(self) -> float:
        """When it was made."""

    @property
    def idle_since(self) -> float | None:
        """Since when it has no streams; None while it has."""


P = TypeVar("P", bound=Place)


def make_place(connections: Collection[P], peer_id: str, limits: Limits, now: float) -> P | None:
    """Who must leave so that one more connection can come; None when there is room.

    Args:
        connections: those that are there.
        peer_id: of the newcomer; empty where it is not known yet.
        limits: how many there may be.
        now: the time, on the connections' clock.

    Raises:
        PeerBusy: all are needed.
    """
    pending = [place for place in connections if not place.is_greeted and not place.is_ours]
    if peer_id:
        num_own = sum(place.peer_id == peer_id for place in pending)
        if num_own >= limits.max_connections_per_peer:
            raise PeerBusy(f"{num_own} connections of yours have not said HELLO", retry_after_s=RETRY_S)
    if len(pending) >= limits.max_pending_connections:
        return _longest(pending, now)
    if len(connections) >= limits.max_connections:
        return _longest([place for place in connections if place.idle_since is not None], now)
    return None


def _longest(places: list[P], now: float) -> P:
    """The one that has been waiting longest.

    Raises:
        PeerBusy: none has waited for long.
    """
    oldest = min(places, key=_since, default=None)
    if oldest is None or now - _since(oldest) < YOUNG_S:
        raise PeerBusy("no room for more connections", retry_after_s=RETRY_S)
    return oldest


def _since(place: Place) -> float:
    return place.made_at if place.idle_since is None else place.idle_since
