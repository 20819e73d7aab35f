"""The neighbours of a training run in its chain: outputs go to the server after it, gradients to the one before it.

    client ─TrainLink─► open ─► stream to the next server      TrainForward ──► next     next ──TrainBackward──► take
                                stream of the one before ◄─ receive_pushes      before ──TrainForward──► take

A link that could not be opened, or broke, is told to the client by the server that opened it (`on_fault`); nothing is
sent again here. Forwards are read when there is room for them, backwards at once: they free more than they take, so no
two servers can wait for each other.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from swarm.errors import InvalidRequest, PeerDisconnected, SwarmError
from swarm.protocol import Message, PushAccepted, TrainBackward, TrainForward, TrainLink
from swarm.server.push import PushStream, for_the_client, greet
from swarm.transport import EndOfStream

MESSAGE_BYTES = 256
"""What a message without a body counts."""


class Outbox:
    """What is on its way to one peer, in order.

    Args:
        stream: to that peer.
        timeout_s: how long the peer may make no room.
        on_sent: called after each message.
    """

    def __init__(self, stream: PushStream, *, timeout_s: float, on_sent: Callable[[], None] = lambda: None):
        self.num_bytes = 0
        """Of messages that were not sent yet."""
        self._stream, self._timeout_s, self._on_sent = stream, timeout_s, on_sent
        self._messages: deque[tuple[Message, bytes | memoryview]] = deque()
        self._wake = asyncio.Event()

    def post(self, message: Message, body: bytes | memoryview = b"") -> None:
        """Send as soon as there is room."""
        self._messages.append((message, body))
        self.num_bytes += len(body) + MESSAGE_BYTES
        self._wake.set()

    async def run(self) -> None:
        """Send what is posted, until the stream fails.

        Raises:
            SwarmError: why it has.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._messages:
                message, body = self._messages.popleft()
                await self._stream.send(message, body, timeout_s=self._timeout_s)
                self.num_bytes -= len(body) + MESSAGE_BYTES
                self._on_sent()


class TrainingLinks:
    """See the module.

    Args:
        open_push: opens a stream to a peer's push service.
        take_forward, take_backward: take a micro-batch from a neighbour; a SwarmError ends the link.
        on_fault: told when the link to the next server is not there, or not any more, and why.
        on_sent: called when there is more room: after each message that was sent, and when a link has ended.
        open_timeout_s, send_timeout_s: patience.
    """

    def __init__(
        self,
        open_push: Callable[[str], Awaitable[PushStream]],
        *,
        take_forward: Callable[[TrainForward, memoryview], Awaitable[None]],
        take_backward: Callable[[TrainBackward, memoryview], None],
        on_fault: Callable[[str], None],
        on_sent: Callable[[], None],
        open_timeout_s: float,
        send_timeout_s: float,
    ):
        self.next: Outbox | None = None
        """To the server after this one, if there is a link to it."""
        self.previous: Outbox | None = None
        """To the server before this one, if it has a link to us."""
        self._open_push, self._take_forward, self._take_backward = open_push, take_forward, take_backward
        self._on_fault, self._on_sent = on_fault, on_sent
        self._open_timeout_s, self._send_timeout_s = open_timeout_s, send_timeout_s
        self._opening: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """Of what waits to be sent."""
        return sum(box.num_bytes for box in (self.next, self.previous) if box is not None)

    def open(self, message: TrainLink, on_open: Callable[[], None]) -> None:
        """Link to the next server.

        Args:
            message: where it is.
            on_open: called when the link is there.

        Raises:
            InvalidRequest: there was one before.
        """
        if self._opening is not None:
            raise InvalidRequest("a second TrainLink: a run has one next server")
        self._opening = asyncio.create_task(self._keep_open(message, on_open), name="link to the next server")

    async def receive_pushes(self, stream: PushStream) -> None:
        """Serve the link of the server before, until it ends or the run does.

        Raises:
            SwarmError: what was wrong with it.
        """
        if self._over.is_set():
            raise PeerDisconnected("the training run has ended")
        if self.previous is not None:
            raise InvalidRequest("another server sends to this training run")
        self.previous = self._outbox(stream)
        try:
            await stream.send(PushAccepted(), timeout_s=self._send_timeout_s)
            await self._exchange(self.previous, self._read_forwards(stream))
        finally:
            self.previous = None
            self._on_sent()  # what was on its way takes no room any more

    async def close(self) -> None:
        """End both links."""
        self._over.set()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)

    def _outbox(self, stream: PushStream) -> Outbox:
        return Outbox(stream, timeout_s=self._send_timeout_s, on_sent=self._on_sent)

    async def _keep_open(self, message: TrainLink, on_open: Callable[[], None]) -> None:
        try:
            async with await greet(
                self._open_push, message.peer_id, message.push_key, timeout_s=self._open_timeout_s
            ) as stream:
                self.next = self._outbox(stream)
                on_open()
                await self._exchange(self.next, self._read_backwards(stream))
        except (SwarmError, EndOfStream) as error:
            self.next = None
            self._on_fault(for_the_client(error))
        finally:
            self.next = None
            self._on_sent()

    async def _exchange(self, outbox: Outbox, reading: Awaitable[None]) -> None:
        """Read and write until one of them fails, or the run is over."""
        tasks = [asyncio.ensure_future(it) for it in (reading, outbox.run(), self._over.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_forwards(self, stream: PushStream) -> None:
        while True:
            message, body = await stream.receive()
            if not isinstance(message, TrainForward):
                raise InvalidRequest(f"expected TrainForward, got {type(message).__name__}")
            await self._take_forward(message, body)

    async def _read_backwards(self, stream: PushStream) -> None:
        while True:
            message, body = await stream.receive()
            if not isinstance(message, TrainBackward):
                raise InvalidRequest(f"expected TrainBackward, got {type(message).__name__}")
            self._take_backward(message, body)
