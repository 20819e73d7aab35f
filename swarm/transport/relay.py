"""What a peer that can be reached does for those that can't: it carries connections to them, without seeing inside.

    target ── Reserve ──► RelayDesk: reservations                    (the stream stays open: the reservation)
    dialler ─ OpenCircuit ─► RelayDesk ── CircuitOpened, over the target's connection ──► target
                  dialler ═══ CircuitBytes ═══ one piece at a time ═══ CircuitBytes ═══ target

Nobody else can be reached through it: a circuit leads to a peer that has asked for that, over the connection that this
peer has made. All circuits share one rate; who waits for it takes turns, piece by piece. A circuit holds one piece at a
time and what the windows of two streams allow, so whoever doesn't read stops its sender, not us.
"""

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved, PeerUnreachable
from swarm.protocol import CIRCUIT_SERVICE, CircuitBytes, CircuitGreeting, CircuitOpened, OpenCircuit, Reserve, Reserved
from swarm.transport.stream import EndOfStream, Stream

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 30.0
"""How long an end may leave a piece unread."""
MAX_PIECE_BYTES = 1 << 18
BYTES_PER_S = 100e6 / 8
"""What a relay carries if nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives.

    Attributes:
        bytes_per_s: of all circuits, in both directions together.
        max_reservations: peers that may be reached through it.
        max_circuits: at once, in all; a quarter of them to one peer, and a quarter from one account.
    """

    bytes_per_s: float = BYTES_PER_S
    max_reservations: int = 128
    max_circuits: int = 256


class RelayDesk:
    """Carries connections; its `serve` is the handler of the `relay` service.

    Args:
        limits: what it gives.
    """

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        """Carried since the start."""
        self._reservations: dict[str, Stream] = {}
        self._to: Counter[str] = Counter()
        """Circuits by target ..."""
        self._from: Counter[str] = Counter()
        """... and by account of the dialler."""
        self._throttle = Throttle(limits.bytes_per_s)

    @property
    def num_reservations(self) -> int:
        """Peers that can be reached through us."""
        return len(self._reservations)

    @property
    def num_circuits(self) -> int:
        """Connections that we carry."""
        return self._to.total()

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
        if peer_id not in self._reservations and self.num_reservations >= self.limits.max_reservations:
            raise PeerBusy(f"limit of {self.limits.max_reservations} peers that are relayed here", retry_after_s=60.0)
        self._reservations[peer_id] = stream
        try:
            await stream.send(Reserved(max_circuits=max(1, self.limits.max_circuits // 4)))
            with suppress(EndOfStream):
                message, _ = await stream.receive()
                raise PeerMisbehaved(f"{type(message).__name__} on a reservation", peer_id=peer_id)
        finally:
            if self._reservations.get(peer_id) is stream:  # else it has made another meanwhile
                del self._reservations[peer_id]

    async def _open(self, stream: Stream, message: OpenCircuit) -> None:
        target, account, share = message.peer_id, stream.account, max(1, self.limits.max_circuits // 4)
        reservation = self._reservations.get(target)
        if reservation is None:
            raise PeerUnreachable(f"{target} is not relayed here", peer_id=target)
        if self.num_circuits >= self.limits.max_circuits or max(self._to[target], self._from[account]) >= share:
            raise PeerBusy(f"no room for another circuit, limit {self.limits.max_circuits}", retry_after_s=10.0)
        self._to[target] += 1
        self._from[account] += 1
        try:
            async with reservation.open_back(CIRCUIT_SERVICE) as other:
                await other.send(CircuitOpened(peer_id=stream.peer_id, is_call_back=message.is_call_back))
                await self._splice(stream, other)
        finally:
            for counter, key in ((self._to, target), (self._from, account)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    async def _splice(self, near: Stream, far: Stream) -> None:
        """Carry pieces both ways until one end finishes.

        Raises:
            SwarmError: why the target refuses.
        """
        ways = [asyncio.ensure_future(self._carry(*pair)) for pair in ((near, far), (far, near))]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        for way in done:
            way.result()

    async def _carry(self, source: Stream, sink: Stream) -> None:
        with suppress(EndOfStream):
            while True:
                message, body = await source.receive()
                if not isinstance(message, CircuitBytes | CircuitGreeting) or len(body) > MAX_PIECE_BYTES:
                    raise PeerMisbehaved(f"{type(message).__name__} of {len(body)} bytes in a circuit")
                await asyncio.sleep(self._throttle.delay_s(len(body), asyncio.get_running_loop().time()))
                await sink.send(message, body, timeout_s=SEND_TIMEOUT_S)
                self.num_bytes += len(body)


class Throttle:
    """Lets so many bytes pass per second, in the order in which they come. Pure.

    Args:
        bytes_per_s: in the long run; after a pause, BURST_S of it at once.
    """

    BURST_S = 0.1

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = float("-inf")

    def delay_s(self, num_bytes: int, now: float) -> float:
        """How long these must wait, behind all that were asked for before."""
        start = max(self._free_at, now - self.BURST_S)
        self._free_at = start + num_bytes / self._bytes_per_s
        return max(0.0, start - now)
