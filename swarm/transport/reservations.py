"""Keeps a peer that nobody can connect to within reach: reservations with relays, renewed when one is lost.

    candidates() ─► a few of them ─ Reserve ─► the nearest are kept, for as long as their streams last
                                                     └─ lost ─► others are asked ──► on_change: tell the swarm

A reservation is a stream that stays open; both ends notice within seconds when the other is gone.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from swarm.errors import PeerMisbehaved, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import RELAY_SERVICE, Reserve, Reserved
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
SEARCH_S = 300.0
"""How often nearer ones are looked for while there are enough."""


@dataclass(slots=True, eq=False)
class _Reservation:
    relay_id: str
    stream: Stream
    rtt_s: float
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
        self._transport.take_circuits(lambda peer_id: peer_id in self._held)
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
        for reservation in self._held.values():
            await reservation.stream.close()
        self._held.clear()

    async def _keep(self) -> None:
        """Search when one is lost, and now and then; for ever."""
        loop = asyncio.get_running_loop()
        while True:
            before = self.relays
            await self._search()
            if self.relays != before:
                self._tell()
            due = loop.time() + (SEARCH_S if len(self._held) >= NUM_RELAYS else RETRY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._lost()

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
        for task in done:
            self._held.pop(waiting[task].relay_id, None)
            log.info("relay %s is lost", waiting[task].relay_id)
        self._tell()

    async def _search(self) -> None:
        """Ask some that may relay, and keep the nearest of them and of those that we have."""
        candidates = [it for it in await self._candidates() if it not in self._held and it != self._transport.peer_id]
        asked = random.sample(candidates, min(NUM_TRIED, len(candidates)))
        self._refusals = {}
        found = [it for it in await asyncio.gather(*map(self._reserve, asked)) if it is not None]
        nearest = sorted((*self._held.values(), *found), key=self._worth_s)
        for reservation in nearest[NUM_RELAYS:]:
            self._held.pop(reservation.relay_id, None)
            await reservation.stream.close()
        for reservation in found:
            if reservation in nearest[:NUM_RELAYS]:
                self._held[reservation.relay_id] = reservation
                self._tasks.spawn(self._watch(reservation), name=f"reservation with {reservation.relay_id}")

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
                return _Reservation(relay_id, stream, loop.time() - asked)
        except (SwarmError, EndOfStream, TimeoutError) as error:
            self._refusals[relay_id] = str(error) or f"no answer within {RESERVE_TIMEOUT_S:g} s"
            log.debug("%s is no relay for us: %r", relay_id, error)
            return None

    async def _watch(self, reservation: _Reservation) -> None:
        """Returns when the reservation is over."""
        try:
            with suppress(SwarmError, EndOfStream):
                await reservation.stream.receive()  # nothing comes on it but its end
        finally:
            reservation.lost.set()
            await reservation.stream.close()

    def _tell(self) -> None:
        self._changed.set()
        self.on_change()
