"""The client's stream to one hop of a route: opens the session there, sends without waiting, reports what comes.

    post(message) ─► at once, or ─► outbox ─► writer task ─► Stream ~~► server
    Listener ◄─ opened, message, failure ─── reader task ◄── Stream ◄~~ server

Whatever is posted goes out in order. The outbox has no limit of its own: it holds parts of the history, which the
client keeps anyway. What comes in is handed over at once, so nothing piles up here. Knows nothing of steps.
"""

import asyncio
import os
from collections import deque
from typing import Protocol

from swarm.errors import PeerDisconnected, PeerMisbehaved, PeerTimeout, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import SESSION_SERVICE, Message, OpenSession, Probe, SessionOpened
from swarm.transport import EndOfStream, Stream, Transport
from swarm.types import Hop


class Listener(Protocol):
    """Who is told of what happens to a hop, on the loop, one call at a time."""

    def on_opened(self, hop: "HopStream", message: SessionOpened) -> None:
        """The session is open at this hop."""

    def on_message(self, hop: "HopStream", message: Message, body: memoryview) -> None:
        """A message came. A SwarmError that this raises is the hop's failure."""

    def on_failure(self, hop: "HopStream", error: SwarmError) -> None:
        """The hop is lost; nothing more will be reported of it."""


class HopStream:
    """The stream of one link of a session.

    Args:
        link: number of the link in the session machine.
        hop: which server, which blocks.
        listener: is told what happens.
        tasks: own the reader and the writer.
    """

    def __init__(self, link: int, hop: Hop, *, listener: Listener, tasks: TaskSet):
        self.link, self.hop = link, hop
        self.push_key = os.urandom(16)
        """The right to push into this session at this server."""
        self.is_open = False
        self.forward: tuple[int, int | None] = (-1, None)
        """Epoch and target link of the last Forward."""
        self.probe_sent_at: float | None = None
        """When a Probe was sent that is not answered yet."""
        self.loaded_bytes = 0
        """Of the session's adapters, as far as the server has said."""
        self.doubts: list[tuple[int, int]] = []
        """Links, and their epochs, that say they can't reach this hop; to be judged when it has answered a Probe."""
        self.move: asyncio.Task[None] | None = None
        """Takes this hop to another server; ends with it."""
        self._listener, self._tasks = listener, tasks
        self._stream: Stream | None = None
        self._outbox: deque[tuple[Message, bytes | memoryview]] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._is_closed = False

    def open(self, transport: Transport, request: OpenSession, *, timeout_s: float) -> None:
        """Begin to open the stream and the session; `on_opened` or `on_failure` follows within `timeout_s`."""
        self._reader = self._tasks.spawn(self._run(transport, request, timeout_s), name=f"hop {self.hop.peer_id}")

    @property
    def is_sending(self) -> bool:
        """Whether something that was posted is not on its way yet."""
        return self._writer is not None

    def post(self, message: Message, body: bytes | memoryview = b"") -> None:
        """Send a message, now or when there is room for it. If that fails, `on_failure` follows."""
        if self._is_closed or self._stream is None:
            return
        try:
            if self._writer is None and self._stream.send_now(message, body):
                return
        except SwarmError:
            return  # the reader says so, too
        self._outbox.append((message, body))
        if self._writer is None:
            self._writer = self._tasks.spawn(self._write(self._stream), name=f"writer to {self.hop.peer_id}")

    def probe(self, now: float, nonce: int) -> None:
        """Ask the server how far it is, unless it has been asked and is silent."""
        if self.is_open and self.probe_sent_at is None:
            self.probe_sent_at = now
            self.post(Probe(nonce=nonce))

    def report_to(self, listener: Listener) -> None:
        """Tell another listener from now on."""
        self._listener = listener

    def close(self) -> None:
        """End the stream without waiting for anybody; nothing more is reported."""
        if not self._is_closed:
            self._is_closed = True
            for task in (self._writer, self._reader, self.move):
                if task is not None and task is not asyncio.current_task():
                    task.cancel()

    # -- tasks --------------------------------------------------------------------------------------------------

    async def _run(self, transport: Transport, request: OpenSession, timeout_s: float) -> None:
        try:
            await self._read(transport, request, timeout_s)
        except EndOfStream:
            self._fail(PeerDisconnected("the server ended the session", peer_id=self.hop.peer_id))
        except SwarmError as error:
            self._fail(error)
        finally:
            if self._writer is not None:
                self._writer.cancel()
            if self._stream is not None:
                await self._stream.close()

    async def _read(self, transport: Transport, request: OpenSession, timeout_s: float) -> None:
        opened = await self._open(transport, request, timeout_s)
        self.is_open = True
        self._listener.on_opened(self, opened)
        stream = self._stream
        assert stream is not None
        while not self._is_closed:
            message, body = await stream.receive()
            self._listener.on_message(self, message, body)

    async def _open(self, transport: Transport, request: OpenSession, timeout_s: float) -> SessionOpened:
        peer_id = self.hop.peer_id
        try:
            async with asyncio.timeout(timeout_s):
                self._stream = stream = await transport.open(peer_id, SESSION_SERVICE, timeout_s=timeout_s)
                await stream.send(request)
                message, _ = await stream.receive()
        except TimeoutError:
            raise PeerTimeout(f"no session within {timeout_s:g} s", peer_id=peer_id) from None
        if not isinstance(message, SessionOpened):
            raise PeerMisbehaved(f"expected SessionOpened, got {type(message).__name__}", peer_id=peer_id)
        return message

    async def _write(self, stream: Stream) -> None:
        try:
            while self._outbox:
                message, body = self._outbox.popleft()
                await stream.send(message, body)
        except SwarmError as error:
            self._fail(error)
        finally:
            self._writer = None

    def _fail(self, error: SwarmError) -> None:
        if not self._is_closed:
            self.close()
            self._listener.on_failure(self, error)
