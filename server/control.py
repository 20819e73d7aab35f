"""Short messages to a session's client, sent in order and without making anybody wait.

tell ──► the stream, at once            or, while the stream is full ──► queue ──run──► the stream
"""

import asyncio
from collections import deque
from collections.abc import Callable

from swarm.errors import PeerTimeout, SwarmError
from swarm.protocol import Message
from swarm.server.push import PushStream

MAX_WAITING = 64
"""A client that leaves more messages than this unread is given up."""


class Control:
    """Control messages of one session.

    Args:
        stream: the session stream.
        timeout_s: how long the client may make no room.
        on_lost: called when the client can't be told.
        on_tell: called with every message.
    """

    def __init__(
        self,
        stream: PushStream,
        *,
        timeout_s: float,
        on_lost: Callable[[SwarmError], None],
        on_tell: Callable[[Message], None],
    ):
        self._stream, self._timeout_s, self._on_lost, self._on_tell = stream, timeout_s, on_lost, on_tell
        self._waiting: deque[Message] = deque()
        self._wake = asyncio.Event()

    def tell(self, message: Message) -> None:
        """Send a message now or as soon as there is room."""
        self._on_tell(message)
        try:
            if not self._waiting and self._stream.send_now(message):
                return
        except SwarmError as error:
            return self._on_lost(error)
        if len(self._waiting) >= MAX_WAITING:
            return self._on_lost(PeerTimeout(f"{MAX_WAITING} messages to {self._stream.peer_id} are unread"))
        self._waiting.append(message)
        self._wake.set()

    async def run(self) -> None:
        """Send what had to wait, for as long as the session lives.

        Raises:
            SwarmError: the client is gone.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._stream.send(self._waiting[0], timeout_s=self._timeout_s)
                self._waiting.popleft()
