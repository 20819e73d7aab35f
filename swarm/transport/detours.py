"""Ways to a peer that nobody can connect to: it connects to us, if we can be reached, or a relay carries it all.

Transport ─dial─► Detours ─► relays, those that work first ─► Circuits: one end of a circuit
                                                       or ─► call_back: the peer connects to us directly
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.errors import PeerError, PeerTimeout, PeerUnreachable
from swarm.transport.circuits import Circuits
from swarm.transport.reachability import Reachability
from swarm.transport.stream import Stream

log = logging.getLogger(__name__)

OpenRelay = Callable[[str, float], Awaitable[Stream]]


class Detours:
    """Finds a relay that works.

    Args:
        circuits: makes connections through them.
        open_relay: opens a stream to the relay service of a peer, without any relay, within so many seconds.
        distance_s: round trip to a peer if we are connected to it, else infinity.
    """

    def __init__(self, circuits: Circuits, *, open_relay: OpenRelay, distance_s: Callable[[str], float]) -> None:
        self._circuits, self._open_relay, self._distance_s = circuits, open_relay, distance_s
        self._failures = Reachability()

    async def dial(
        self,
        peer_id: str,
        relays: Sequence[str],
        make_protocol: Callable[[bytes], asyncio.Protocol],
        *,
        timeout_s: float,
    ) -> None:
        """Connect to a peer through one of its relays; `make_protocol` is told the ticket for HELLO.

        Raises:
            PeerUnreachable: none of them works. PeerMisbehaved: somebody else answers.
        """

        async def through(stream: Stream) -> None:
            await self._circuits.open(stream, peer_id, make_protocol)

        await self._through_any(peer_id, relays, through, timeout_s)

    async def call_back(self, peer_id: str, relays: Sequence[str], *, timeout_s: float) -> None:
        """Have a peer connect to us directly.

        Raises:
            PeerUnreachable: it can't, or none of its relays works.
        """

        async def through(stream: Stream) -> None:
            async with stream:
                await self._circuits.call_back(stream, peer_id)

        await self._through_any(peer_id, relays, through, timeout_s)

    async def _through_any(
        self, peer_id: str, relays: Sequence[str], through: Callable[[Stream], Awaitable[None]], timeout_s: float
    ) -> None:
        """Do it with the first relay that works, each of which may take its share of the time."""
        failures = []
        for relay_id in self._in_order(relays):
            try:
                async with asyncio.timeout(timeout_s / len(relays)):
                    await self._with(relay_id, through, timeout_s / len(relays))
                    return self._failures.succeeded(relay_id)
            except TimeoutError:
                error: PeerError = PeerTimeout(f"not within {timeout_s / len(relays):g} s")
            except PeerError as caught:
                error = caught
            self._failures.failed(relay_id, asyncio.get_running_loop().time())
            failures.append(f"{relay_id}: {error}")
        reasons = "; ".join(failures) or "it has none"
        raise PeerUnreachable(f"no way to {peer_id} through its relays: {reasons}", peer_id=peer_id)

    async def _with(self, relay_id: str, through: Callable[[Stream], Awaitable[None]], timeout_s: float) -> None:
        stream = await self._open_relay(relay_id, timeout_s)
        try:
            await through(stream)
        except BaseException:
            await stream.close()
            raise

    def _in_order(self, relays: Sequence[str]) -> list[str]:
        """Those that worked when they were used last, the nearest first of those that we are connected to."""
        now = asyncio.get_running_loop().time()
        return sorted(relays, key=lambda it: (not self._failures.should_try(it, now), self._distance_s(it)))
