"""Keeps a peer that nobody can connect to within reach: reservations with relays, renewed when one is lost.

    candidates() ─► a few of them ─ Reserve ─► the nearest are kept, for as long as their streams last
                                                     └─ lost ─► others are asked ──► on_change: tell the swarm

A reservation is a stream that stays open; both ends notice within seconds when the other is gone. Connections that a
relay carries outlive it.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from swarm.errors import PeerMisbehaved, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import RELAY_SERVICE, Reserve, Reserved
from swarm.transport.reachability import Reachability
from swarm.transport.stream import EndOfStream, Stream
from swarm.transport.transport import Transport

log = logging.getLogger(__name__)

NUM_RELAYS = 2
"""Reservations that are kept: one may be lost at any time."""
NUM_TRIED = 6
"""Relays that are asked at a time; the nearest are kept."""
KEEP_SHARE, KEEP_S = 0.7, 0.005
"""A relay that we have is left for one whose round trip is below this share of its own, by so many seconds more."""
RESERVE_TIMEOUT_S = 5.0
RETRY_S = 10.0
"""How long until others are asked while there are too few."""
PAUSE_S = 1.0
"""Shortest time between two searches."""
SHORT_S = 60.0
"""A relay that gives a reservation up so soon is not asked again for a while, each time a longer one."""
LEAVE_S = 60.0
"""How long a relay is kept after it was left for a nearer one: others have read that we are there."""
SEARCH_S = 300.0
"""How often nearer ones are looked for while there are enough."""


@dataclass(slots=True, eq=False)
class _Reservation:
    relay_id: str
    stream: Stream
    rtt_s: float
    since: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Reservations:
    """The relays of one peer.

    Args:
        transport: reaches them.
        candidates: peers that may relay, in any order.
        on_change: called when `relays` has changed.
    """

    def __init__(
        self,
        transport: Transport,
        candidates: Callable[[], Awaitable[Sequence[str]]],
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        self.on_change = on_change
        self._transport, self._candidates = transport, candidates
        self._held: dict[str, _Reservation] = {}
        self._used: Counter[str] = Counter()
        """Relays that may open circuits to us: those that are asked, held, and left lately."""
        self._failures = Reachability()
        self._changed = asyncio.Event()
        self._refusals: dict[str, str] = {}
        self._tasks = TaskSet()

    @property
    def relays(self) -> tuple[str, ...]:
        """Who carries connections to us now, the nearest first."""
        return tuple(sorted(self._held, key=lambda relay_id: self._held[relay_id].rtt_s))

    @property
    def refusals(self) -> str:
        """Why those who were asked last did not, in one line."""
        return "; ".join(f"{relay_id}: {reason}" for relay_id, reason in self._refusals.items())

    async def start(self, timeout_s: float) -> bool:
        """Look for relays from now on; whether there is one within `timeout_s`."""
        self._transport.take_circuits(lambda peer_id: peer_id in self._used)
        self._tasks.spawn(self._keep(), name="reservations with relays")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._held:
                    self._changed.clear()
                    await self._changed.wait()
        return bool(self._held)

    async def close(self) -> None:
        """Give all reservations up."""
        await self._tasks.close()
        self._held.clear()

    async def _keep(self) -> None:
        """Search when one is lost, and now and then; for ever."""
        loop = asyncio.get_running_loop()
        while True:
            before = self.relays
            await self._search()
            if self.relays != before:
                self._tell()
            searched = loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(SEARCH_S if len(self._held) >= NUM_RELAYS else RETRY_S):
                    await self._lost()
            await asyncio.sleep(max(0.0, searched + PAUSE_S - loop.time()))

    async def _lost(self) -> None:
        """Returns when a reservation is lost, and has taken it out."""
        if not self._held:
            await asyncio.Event().wait()
        waiting = {asyncio.ensure_future(it.lost.wait()): it for it in self._held.values()}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        now = asyncio.get_running_loop().time()
        for task in done:
            lost = waiting[task]
            self._held.pop(lost.relay_id, None)
            if now - lost.since < SHORT_S:
                self._failures.failed(lost.relay_id, now)
            log.info("relay %s is lost", lost.relay_id)
        self._tell()

    async def _search(self) -> None:
        """Ask some that may relay, and keep the nearest of them and of those that we have."""
        now, known = asyncio.get_running_loop().time(), {self._transport.peer_id, *self._used}
        candidates = [it for it in await self._candidates() if it not in known and self._failures.should_try(it, now)]
        asked = random.sample(candidates, min(NUM_TRIED, len(candidates)))
        self._refusals = {}
        found = [it for it in await asyncio.gather(*map(self._reserve, asked)) if it is not None]
        nearest = sorted((*self._held.values(), *found), key=self._worth_s)
        for reservation in nearest[NUM_RELAYS:]:
            was_held = self._held.pop(reservation.relay_id, None) is not None
            self._tasks.spawn(self._leave(reservation, LEAVE_S if was_held else 0.0), name="leave a relay")
        for reservation in found:
            if reservation in nearest[:NUM_RELAYS]:
                self._held[reservation.relay_id] = reservation

    def _worth_s(self, reservation: _Reservation) -> float:
        """Its round trip; one that we have stays unless another is much nearer."""
        return reservation.rtt_s * KEEP_SHARE - KEEP_S if reservation.relay_id in self._held else reservation.rtt_s

    async def _reserve(self, relay_id: str) -> _Reservation | None:
        """Ask one; None if it does not, or can't be reached."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESERVE_TIMEOUT_S):
                stream = await self._transport.open(relay_id, RELAY_SERVICE, timeout_s=RESERVE_TIMEOUT_S)
                try:
                    asked = loop.time()
                    await stream.send(Reserve())
                    answer, _ = await stream.receive()
                    if not isinstance(answer, Reserved):
                        raise PeerMisbehaved(f"{type(answer).__name__} in place of Reserved", peer_id=relay_id)
                except BaseException:
                    await stream.close()
                    raise
            reservation = _Reservation(relay_id, stream, loop.time() - asked, loop.time())
            self._tasks.spawn(self._watch(reservation), name=f"reservation with {relay_id}")
            return reservation
        except (SwarmError, EndOfStream, TimeoutError) as error:
            self._refusals[relay_id] = str(error) or f"no answer within {RESERVE_TIMEOUT_S:g} s"
            log.debug("%s is no relay for us: %r", relay_id, error)
            return None

    async def _watch(self, reservation: _Reservation) -> None:
        """Returns when the reservation is over."""
        self._used[reservation.relay_id] += 1
        try:
            with suppress(SwarmError, EndOfStream):
                await reservation.stream.receive()  # nothing comes on it but its end
        finally:
            self._used -= Counter([reservation.relay_id])
            reservation.lost.set()
            await reservation.stream.close()

    async def _leave(self, reservation: _Reservation, after_s: float) -> None:
        """Give a reservation up; connections that it carries go on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                await reservation.lost.wait()
        await reservation.stream.close()

    def _tell(self) -> None:
        self._changed.set()
        self.on_change()
