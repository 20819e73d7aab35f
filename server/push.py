"""Push streams: one server sends straight into a session, or a training run, on the next one.

    Sender ──open(peer)──► transport ~~PushHello(key)~~► PushDesk.serve ─► wait for the session of that key
                                     ◄~~PushAccepted~~                     ─► PushTarget.receive_pushes(stream)

Whoever knows the key of a session or run, which its client chose, may push into it. A stream may come before its
session does.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol, Self, runtime_checkable

from swarm.errors import (
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    SwarmError,
)
from swarm.network.tasks import TaskSet
from swarm.protocol import PUSH_SERVICE, STATE_SERVICE, Message, PushAccepted, PushHello
from swarm.rates import Rate, Rates
from swarm.server.limits import HandlerLimits
from swarm.server.loopback import LocalStream
from swarm.transport import EndOfStream, Transport


class PushStream(Protocol):
    """What both kinds of streams have, those to peers and those to ourselves."""

    @property
    def peer_id(self) -> str:
        """The peer at the other end."""

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip to it."""

    def send_now(self, message: Message, body: bytes | bytearray | memoryview = b"") -> bool:
        """Send if there is room at once."""

    async def send(
        self, message: Message, body: bytes | bytearray | memoryview = b"", *, timeout_s: float | None = None
    ) -> None:
        """Send, waiting for room."""

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview]:
        """The next message."""

    async def close(self) -> None:
        """Finish our side."""

    async def abort(self, error: SwarmError) -> None:
        """End both sides."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...


class PushTarget(Protocol):
    """A session, or a training run, that others push into."""

    async def receive_pushes(self, stream: PushStream) -> None:
        """Take what comes on this stream until it ends."""


@runtime_checkable
class StateTarget(Protocol):
    """A session that may become another one."""

    async def receive_state(self, stream: PushStream) -> None:
        """Become the session whose state comes on this stream."""


async def greet(
    open_stream: Callable[[str], Awaitable[PushStream]], peer_id: str, push_key: bytes, *, timeout_s: float
) -> PushStream:
    """A push stream to whoever has this key at a peer, accepted.

    Raises:
        SwarmError: why there is none.
    """
    try:
        async with asyncio.timeout(timeout_s):
            stream = await open_stream(peer_id)
            try:
                await stream.send(PushHello(push_key=push_key))
                answer, _ = await stream.receive()
                if not isinstance(answer, PushAccepted):
                    raise PeerMisbehaved(f"expected PushAccepted, got {type(answer).__name__}")
            except BaseException:
                await stream.close()
                raise
            return stream
    except TimeoutError:
        raise PeerTimeout(f"{peer_id} accepted no push stream within {timeout_s:g} s") from None
    except EndOfStream:
        raise PeerDisconnected(f"{peer_id} ended the push stream") from None


def for_the_client(error: SwarmError | EndOfStream) -> str:
    """Why there is no stream. Not what is at which address: the client has chosen the peer, and may not be one."""
    if isinstance(error, PeerUnreachable | PeerTimeout):
        return "the next server can't be reached"
    return (str(error) or "the next server ended the stream")[:1024]


class PushDesk:
    """Knows the sessions and training runs of this server by their keys, and opens streams to those of others.

    Args:
        transport: how to reach other servers.
        limits: how long to wait, and for how many.
    """

    def __init__(self, transport: Transport, limits: HandlerLimits):
        self._transport, self._limits = transport, limits
        self._targets: dict[bytes, PushTarget] = {}
        self._awaited: dict[bytes, set[asyncio.Event]] = {}
        self._num_early: Counter[str] = Counter()
        self._opens = Rates(Rate(burst=limits.max_forwards, per_s=limits.forwards_per_s))
        """Streams that each client had us open."""
        self._tasks = TaskSet()

    def check(self, push_key: bytes) -> None:
        """Whether a new session may have this key.

        Raises:
            InvalidRequest: another has it.
        """
        if push_key in self._targets:
            raise InvalidRequest("push_key is in use: choose one at random for each session")

    def add(self, push_key: bytes, target: PushTarget) -> None:
        """A session is ready for pushes; its key was checked."""
        self._targets[push_key] = target
        for awaited in self._awaited.get(push_key, ()):
            awaited.set()

    def remove(self, push_key: bytes) -> None:
        """The session is over."""
        self._targets.pop(push_key, None)

    async def serve(self, stream: PushStream) -> None:
        """The push service: hand the stream to the session that it names."""
        await (await self._target(stream)).receive_pushes(stream)

    async def serve_state(self, stream: PushStream) -> None:
        """The state service: hand the stream to the session that it names, which is to become another one."""
        target = await self._target(stream)
        if not isinstance(target, StateTarget):
            raise InvalidRequest("that is no session: it can't become another one")
        await target.receive_state(stream)

    async def _target(self, stream: PushStream) -> PushTarget:
        hello, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(hello, PushHello):
            raise InvalidRequest(f"expected PushHello, got {type(hello).__name__}")
        return self._targets.get(hello.push_key) or await self._wait_for(hello.push_key, stream.peer_id)

    async def open(self, peer_id: str, *, client: str) -> PushStream:
        """A stream to the push service of a peer, which may be ourselves, for a client that named it.

        Raises:
            PeerBusy: this client has made us open too many.
            PeerError: it can't be reached.
        """
        self.charge(client)
        if peer_id != self._transport.node.peer_id:
            return await self._transport.open(peer_id, PUSH_SERVICE, timeout_s=self._limits.push_open_timeout_s)
        near, far = LocalStream.pair(peer_id)
        self._tasks.spawn(self._serve_local(far), name="push to ourselves")
        return near

    async def open_state(self, peer_id: str, client: str) -> PushStream:
        """A stream to the state service of another peer, for a client that named it.

        Raises:
            as `open`, and where it is ourselves.
        """
        self.charge(client)
        if peer_id == self._transport.node.peer_id:
            raise InvalidRequest("that is this server itself")
        return await self._transport.open(peer_id, STATE_SERVICE, timeout_s=self._limits.push_open_timeout_s)

    async def close(self) -> None:
        """End the streams to ourselves; the transport ends all others."""
        await self._tasks.close()

    def charge(self, client: str) -> None:
        """Count a stream that a client makes us open: whom we call is the client's choice, so how often is bounded.

        Raises:
            PeerBusy: there were too many lately.
        """
        if not self._opens.charge(client, time.monotonic()):
            limit = self._limits.max_forwards
            raise PeerBusy(f"you had this server open {limit} push streams lately: too many Forwards")

    async def _wait_for(self, push_key: bytes, peer_id: str) -> PushTarget:
        """A session that isn't there yet.

        Raises:
            InvalidRequest: it did not come.
            PeerBusy: this peer waits for too many.
        """
        if self._num_early[peer_id] >= self._limits.max_early_pushes:
            raise PeerBusy(f"{self._num_early[peer_id]} push streams of yours wait for sessions that are not there")
        self._num_early[peer_id] += 1
        awaited = asyncio.Event()
        self._awaited.setdefault(push_key, set()).add(awaited)
        try:
            async with asyncio.timeout(self._limits.early_push_timeout_s):
                await awaited.wait()
            return self._targets[push_key]
        except (TimeoutError, KeyError):
            raise InvalidRequest("no session has this push_key") from None
        finally:
            self._awaited[push_key].discard(awaited)
            if not self._awaited[push_key]:
                del self._awaited[push_key]
            self._num_early[peer_id] -= 1
            if not self._num_early[peer_id]:
                del self._num_early[peer_id]

    async def _serve_local(self, stream: LocalStream) -> None:
        try:
            async with stream:
                await self.serve(stream)
        except (SwarmError, EndOfStream):
            return  # the other end has been told
