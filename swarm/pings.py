"""Round trips to other servers: measured now and then, smoothed, forgotten when they are old.

    records of some servers ─► Pinger ─InfoRequest─► servers        ─► who did not answer
                                 └─ RoundTrips: smoothed round trips ─► `pings` of our own record, routes
                                 └─ place: where we are             ─► `place` of our own record, routes

How many are measured is the caller's choice; it does not grow with the swarm (`neighbours`).
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from swarm.coordinates import Place, located, moved, round_trip_s
from swarm.errors import InvalidRequest, PeerBusy, PeerError, PeerMisbehaved, SwarmError
from swarm.protocol import INFO_SERVICE, InfoRequest
from swarm.registry import MAX_TIME_S, ServerRecord
from swarm.transport import Transport
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

SMOOTHING = 0.3
"""Weight of the newest measurement."""
STALE_S = 300.0
"""A round trip is forgotten when it was not measured again for so long."""
PING_TIMEOUT_S = 3.0
SLOW_S = 1.0
"""An answer that takes longer than this and SLOW_TRIPS round trips is slow: it may not come, but is waited for ..."""
SLOW_TRIPS = 8
"""... which two questions may take, and the making of a connection."""
NUM_NEAR = 5
"""Likely successors that a server measures each time: the nearest ones ..."""
NUM_SETTLING = 8
"""Times that a newcomer goes over its first measurements."""
NUM_PARTNERS = 2
"""... those that hold some of its blocks and without which nobody else would, or one ..."""
NUM_RANDOM = 3
"""... and others at random, so that places settle and new neighbours are found."""


class RoundTrips:
    """What was measured, by peer. Pure."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}

    def measured(self, peer_id: str, rtt_s: float, now: float) -> None:
        """A round trip took so long."""
        known = self.get(peer_id, now)
        self._known[peer_id] = (rtt_s if known is None else (1 - SMOOTHING) * known + SMOOTHING * rtt_s), now

    def get(self, peer_id: str, now: float) -> float | None:
        """The smoothed round trip in seconds; None where there is none, or it is too old."""
        rtt_s, at = self._known.get(peer_id, (0.0, float("-inf")))
        return rtt_s if now - at <= STALE_S else None

    def forget(self, peer_id: str) -> None:
        """The peer does not answer."""
        self._known.pop(peer_id, None)

    def keep_only(self, peer_ids: Collection[str]) -> None:
        """Forget all others, which have left the swarm."""
        self._known = {peer_id: known for peer_id, known in self._known.items() if peer_id in peer_ids}


class Pinger:
    """Measures round trips to servers, and finds our own place by them.

    Args:
        transport: how to reach servers.
        generator: for directions in which nothing is known.
        now: a monotonic clock in seconds.
    """

    def __init__(
        self, transport: Transport, generator: np.random.Generator, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.place = Place()
        self.round_trips = RoundTrips()
        self._transport, self._generator, self._now = transport, generator, now

    def rtt_s(self, peer_id: str) -> float | None:
        """The smoothed round trip to a server, if it was measured lately."""
        return self.round_trips.get(peer_id, self._now())

    def hears(self, peer_id: str) -> bool:
        """Whether a connection to this peer lives: it has shown a sign of life within seconds."""
        return self._transport.rtt_s(peer_id) is not None

    async def ping(
        self, records: Iterable[ServerRecord], *, on_slow: Callable[[str], None] = lambda peer_id: None
    ) -> dict[str, PeerError]:
        """Measure the round trips to some servers at once; those that are not there, and what went wrong.

        One that is busy is there. So is one that refuses to say what it serves, unless its record says that it serves.

        Args:
            records: of the servers.
            on_slow: is told of those whose answers are slow, while they are waited for.
        """
        records = list(records)
        is_new = self.place.error >= 1.0
        answers = await asyncio.gather(*(self._ping(record, on_slow) for record in records))
        if is_new:
            self._settle(records)
        return {record.peer_id: error for record, error in zip(records, answers, strict=True) if error is not None}

    def _settle(self, records: Sequence[ServerRecord]) -> None:
        """Go over the first measurements again and again: a newcomer's place is of use at once."""
        samples = [
            (it.place, rtt_s)
            for it in records
            if it.place is not None and (rtt_s := self.rtt_s(it.peer_id)) is not None
        ]
        directions = self._generator.normal(size=(NUM_SETTLING * len(samples), 3))
        self.place = located(self.place, samples, directions.tolist())

    async def _ping(self, record: ServerRecord, on_slow: Callable[[str], None]) -> PeerError | None:
        patience_s = slow_after_s(self._expected_s(record))
        slow = asyncio.get_running_loop().call_later(patience_s, on_slow, record.peer_id)
        try:
            return await self._judge(record)
        finally:
            slow.cancel()

    def _expected_s(self, record: ServerRecord) -> float | None:
        """The round trip to a server, measured or as its place tells; None where neither is known."""
        measured_s = self.rtt_s(record.peer_id)
        if measured_s is None and record.place is not None and max(self.place.error, record.place.error) < 1.0:
            return round_trip_s(self.place, record.place)
        return measured_s

    async def _judge(self, record: ServerRecord) -> PeerError | None:
        try:
            rtt_s = await self._measure(record.peer_id)
        except PeerBusy as error:  # it answers: it has much to do, or is on its way to other blocks
            logger.debug("no round trip to %s: %s", record.peer_id, error)
            return None
        except PeerError as error:
            logger.debug("no ping of %s: %s", record.peer_id, error)
            self.round_trips.forget(record.peer_id)
            return error
        except SwarmError as error:  # it answers, if only to refuse
            logger.debug("no round trip to %s: %s", record.peer_id, error)
            if record.state is not ServerState.ONLINE or not isinstance(error, InvalidRequest):
                return None
            self.round_trips.forget(record.peer_id)
            return PeerMisbehaved(f"is announced as ONLINE and does not serve: {error}", peer_id=record.peer_id)
        self.round_trips.measured(record.peer_id, min(rtt_s, MAX_TIME_S), self._now())
        if record.place is not None:
            self.place = moved(self.place, record.place, rtt_s, list(self._generator.normal(size=3)))
        return None

    async def _measure(self, peer_id: str) -> float:
        """Seconds of one question and answer, not counting the making of a connection."""
        is_connected = self._transport.rtt_s(peer_id) is not None
        seconds = []
        for _ in range(1 if is_connected else 2):
            started = self._now()
            await self._transport.call(peer_id, INFO_SERVICE, InfoRequest(), timeout_s=PING_TIMEOUT_S)
            seconds.append(self._now() - started)
        return min(seconds)


def slow_after_s(rtt_s: float | None) -> float:
    """After how many seconds without an answer a server is slow, by the round trip to it. Pure."""
    return PING_TIMEOUT_S if rtt_s is None else min(SLOW_S + SLOW_TRIPS * rtt_s, PING_TIMEOUT_S)


def neighbours(
    blocks: BlockRange, others: Sequence[ServerRecord], place: Place, generator: np.random.Generator
) -> list[ServerRecord]:
    """Whom a server measures: the nearest ones that could follow it in a chain, some on whom its own blocks depend, and
    some others at random. Pure.

    Where nobody follows, holders of the first block are taken in their place, which follow nobody: so each block is
    watched by some.

    Args:
        blocks: of the server.
        others: records of the other servers.
        place: where the server is.
        generator: for the others.
    """
    following = [record for record in others if record.blocks.start <= blocks.end < record.blocks.end]
    following = following or [record for record in others if record.blocks.start == 0]
    chosen = sorted(following, key=lambda record: _distance_s(record, place))[:NUM_NEAR]
    rest = _without(others, chosen)
    chosen += partners(blocks, rest)
    rest = _without(rest, chosen)
    count = min(max(NUM_NEAR + NUM_RANDOM - len(chosen), NUM_RANDOM), len(rest))
    return chosen + [rest[index] for index in generator.choice(len(rest), count, replace=False)]


def partners(blocks: BlockRange, others: Sequence[ServerRecord]) -> list[ServerRecord]:
    """The few without which a server would be needed where it is, at most NUM_PARTNERS, first the last ones. Pure."""
    near = [record for record in others if record.blocks.start < blocks.end and blocks.start < record.blocks.end]
    sharing = [(record, set(blocks).intersection(record.blocks)) for record in near]
    holders = Counter(block for _, shared in sharing for block in shared)
    few = [(min(holders[block] for block in shared), record.peer_id, record) for record, shared in sharing]
    return [record for count, _, record in sorted(few, key=lambda it: it[:2])[:NUM_PARTNERS] if count <= NUM_PARTNERS]


def _without(records: Sequence[ServerRecord], chosen: Sequence[ServerRecord]) -> list[ServerRecord]:
    ids = {record.peer_id for record in chosen}
    return [record for record in records if record.peer_id not in ids]


def _distance_s(record: ServerRecord, place: Place) -> float:
    return float("inf") if record.place is None else round_trip_s(record.place, place)
