"""How far the parts of a chain are from each other: what was measured where it was, else what places predict.

    Location of each server, the client's place ─► PeerMap ─► ChainWays: from the client, between servers, and back

Pure arrays behind `swarm.routing`; servers are known by their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarm.coordinates import Place
from swarm.route_search import Floats, Ints

UNKNOWN_RTT_S = 0.1
"""Round trip to a server whose place is not known."""
MAX_PINGS = 16
"""Measured round trips per server that are looked at."""
CELL_S = 0.005
"""Places that are nearer to each other count as one where servers are put in order ..."""
CELL_BITS = 8
"""... of two to this power along each axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """What is known of where one server is.

    Attributes:
        place: its place; None if unknown.
        tag: how the pings of others name it.
        pings: (tag, round trip in seconds) of servers that it has measured.
        client_rtt_s: the round trip that the client has measured; None if it has not.
    """

    place: Place | None = None
    tag: int = -1
    pings: Sequence[tuple[int, float]] = ()
    client_rtt_s: float | None = None


class PeerMap:
    """Where the servers and the client are, and the round trips that were measured."""

    def __init__(self, servers: Sequence[Location], home: Place | None):
        known = [it.place.position for it in servers if it.place is not None]
        middle = tuple(np.mean(known, axis=0)) if known else (0.0, 0.0, 0.0)
        positions = [middle if it.place is None else it.place.position for it in servers]
        heights = [UNKNOWN_RTT_S / 2 if it.place is None else it.place.height_s for it in servers]
        self.position: Floats = np.array(positions, dtype=np.float64).reshape(-1, 3)
        self._height_s: Floats = np.array(heights, dtype=np.float64)
        square, ones = (self.position**2).sum(axis=1, keepdims=True), np.ones((len(servers), 1))
        self._left: Floats = np.hstack((-2.0 * self.position, square, ones))  # left @ right.T: squares of distances
        self._right: Floats = np.hstack((self.position, ones, square))
        self._peers, self._rtt_s = _measured(servers)
        self._column: Ints = np.full(len(servers) + 1, -1)
        self.client_rtt_s = self._client_rtt_s(servers, home)

    def round_trips(self, senders: Ints, receivers: Ints) -> Floats:
        """[senders, receivers], as measured, else as predicted."""
        rtt_s: Floats = self._left[senders] @ self._right[receivers].T
        np.maximum(rtt_s, 0.0, out=rtt_s)
        np.sqrt(rtt_s, out=rtt_s)
        rtt_s += self._height_s[senders, None]
        rtt_s += self._height_s[receivers]
        if self._peers.shape[1]:
            self._column[receivers] = np.arange(len(receivers))
            columns = self._column[self._peers[senders]]
            self._column[receivers] = -1
            rows, slots = np.nonzero(columns >= 0)
            if len(rows):
                rtt_s[rows, columns[rows, slots]] = self._rtt_s[senders[rows], slots]
        return rtt_s

    def neighbourly(self, servers: Ints) -> Ints:
        """An order of these servers in which neighbours are mostly near each other: along a Z-curve through cells."""
        cells = np.floor((self.position[servers] - self.position.min(axis=0)) / CELL_S).astype(np.int64)
        bits = (cells.clip(0, (1 << CELL_BITS) - 1)[:, :, None] >> np.arange(CELL_BITS)) & 1
        return np.argsort((bits << (3 * np.arange(CELL_BITS) + np.arange(3)[:, None])).sum(axis=(1, 2)), kind="stable")

    def _client_rtt_s(self, servers: Sequence[Location], home: Place | None) -> Floats:
        rtt_s = np.full(len(servers), UNKNOWN_RTT_S)
        if home is not None:
            distance_s = np.linalg.norm(self.position - np.array(home.position), axis=1)
            rtt_s = distance_s + self._height_s + home.height_s
        for index, server in enumerate(servers):
            if server.client_rtt_s is not None:
                rtt_s[index] = server.client_rtt_s
        return rtt_s


def _measured(servers: Sequence[Location]) -> tuple[Ints, Floats]:
    """Of each server, up to MAX_PINGS others (the number of servers stands for none), and the round trips to them.

    A round trip is the same for both, so it is known to either if one of them has measured it.
    """
    nobody, index = len(servers), {it.tag: position for position, it in enumerate(servers)}
    found = [(i, index[tag], rtt_s) for i, it in enumerate(servers) for tag, rtt_s in it.pings if tag in index]
    if not found:
        return np.empty((nobody, 0), dtype=np.int64), np.empty((nobody, 0))
    one, other, rtt_s = (np.array(column) for column in zip(*found, strict=True))
    one, other, rtt_s = np.r_[one, other], np.r_[other, one], np.r_[rtt_s, rtt_s]
    order = np.lexsort((rtt_s, one))
    one, other, rtt_s = one[order], other[order], rtt_s[order]
    slot = np.arange(len(one)) - np.searchsorted(one, one)
    fits = slot < MAX_PINGS
    shape = (nobody, int(slot[fits].max()) + 1)
    peers, measured_s = np.full(shape, nobody), np.zeros(shape)
    peers[one[fits], slot[fits]] = other[fits]
    measured_s[one[fits], slot[fits]] = rtt_s[fits]
    return peers, measured_s


class ChainWays:
    """One-way times over a map; a range's inputs come from the client or a server, its outputs go to either."""

    def __init__(self, known: PeerMap, after: int | None, before: int | None):
        self._map, self._after, self._before = known, after, before

    def from_start(self, servers: Ints) -> Floats:
        return self._end_s(servers, self._after)

    def between(self, senders: Ints, receivers: Ints) -> Floats:
        return self._map.round_trips(senders, receivers) / 2

    def to_end(self, servers: Ints) -> Floats:
        return self._end_s(servers, self._before)

    def _end_s(self, servers: Ints, other: int | None) -> Floats:
        if other is None:
            return self._map.client_rtt_s[servers] / 2
        way_s: Floats = self._map.round_trips(np.array([other]), servers)[0] / 2
        return way_s
