"""Steps of one session that have come before there was room for them, and whoever waits to read on.

    session stream ── put ──► [Step, Step, ...] ── advance: while there is room ──► take
    push streams ─── until ──► their reader takes its step itself, behind what waits here

A client's stream is read a little further than steps are taken, since what stands behind them must be answered whatever
happens; push streams are not. What waits here is counted against the memory of all sessions. The queue does not know
what makes room: it asks, whenever it is told that something was done.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from swarm.errors import PeerDisconnected
from swarm.protocol import Step
from swarm.transport import Stream
from swarm.transport.limits import Budget

STEP_BYTES = 1 << 10
"""Memory that a step takes besides its tensor, about."""
END_CHECK_S = 0.5
"""How often it is looked whether the client has gone while its stream is not read."""


class StepQueue:
    """See the module.

    Args:
        client: the session stream.
        has_room: whether a step may be taken now.
        take: takes one.
        max_bytes: that may wait.
        budget: memory for what waits, shared by all sessions.
    """

    def __init__(
        self,
        client: Stream,
        *,
        has_room: Callable[[], bool],
        take: Callable[[Step, memoryview], None],
        max_bytes: int,
        budget: Budget,
    ):
        self._client, self._has_room, self._take = client, has_room, take
        self._max_bytes, self._budget = max_bytes, budget
        self._waiting: deque[tuple[Step, memoryview]] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Event()
        self._is_closed = False

    async def put(self, step: Step, body: memoryview) -> bool:
        """Take a step of the client's now or when there is room; returns when more may be read.

        Returns:
            False when the client has gone meanwhile: nobody reads its stream, so that is looked at now and then.

        Raises:
            SwarmError: it can't be taken.
        """
        if not self._waiting and self._has_room():
            self._take(step, body)
            return True
        self._waiting.append((step, body))
        self._count(len(body) + STEP_BYTES)
        while self._is_full and not self._is_closed:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(END_CHECK_S):
                    await self._changed.wait()
            if self._client.is_over:
                return False
        return True

    async def turn(self) -> None:
        """Wait until a pushed step may be taken.

        Raises:
            PeerDisconnected: the session has ended.
        """
        await self.until(lambda: not self._waiting and self._has_room())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is looked at whenever anything was done.

        Raises:
            PeerDisconnected: the session has ended.
        """
        while not self._is_closed and not condition():
            self._changed.clear()
            await self._changed.wait()
        if self._is_closed:
            raise PeerDisconnected("the session has ended")

    def advance(self) -> None:
        """Something was done: take what waits, as far as there is room, and let readers read on.

        Raises:
            SwarmError: a step can't be taken.
        """
        self._changed.set()
        while self._waiting and self._has_room() and not self._is_closed:
            step, body = self._waiting.popleft()
            self._count(-len(body) - STEP_BYTES)
            self._take(step, body)

    def close(self) -> None:
        """The session has ended: nothing waits any more."""
        self._is_closed = True
        self._changed.set()
        self._waiting.clear()
        self._count(-self._num_bytes)

    @property
    def _is_full(self) -> bool:
        """Whether so much waits that no more may be read."""
        return self._num_bytes > (0 if self._budget.used > self._budget.limit else self._max_bytes)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._budget.used += num_bytes
