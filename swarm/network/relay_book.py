"""Through whom peers are reached that nobody can connect to: what their records say, for whoever opens a stream. Pure.

registry ─learn─► RelayBook ─of─► transport
"""

from collections.abc import Sequence

MAX_PEERS = 1 << 15
"""Peers that are remembered; beyond, the one that was heard of least lately is forgotten."""


class RelayBook:
    """Relays by peer."""

    def __init__(self) -> None:
        self._relays: dict[str, tuple[str, ...]] = {}

    def learn(self, peer_id: str, relays: Sequence[str]) -> None:
        """A peer says who carries connections to it; nobody where it can be reached without."""
        self._relays.pop(peer_id, None)
        self._relays[peer_id] = tuple(relays)
        if len(self._relays) > MAX_PEERS:
            del self._relays[next(iter(self._relays))]

    def forget(self, peer_id: str) -> None:
        """What was heard of a peer is wrong."""
        self._relays.pop(peer_id, None)

    def knows(self, peer_id: str) -> bool:
        """Whether anything was heard of it."""
        return peer_id in self._relays

    def of(self, peer_id: str) -> tuple[str, ...]:
        """Its relays as it last said; none for a peer that needs none, or is not known."""
        return self._relays.get(peer_id, ())
