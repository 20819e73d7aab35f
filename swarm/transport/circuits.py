"""The two ends of a connection through a relay: what both do, whatever makes them sure of each other.

    dialler: Circuits.open ── OpenCircuit ─► relay ── CircuitOpened ─► Circuits.answer :target
            Connection ─TLS─ Pipe ═ CircuitBytes ═ relay ═ CircuitBytes ═ Pipe ─TLS─ Connection
                          Ends ────────── who are you? ────────────────── Ends

Each end puts TLS on a pair of sockets, so that the relay does not know what it carries, and a relayed connection is
like a direct one to all that is above.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from swarm.errors import AccessDenied, InvalidRequest, PeerBusy, PeerMisbehaved, PeerUnreachable, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import CircuitBytes, CircuitOpened, OpenCircuit
from swarm.rates import Rate, Rates
from swarm.transport.stream import EndOfStream, Stream

log = logging.getLogger(__name__)

PIECE_BYTES = 32 << 10
CALL_BACKS = Rate(burst=32, per_s=1)
"""How often one peer may have us connect to it, and how often one relay may say that somebody wants that."""
SEND_TIMEOUT_S = 30.0
"""How long the other end may leave a piece unread."""

MakeProtocol = Callable[[bytes], asyncio.Protocol]
"""Makes the protocol of a connection that we make, given the ticket for its HELLO."""


class Pipe:
    """The way through a relay as a socket: what is written to it goes into the stream of a circuit, unchanged.

    Args:
        stream: of the circuit, on which nothing but `CircuitBytes` passes once the pipe is open.
        tasks: carries them.
    """

    def __init__(self, stream: Stream, tasks: TaskSet) -> None:
        self.stream = stream
        self._tasks = tasks
        self.error: SwarmError | None = None
        """What relay or target have said in place of more bytes."""
        self._near: socket.socket | None = None
        self._pump: asyncio.Task[None] | None = None

    async def open(self) -> socket.socket:
        """Carry from now on."""
        self._near, far = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=far, limit=PIECE_BYTES)
        self._pump = self._tasks.spawn(self._carry(reader, writer), name=f"circuit through {self.stream.peer_id}")
        self._pump.add_done_callback(lambda _: writer.close())  # a task that is cancelled at once never begins
        return self._near

    async def wait_over(self) -> None:
        """Wait until either end is gone."""
        if self._pump is not None:
            await asyncio.wait([self._pump])

    def stop(self) -> None:
        """Carry no more."""
        if self._pump is not None:
            self._pump.cancel()

    def abandon(self) -> None:
        """The same where nobody has come to use the socket."""
        self.stop()
        if self._near is not None:
            self._near.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Move bytes until either end does; then end the stream."""
        ways = [asyncio.ensure_future(self._send_all(reader)), asyncio.ensure_future(self._receive_all(writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await self.stream.close()

    async def _send_all(self, reader: asyncio.StreamReader) -> None:
        with self._noting_errors():
            while data := await reader.read(PIECE_BYTES):
                await self.stream.send(CircuitBytes(), data, timeout_s=SEND_TIMEOUT_S)

    async def _receive_all(self, writer: asyncio.StreamWriter) -> None:
        with self._noting_errors(), suppress(EndOfStream):
            while isinstance((received := await self.stream.receive())[0], CircuitBytes):
                writer.write(received[1])
                await writer.drain()

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            with suppress(ConnectionError):
                yield
        except SwarmError as error:
            self.error = self.error or error


class Ends(Protocol):
    """Puts TLS on a pipe, and makes sure of who is at its other end."""

    async def dial(self, pipe: Pipe, target: str, make_protocol: MakeProtocol) -> None:
        """Be the dialler.

        Raises:
            PeerUnreachable: the way broke. PeerMisbehaved: who answers is not the target. PeerBusy: it has no room.
            AccessDenied: we are no member of this private swarm any more.
        """

    async def take(self, pipe: Pipe, dialler: str) -> None:
        """Be the target.

        Args:
            dialler: who comes, if what the relay says is right.

        Raises:
            OSError, TimeoutError, SwarmError: nobody comes.
        """


class Circuits:
    """Makes and takes connections through relays.

    Args:
        ends: secures them.
        is_relay: whether we have asked a peer to be our relay.
        dial: connects directly to a peer that asks us to.
        timeout_s: deadline of each step.
    """

    def __init__(
        self,
        ends: Ends,
        *,
        is_relay: Callable[[str], bool],
        dial: Callable[[str], Awaitable[object]],
        timeout_s: float,
    ) -> None:
        self._ends, self._is_relay, self._dial = ends, is_relay, dial
        self._timeout_s = timeout_s
        self._call_backs = Rates(CALL_BACKS)
        self._tasks = TaskSet()

    async def open(self, stream: Stream, target: str, make_protocol: MakeProtocol) -> None:
        """Connect to `target` over a stream to a relay that was opened for this.

        Args:
            stream: to the relay's service; it is used up.
            target: peer id.
            make_protocol: makes the protocol of the connection, given the ticket for its HELLO.

        Raises:
            PeerUnreachable: the target has no reservation there any more, or the way broke. PeerBusy, PeerTimeout:
            the relay, or the target. PeerMisbehaved: who answers is not the target.
        """
        await stream.send(OpenCircuit(peer_id=target, is_call_back=False), timeout_s=self._timeout_s)
        pipe = Pipe(stream, self._tasks)
        try:
            await self._ends.dial(pipe, target, make_protocol)
        except SwarmError as error:
            pipe.abandon()
            if pipe.error is None or isinstance(error, AccessDenied):
                raise
            raise pipe.error from error
        except BaseException:
            pipe.abandon()
            raise

    async def call_back(self, stream: Stream, target: str) -> None:
        """Have `target` connect to us, over a stream to a relay that was opened for this; returns when it says it has.

        Raises:
            PeerError: it could not, or will not.
        """
        await stream.send(OpenCircuit(peer_id=target, is_call_back=True), timeout_s=self._timeout_s)
        with suppress(EndOfStream):
            message, _ = await stream.receive(self._timeout_s)
            raise PeerMisbehaved(f"{type(message).__name__} in place of a connection", peer_id=target)

    async def answer(self, stream: Stream) -> None:
        """The handler of the `circuit` service; returns when the connection is over.

        Raises:
            InvalidRequest: who opens the stream is no relay of ours. PeerBusy: called back too often.
            PeerError: we can't connect to who wants to be called back.
        """
        message, _ = await stream.receive(self._timeout_s)
        if not isinstance(message, CircuitOpened):
            raise PeerMisbehaved(f"{type(message).__name__} opens no circuit", peer_id=stream.peer_id)
        if not self._is_relay(stream.peer_id):
            raise InvalidRequest("we have no reservation with this relay")
        if not message.is_call_back:
            return await self._take(stream, dialler=message.peer_id)
        now = asyncio.get_running_loop().time()
        if not all(self._call_backs.charge(key, now) for key in (stream.peer_id, message.peer_id)):
            raise PeerBusy("asked too often to connect", retry_after_s=1 / CALL_BACKS.per_s)
        try:
            await self._dial(message.peer_id)
        except SwarmError as error:
            log.debug("can't connect to %s, who wants it: %s", message.peer_id, error)
            raise PeerUnreachable("no connection to you") from None  # what our network looks like is not theirs to know

    async def close(self) -> None:
        """End what was made."""
        await self._tasks.close()

    async def _take(self, stream: Stream, *, dialler: str) -> None:
        """Be the target of a circuit, to its end."""
        pipe = Pipe(stream, self._tasks)
        try:
            await self._ends.take(pipe, dialler)
            await pipe.wait_over()
        except (OSError, TimeoutError) as error:
            log.debug("no TLS with %s through %s: %r", dialler, stream.peer_id, error)
            pipe.abandon()
        finally:
            pipe.stop()
