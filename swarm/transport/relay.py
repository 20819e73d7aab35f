"""What a peer that can be reached does for those that can't: it carries connections to them, without seeing inside.

    target ── Reserve ──► RelayDesk: reservations                    (the stream stays open: the reservation)
    dialler ─ OpenCircuit ─► RelayDesk ── CircuitOpened, over the target's connection ──► target
                  dialler ═══ CircuitBytes ═══ one piece at a time ═══ CircuitBytes ═══ target

Nobody else can be reached through it: a circuit leads to a peer that has asked for that, over the connection that this
peer has made. All circuits share one rate, and those who pay for them take turns, so that one with many is no quicker
than one with few. A circuit holds one piece at a time and what the windows of two streams allow: whoever doesn't read
stops its sender, not us. There are only so many circuits that each has its turn before its ends grow impatient.
"""

import asyncio
import heapq
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved, PeerUnreachable
from swarm.protocol import CIRCUIT_SERVICE, CircuitBytes, CircuitGreeting, CircuitOpened, OpenCircuit, Reserve, Reserved
from swarm.rates import Rate, Rates
from swarm.transport.mux import MESSAGE_COST
from swarm.transport.stream import EndOfStream, Stream

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 30.0
"""How long an end may leave a piece unread."""
MAX_PIECE_BYTES = 64 << 10
ROUND_S = 2.0
"""When all circuits have something to carry both ways, each has its turn again after so long at most."""
CIRCUITS = Rate(burst=64, per_s=4)
"""How often one account may open one, and how often one peer is asked to take one."""
MAX_REMEMBERED = 1024
BYTES_PER_S = 100e6 / 8
"""What a relay carries if nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives.

    Attributes:
        bytes_per_s: of all circuits, in both directions together.
        max_reservations: peers that may be reached through it.
        max_circuits: at once, where the rate is enough for so many; a quarter of them to one peer, and a quarter from
            one account.
    """

    bytes_per_s: float = BYTES_PER_S
    max_reservations: int = 128
    max_circuits: int = 256

    @property
    def num_circuits(self) -> int:
        """So many can be carried at once that each has its turn in ROUND_S."""
        return max(4, min(self.max_circuits, int(self.bytes_per_s * ROUND_S / (2 * MAX_PIECE_BYTES))))


class RelayDesk:
    """Carries connections; its `serve` is the handler of the `relay` service.

    Args:
        limits: what it gives.
    """

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        """Carried since the start."""
        self._is_open = True
        self._reservations: dict[str, Stream] = {}
        self._to: Counter[str] = Counter()
        """Circuits by target ..."""
        self._from: Counter[str] = Counter()
        """... and by account of the dialler."""
        self._opens, self._asks = Rates(CIRCUITS), Rates(CIRCUITS)
        self._turnstile = Turnstile(limits.bytes_per_s)

    @property
    def num_reservations(self) -> int:
        """Peers that can be reached through us."""
        return len(self._reservations)

    @property
    def num_circuits(self) -> int:
        """Connections that we carry."""
        return self._to.total()

    async def close(self) -> None:
        """Give all reservations up, and take none: nobody comes to us any more. What is carried goes on."""
        self._is_open = False
        for stream in list(self._reservations.values()):
            await stream.abort(PeerUnreachable("nobody can connect to this relay any more"))

    def open(self) -> None:
        """Take reservations again."""
        self._is_open = True

    async def serve(self, stream: Stream) -> None:
        """Hold a reservation, or carry a connection, for as long as the stream lasts.

        Raises:
            PeerBusy: there is no room. PeerUnreachable: who is asked for has no reservation here.
        """
        message, _ = await stream.receive(OPEN_TIMEOUT_S)
        if isinstance(message, Reserve):
            await self._hold(stream)
        elif isinstance(message, OpenCircuit):
            await self._open(stream, message)
        else:
            raise InvalidRequest(f"{type(message).__name__} is nothing that a relay does")

    async def _hold(self, stream: Stream) -> None:
        peer_id = stream.peer_id
        if not self._is_open:
            raise PeerUnreachable("nobody can connect to this relay at present")
        if peer_id not in self._reservations and self.num_reservations >= self.limits.max_reservations:
            raise PeerBusy(f"limit of {self.limits.max_reservations} peers that are relayed here", retry_after_s=60.0)
        self._reservations[peer_id] = stream
        try:
            await stream.send(Reserved(max_circuits=self._share), timeout_s=OPEN_TIMEOUT_S)
            with suppress(EndOfStream):
                message, _ = await stream.receive()
                raise PeerMisbehaved(f"{type(message).__name__} on a reservation", peer_id=peer_id)
        finally:
            if self._reservations.get(peer_id) is stream:  # else it has made another meanwhile
                del self._reservations[peer_id]

    @property
    def _share(self) -> int:
        return max(1, self.limits.num_circuits // 4)

    async def _open(self, stream: Stream, message: OpenCircuit) -> None:
        target, account = message.peer_id, stream.account
        reservation = self._reservations.get(target)
        if reservation is None:
            raise PeerUnreachable(f"{target} is not relayed here", peer_id=target)
        self._check_room(target, account)
        self._to[target] += 1
        self._from[account] += 1
        try:
            async with reservation.open_back(CIRCUIT_SERVICE) as other:
                opened = CircuitOpened(peer_id=stream.peer_id, is_call_back=message.is_call_back)
                await other.send(opened, timeout_s=OPEN_TIMEOUT_S)
                await self._splice(stream, other)
        finally:
            for counter, key in ((self._to, target), (self._from, account)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    def _check_room(self, target: str, account: str) -> None:
        """Refuse what is too much, for us or for the target.

        Raises:
            PeerBusy: with the limit.
        """
        limit, now = self.limits.num_circuits, asyncio.get_running_loop().time()
        if self.num_circuits >= limit or max(self._to[target], self._from[account]) >= self._share:
            raise PeerBusy(f"no room for another circuit, limit {limit}, {self._share} of one peer", retry_after_s=10.0)
        if not (self._opens.charge(account, now) and self._asks.charge(target, now)):
            raise PeerBusy(f"over {CIRCUITS.per_s:g} new circuits per second", retry_after_s=1 / CIRCUITS.per_s)

    async def _splice(self, near: Stream, far: Stream) -> None:
        """Carry pieces both ways until one end finishes.

        Raises:
            SwarmError: why the target refuses.
        """
        account = near.account
        there = asyncio.ensure_future(self._carry(near, far, account, may_greet=False))
        back = asyncio.ensure_future(self._carry(far, near, account, may_greet=True))
        try:
            done, _ = await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in (there, back):
                way.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
        for way in done:
            way.result()

    async def _carry(self, source: Stream, sink: Stream, account: str, *, may_greet: bool) -> None:
        with suppress(EndOfStream):
            while True:
                message, body = await source.receive()
                is_known = isinstance(message, CircuitBytes) or (may_greet and isinstance(message, CircuitGreeting))
                if not is_known or len(body) > MAX_PIECE_BYTES:
                    raise PeerMisbehaved(f"{type(message).__name__} of {len(body)} bytes in a circuit")
                may_greet = False
                await self._turnstile.pass_through(account, len(body) + MESSAGE_COST)
                await sink.send(message, body, timeout_s=SEND_TIMEOUT_S)
                self.num_bytes += len(body)


class Turns:
    """Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with one weight for all. Pure.

    Of those who wait the one passes next that has passed least, counted from when it was last idle.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, str]] = []
        self._numbers = count()
        self._virtual = 0.0
        self._finish: dict[str, float] = {}

    def arrive(self, key: str, cost: float) -> int:
        """Wait for a turn; its number."""
        start = max(self._virtual, self._finish.get(key, 0.0))
        self._finish[key] = start + cost
        number = next(self._numbers)
        heapq.heappush(self._waiting, (start, number, key))
        return number

    def next(self) -> int | None:
        """The number whose turn it is now; None where nobody waits."""
        if not self._waiting:
            self._finish.clear()  # all are idle: nothing that was says anything about what comes
            self._virtual = 0.0
            return None
        self._virtual, number, _ = heapq.heappop(self._waiting)
        if len(self._finish) > MAX_REMEMBERED:
            self._finish = {key: finish for key, finish in self._finish.items() if finish > self._virtual}
        return number


class Turnstile:
    """Lets so many bytes pass per second, those who wait in turns.

    Args:
        bytes_per_s: in the long run; after a pause, BURST_S of it at once.
    """

    BURST_S = 0.1

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._turns = Turns()
        self._waiting: dict[int, tuple[asyncio.Future[None], int]] = {}
        self._free_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    async def pass_through(self, key: str, num_bytes: int) -> None:
        """Wait until these may pass; they count as those of `key`."""
        number = self._turns.arrive(key, num_bytes)
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future, num_bytes
        if self._timer is None:
            self._admit()
        await future

    def _admit(self) -> None:
        """Let pass whoever may; come back when the next one may."""
        loop = asyncio.get_running_loop()
        self._timer = None
        self._free_at = max(self._free_at, loop.time() - self.BURST_S)
        while self._free_at <= loop.time():
            number = self._turns.next()
            if number is None:
                return
            future, num_bytes = self._waiting.pop(number)
            if not future.done():  # else who waited has gone
                future.set_result(None)
                self._free_at += num_bytes / self._bytes_per_s
        self._timer = loop.call_at(self._free_at, self._admit)
