"""A message stream from a server to itself, for a route that passes the same server twice: nothing touches the network.

    LocalStream.pair(peer_id) ─► (near, far)       near.send ──► far.receive, and the other way round

It does what `swarm.transport.Stream` does, as far as push streams need it.
"""

import asyncio
from collections import deque
from typing import Self

from swarm.errors import InvalidRequest, PeerTimeout, SwarmError
from swarm.protocol import Message
from swarm.transport import EndOfStream

WINDOW_BYTES = 4 << 20
"""A sender waits while more than this has not been received."""


class LocalStream:
    """One end. Made with `pair`."""

    rtt_s: float | None = 0.0

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self._other: LocalStream
        self._inbox: deque[tuple[Message, bytes | bytearray | memoryview]] = deque()
        self._inbox_bytes = 0
        self._failure: SwarmError | None = None
        self._is_closed = False
        self._changed = asyncio.Event()
        """Something came, was taken, or ended."""

    @classmethod
    def pair(cls, peer_id: str) -> tuple["LocalStream", "LocalStream"]:
        """Two ends of one stream of a peer to itself."""
        near, far = cls(peer_id), cls(peer_id)
        near._other, far._other = far, near
        return near, far

    def send_now(self, message: Message, body: bytes | bytearray | memoryview = b"") -> bool:
        """Send if there is room; see `Stream.send_now`."""
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise InvalidRequest("send on a stream that this side has closed")
        other = self._other
        if other._inbox_bytes > WINDOW_BYTES:
            return False
        if not other._is_closed:
            other._inbox.append((message, body))
            other._inbox_bytes += len(body)
            other._changed.set()
        return True

    async def send(
        self, message: Message, body: bytes | bytearray | memoryview = b"", *, timeout_s: float | None = None
    ) -> None:
        """Send, waiting for room; see `Stream.send`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.send_now(message, body):
                    await self._wait()
        except TimeoutError:
            error = PeerTimeout(f"{self.peer_id} made no room within {timeout_s} s", peer_id=self.peer_id)
            await self.abort(error)
            raise error from None

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview]:
        """The next message; see `Stream.receive`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._inbox:
                    if self._failure is not None:
                        raise self._failure
                    if self._is_closed or self._other._is_closed:
                        raise EndOfStream
                    await self._wait()
        except TimeoutError:
            raise PeerTimeout(f"nothing from {self.peer_id} within {timeout_s} s", peer_id=self.peer_id) from None
        message, body = self._inbox.popleft()
        self._inbox_bytes -= len(body)
        self._other._changed.set()
        return message, memoryview(body)

    async def close(self) -> None:
        """Finish our side, and drop what has come."""
        self._is_closed = True
        self._inbox.clear()
        self._inbox_bytes = 0
        for end in (self, self._other):
            end._changed.set()

    async def abort(self, error: SwarmError) -> None:
        """End both sides with this error."""
        if self._failure is None and not self._is_closed:
            for end in (self, self._other):
                end._failure = end._failure or error
            await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SwarmError):
            await self.abort(error)
        else:
            await self.close()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()
