"""One at a time on the loop: of those who wait, the client that has had least of it goes first.

async with turns.turn(client): ...       its time counts as service in `server.fairness`
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from swarm.server.fairness import VirtualCounters


class Turns:
    """See the module.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._counters = VirtualCounters()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn of this client's, and have it."""
        self._counters.arrive(client)
        if self._is_taken:
            await self._wait(client)
        self._is_taken = True
        started = self._clock()
        try:
            yield
        finally:
            self._counters.charge(client, self._clock() - started)
            self._pass_on()

    async def _wait(self, client: str) -> None:
        ticket = client, asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        try:
            await ticket[1]
        except asyncio.CancelledError:
            if not ticket[1].cancelled():
                self._pass_on()  # it was this one's turn already
            raise

    def _pass_on(self) -> None:
        self._waiting = [ticket for ticket in self._waiting if not ticket[1].done()]  # who was cancelled comes no more
        self._counters.settle({client for client, _ in self._waiting})
        self._is_taken = bool(self._waiting)
        if self._waiting:
            ticket = min(self._waiting, key=lambda it: self._counters.of(it[0]))
            self._waiting.remove(ticket)
            ticket[1].set_result(None)
