"""Ways to a peer that nobody can connect to: it connects to us, if we can be reached, or a relay carries it all.

Transport ─dial─► Detours ─► relays, those that work first ─► Circuits: one end of a circuit
                                                       or ─► call_back: the peer connects to us directly
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.errors import AccessDenied, PeerBusy, PeerTimeout, PeerUnreachable, RelaysBusy, SwarmError
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
    ) -> str:
        """Connect to a peer through one of its relays; `make_protocol` is told the ticket for HELLO.

        Returns:
            The relay.

        Raises:
            PeerUnreachable: none of them knows it. PeerTimeout: one took too long. RelaysBusy: one has no room, and no
            other one does it. AccessDenied: we are no member of this private swarm any more.
        """

        async def through(stream: Stream) -> None:
            try:
                await self._circuits.open(stream, peer_id, make_protocol)
            except BaseException:
                await stream.close()
                raise

        return await self._through_any(peer_id, relays, through, timeout_s)

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
    ) -> str:
        """Do it with the first relay that works, which is returned; each may take its share of the time."""
        failures: dict[str, SwarmError] = {}
        for relay_id in self._in_order(relays):
            share_s = timeout_s / len(relays)
            try:
                async with asyncio.timeout(share_s):
                    await through(await self._reached(relay_id, share_s))
                    self._failures.succeeded(relay_id)
                    return relay_id
            except TimeoutError:
                self._failures.failed(relay_id, self._now)
                failures[relay_id] = PeerTimeout(f"not within {share_s:g} s")
            except AccessDenied:
                raise
            except SwarmError as error:  # whatever one says, others may do better
                failures[relay_id] = error
        reasons = "; ".join(f"{relay_id}: {error}" for relay_id, error in failures.items()) or "it has none"
        text = f"no way to {peer_id} through its relays: {reasons}"
        busy = [error.retry_after_s for error in failures.values() if isinstance(error, PeerBusy)]
        if busy:
            raise RelaysBusy(text, peer_id=peer_id, retry_after_s=min(busy))  # even if one says so of the peer
        if any(isinstance(error, PeerTimeout) for error in failures.values()):
            raise PeerTimeout(text, peer_id=peer_id)  # it may be there
        raise PeerUnreachable(text, peer_id=peer_id)

    async def _reached(self, relay_id: str, timeout_s: float) -> Stream:
        """A stream to a relay, which is blamed if that fails."""
        try:
            return await self._open_relay(relay_id, timeout_s)
        except SwarmError:
            self._failures.failed(relay_id, self._now)
            raise

    def _in_order(self, relays: Sequence[str]) -> list[str]:
        """Those that worked when they were used last, the nearest first of those that we are connected to."""
        return sorted(relays, key=lambda it: (not self._failures.should_try(it, self._now), self._distance_s(it)))

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()
