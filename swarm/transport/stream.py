"""A stream of messages to one peer: what services and clients see of the transport.

caller --send--> Stream --> Connection --> Mux ~~> Mux --> Connection --on_message--> Stream --receive--> caller
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Self

from swarm.errors import InvalidRequest, PeerDisconnected, PeerMisbehaved, PeerTimeout, SwarmError
from swarm.protocol import Message, decode, encode

if TYPE_CHECKING:
    from swarm.transport.connection import Connection


class EndOfStream(Exception):
    """The peer has finished its side of the stream, in order: nothing more will come."""


class Stream:
    """Messages in both directions, in order. Not to be made directly: see `Transport.open` and `Transport.serve`.

    One task may send while another receives; several senders take turns.
    """

    def __init__(self, connection: "Connection", stream_id: int, service: str) -> None:
        self.service = service
        self._connection = connection
        self._id = stream_id
        self._inbox: deque[tuple[bytes, bytearray, int]] = deque()
        self._failure: SwarmError | None = None
        self._is_finished = False  # by the peer
        self._is_closed = False  # by us
        self._reader: asyncio.Future[None] | None = None
        self._sender: asyncio.Future[None] | None = None
        self._send_lock = asyncio.Lock()
        self._num_sending = 0

    @property
    def peer_id(self) -> str:
        """The authenticated peer at the other end."""
        return self._connection.peer_id

    @property
    def account(self) -> str:
        """Who is charged for what the peer does: itself, or in a private swarm the member whose process it is."""
        return self._connection.account

    @property
    def carrier(self) -> str:
        """ "direct", "relay" or "p2p"."""
        return self._connection.carrier

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip to the peer in seconds, None before the first."""
        return self._connection.rtt_s

    @property
    def is_over(self) -> bool:
        """Whether the peer has finished or the stream has failed; messages that came before may still wait."""
        return self._is_finished or self._is_closed or self._failure is not None

    async def send(
        self, message: Message, body: bytes | bytearray | memoryview = b"", *, timeout_s: float | None = None
    ) -> None:
        """Send a message with its tensors behind it; waits while the peer does not keep up.

        Raises:
            InvalidRequest: when the message is too large, or the stream is closed on our side.
            PeerTimeout: when the peer made no room within `timeout_s` seconds; the stream is then aborted.
            PeerError, RequestError: why the stream has failed.
        """
        meta, view = encode(message), _view(body)
        if self._sent_now(meta, view):
            return
        self._num_sending += 1
        try:
            async with asyncio.timeout(timeout_s), self._send_lock:
                await self._send_slowly(meta, view)
        except TimeoutError:
            error = PeerTimeout(f"{self.peer_id} made no room within {timeout_s} s", peer_id=self.peer_id)
            await self.abort(error)
            raise error from None
        finally:
            self._num_sending -= 1

    def send_now(self, message: Message, body: bytes | bytearray | memoryview = b"") -> bool:
        """Send a message if there is room for it at once; False, and nothing is sent, where `send` would wait.

        Raises:
            InvalidRequest: when the message is too large, or the stream is closed on our side.
            PeerError, RequestError: why the stream has failed.
        """
        return self._sent_now(encode(message), _view(body))

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview]:
        """The next message and its body, which the caller may keep and change.

        Raises:
            EndOfStream: when the peer has finished.
            PeerTimeout: when nothing came within `timeout_s` seconds; the stream stays usable.
            PeerError, RequestError: why the stream has failed, or what the peer refused us with.
        """
        while not self._inbox:
            if self._failure is not None:
                raise self._failure
            if self._is_finished or self._is_closed:
                raise EndOfStream
            await self._wait_for_message(timeout_s)
        meta, body, cost = self._inbox.popleft()
        self._connection.consume(self._id, cost)
        try:
            return decode(meta), memoryview(body)
        except PeerMisbehaved as cause:
            error = PeerMisbehaved(f"{self.peer_id}: {cause}", peer_id=self.peer_id)
            await self.abort(error)
            raise error from cause

    async def close(self) -> None:
        """Finish our side. Whatever the peer still sends is dropped."""
        if not self._is_closed:
            self._is_closed = True
            self._inbox.clear()
            self._connection.finish(self._id)
            self._wake()

    async def abort(self, error: SwarmError) -> None:
        """End the stream in both directions; the peer gets `error`, as does every later call here."""
        if self._failure is None and not self._is_closed:
            self._connection.fail(self._id, error)
            self._is_closed = True
            self.on_failure(error)
            self._inbox.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SwarmError):
            await self.abort(error)
        else:
            await self.close()

    def __repr__(self) -> str:
        state = "failed" if self._failure else "closed" if self._is_closed else "open"
        return f"<Stream {self.service} {self.carrier} {self.peer_id[-8:]} | {state} | {len(self._inbox)} waiting>"

    def open_back(self, service: str) -> "Stream":
        """Open a stream to a service of the same peer, over the same connection.

        Raises:
            PeerDisconnected: when the connection is over.
        """
        return self._connection.open_stream(service)

    @property
    def remote_host(self) -> str | None:
        """The IP address that the peer's packets come from; None where something carries them that doesn't say."""
        return self._connection.remote_host

    # --- called by the connection ---

    def on_message(self, meta: bytes, body: bytearray, cost: int) -> None:
        """A whole message has come."""
        self._inbox.append((meta, body, cost))
        if (reader := self._reader) is not None and not reader.done():
            reader.set_result(None)

    def on_finish(self) -> None:
        """The peer sends no more."""
        self._is_finished = True
        self._wake()

    def on_credit(self) -> None:
        """A sender may look again whether there is room."""
        if (sender := self._sender) is not None and not sender.done():
            sender.set_result(None)

    def on_failure(self, error: SwarmError, *, drop_inbox: bool = False) -> None:
        """The stream or its connection is over. What has come before can still be received, unless dropped."""
        if drop_inbox:
            self._inbox.clear()
        if self._failure is None:
            self._failure = error
        self._wake()

    # --- waiting ---

    def _wake(self) -> None:
        for waiter in (self._reader, self._sender):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def _wait_for_message(self, timeout_s: float | None) -> None:
        if self._reader is not None:
            raise InvalidRequest("another task is receiving on this stream")
        loop = asyncio.get_running_loop()
        reader = self._reader = loop.create_future()
        timer = loop.call_later(timeout_s, _expire, reader) if timeout_s is not None else None
        try:
            await reader
        except TimeoutError:
            raise PeerTimeout(f"nothing from {self.peer_id} within {timeout_s} s", peer_id=self.peer_id) from None
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()

    def _sent_now(self, meta: bytes, body: bytes | memoryview) -> bool:
        self._raise_if_over()
        return not self._num_sending and self._connection.send_now(self._id, meta, body)

    async def _send_slowly(self, meta: bytes, body: bytes | memoryview) -> None:
        """Wait for credit and for the carrier, then send piece by piece."""
        while not self._connection.may_send(self._id):
            self._raise_if_over()
            self._sender = asyncio.get_running_loop().create_future()
            await self._sender
        self._connection.start_message(self._id, meta, body)
        try:
            for piece in self._connection.pieces(self._id, meta, body):
                await self._connection.wait_turn()
                try:
                    self._raise_if_over()
                    self._connection.write(*piece)
                finally:
                    self._connection.end_turn()
        except BaseException:
            await self.abort(PeerDisconnected("gave up in the middle of a message"))
            raise

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise InvalidRequest("send on a stream that this side has closed")


def _view(body: bytes | bytearray | memoryview) -> bytes | memoryview:
    return body if isinstance(body, bytes) else memoryview(body).cast("B")


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
