"""Sessions that go to another server, and those that come from one.

    HandOver ─► MoveDesk.give: greet ─► freeze, settle ─► save ─► pack ~~SessionState, StatePart...~~► the other server
                                                                       ◄~~StateTaken~~
    PushHello ─► MoveDesk.take: SessionState ─► Arrival: check, room ─► StatePart... ─► resume ─► StateTaken

The client has opened an empty session at the other server and told us its key: so only it can send a session anywhere,
and only to where it has been admitted. A session that is frozen takes no steps; if it can't be given, it thaws and goes
on. Neither side knows why a session moves.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol
from weakref import WeakValueDictionary

from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected, PeerMisbehaved, PeerTimeout
from swarm.protocol import HandOver, OpenSession, PushAccepted, SessionState, StatePart, StateTaken
from swarm.server.executor import Executor
from swarm.server.limits import HandlerLimits
from swarm.server.meters import SessionMeter
from swarm.server.pages import PAGE_SIZE
from swarm.server.push import PushStream, greet
from swarm.server.session_state import Arrival, SavedSession, pack
from swarm.transport import EndOfStream
from swarm.transport.limits import Budget

logger = logging.getLogger(__name__)

PART_BYTES = 512 << 10
"""Bytes in one StatePart."""
MAX_GIVEN = 8
"""Sessions that are given at once, half of them of one client at most: the others run until it is their turn."""
PART_TIMEOUT_S = 10.0
"""How long the next part of a session may take to come."""


class Movable(Protocol):
    """What a session lets us do."""

    @property
    def opened(self) -> OpenSession:
        """How its client has opened it."""

    @property
    def taken(self) -> StateTaken:
        """How far it is."""

    def freeze(self) -> None:
        """Take no more steps."""

    def thaw(self) -> None:
        """Take steps again, those first that came meanwhile."""

    async def settle(self) -> None:
        """Wait until all that was taken is done, and what the client is to get has been sent to it."""

    async def save(self) -> SavedSession:
        """What another server needs to go on, once the session is frozen and settled."""

    async def resume(self, saved: SavedSession) -> None:
        """Go on, before the first step, where another server was."""


class MoveDesk:
    """See the module.

    Args:
        executor: the device thread.
        limits: patience and room.
        meter: counts what moves.
        open_stream: opens a stream to a peer's `state` service, for a client that named it.
    """

    def __init__(
        self,
        executor: Executor,
        limits: HandlerLimits,
        meter: SessionMeter,
        open_stream: Callable[[str, str], Awaitable[PushStream]],
    ):
        self._executor, self._limits, self._meter, self._open_stream = executor, limits, meter, open_stream
        self._slots = asyncio.Semaphore(MAX_GIVEN)
        self._slots_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._arriving = Budget(limits.max_arriving_bytes)
        self._arriving_of: Counter[str] = Counter()
        """Bytes of each client's sessions."""
        self._promised_pages = 0
        """Of sessions that come, or have come lately and not run yet: they have no pages of the cache until they do."""

    async def give(self, session: Movable, message: HandOver, client: str) -> None:
        """Give a session to the one that its client has opened elsewhere; it is frozen when this returns.

        Raises:
            SwarmError: why it could not be given.
        """
        timeout_s = self._limits.move_timeout_s
        own_slots = self._slots_of.setdefault(client, asyncio.Semaphore(MAX_GIVEN // 2))
        try:
            async with own_slots, self._slots, asyncio.timeout(timeout_s):
                stream = await greet(
                    lambda peer_id: self._open_stream(peer_id, client),
                    message.peer_id,
                    message.push_key,
                    timeout_s=self._limits.push_open_timeout_s,
                )
                async with stream:
                    await self._send(session, stream)
        except TimeoutError:
            raise PeerTimeout(f"the session could not be given within {timeout_s:g} s") from None
        except EndOfStream:
            raise PeerDisconnected("the other server did not take the session") from None

    async def _send(self, session: Movable, stream: PushStream) -> None:
        session.freeze()
        frozen_at = time.monotonic()
        await session.settle()
        layout = await self._executor.layout(session.opened.blocks)
        state, body = await asyncio.to_thread(pack, await session.save(), session.opened, layout)
        await stream.send(state)
        view = memoryview(body)
        for start in range(0, len(body), PART_BYTES):
            await stream.send(StatePart(offset=start), view[start : start + PART_BYTES])
        answer, _ = await stream.receive()
        if not isinstance(answer, StateTaken):
            raise PeerMisbehaved(f"expected StateTaken, got {type(answer).__name__}", peer_id=stream.peer_id)
        self._meter.given(len(body))
        logger.info("gave a session of %d tokens, %d bytes, to %s in %.3f s",
                    sum(state.lengths), len(body), stream.peer_id, time.monotonic() - frozen_at)  # fmt: skip

    async def take(self, session: Movable, stream: PushStream, client: str) -> int:
        """Let another server fill a client's session that is still empty; it is as it was if that fails.

        Returns:
            The pages that it was promised, until `release`.

        Raises:
            SwarmError: why it has failed; the other server is told so.
        """
        timeout_s = self._limits.move_timeout_s
        session.freeze()
        try:
            async with asyncio.timeout(timeout_s):
                await stream.send(PushAccepted())
                return await self._receive(session, stream, client)
        except TimeoutError:
            raise PeerTimeout(f"the session did not come within {timeout_s:g} s") from None
        except EndOfStream:
            raise PeerDisconnected("the other server gave up") from None
        finally:
            session.thaw()

    def release(self, num_pages: int) -> None:
        """A session has taken the pages that it was promised, or needs none any more."""
        self._promised_pages -= num_pages

    async def _receive(self, session: Movable, stream: PushStream, client: str) -> int:
        state, _ = await stream.receive(PART_TIMEOUT_S)
        if not isinstance(state, SessionState):
            raise InvalidRequest(f"expected SessionState, got {type(state).__name__}")
        layout = await self._executor.layout(session.opened.blocks)
        arrival = Arrival(state, session.opened, layout, self._executor.span.hidden_size)
        num_pages = state.num_pages + len(state.lengths)
        self._check_room(num_pages, arrival.num_bytes, client)
        self._promised_pages += num_pages
        self._arriving.used += arrival.num_bytes
        self._arriving_of[client] += arrival.num_bytes
        try:
            await self._receive_parts(session, stream, arrival)
        except BaseException:
            self.release(num_pages)
            raise
        finally:
            self._arriving.used -= arrival.num_bytes
            self._arriving_of[client] -= arrival.num_bytes
            self._arriving_of += Counter()  # forgets those that have none
        self._meter.took(arrival.num_bytes)
        return num_pages

    async def _receive_parts(self, session: Movable, stream: PushStream, arrival: Arrival) -> None:
        arrival.allocate()
        while not arrival.is_whole:
            part, body = await stream.receive(PART_TIMEOUT_S)
            if not isinstance(part, StatePart):
                raise InvalidRequest(f"expected StatePart, got {type(part).__name__}")
            arrival.take(part, body)
        await session.resume(await asyncio.to_thread(arrival.finish))
        await stream.send(session.taken)

    def _check_room(self, num_pages: int, num_bytes: int, client: str) -> None:
        """Refuse what there is no room for now: whoever is here already is not to suffer.

        Raises:
            PeerBusy: with what is needed and what is free.
        """
        free = self._executor.free_tokens // PAGE_SIZE - self._promised_pages
        if num_pages > free:
            raise PeerBusy(f"the session needs {num_pages} pages, {free} are free", retry_after_s=10.0)
        share = int(self._limits.max_peer_share * self._arriving.limit)
        room = min(self._arriving.limit - self._arriving.used, share - self._arriving_of[client])
        if num_bytes > room:
            raise PeerBusy(f"the session has {num_bytes} bytes, there is room for {room}", retry_after_s=5.0)
