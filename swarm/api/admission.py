"""Who may generate now, who waits, and who is sent away: a bounded number of rows, shared fairly between accounts.

    hold(account, rows) ─► Queue: run | wait for whoever ends | ApiError 429 with Retry-After

`Queue` is pure. The next to run is of the account that has the fewest rows running; when too many wait, the last one of
the account that waits most is sent away. So one account can fill what is free, but never keep another out.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from swarm.api.errors import ApiError, overloaded

MAX_RETRY_S = 60.0
_DECAY = 0.8


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Ticket:
    """One request's place."""

    account: str
    rows: int


class Queue:
    """Rows that run and requests that wait.

    Args:
        max_rows: rows at once.
        max_waiting: requests that wait.
    """

    def __init__(self, *, max_rows: int, max_waiting: int):
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.running: list[Ticket] = []
        self.waiting: list[Ticket] = []
        """In order of arrival."""

    @property
    def free_rows(self) -> int:
        """What nobody uses."""
        return self.max_rows - sum(ticket.rows for ticket in self.running)

    def arrive(self, ticket: Ticket) -> Ticket | None:
        """A request comes; returns who has to go because of it, perhaps itself."""
        self.waiting.append(ticket)
        if len(self.waiting) <= self.max_waiting + (self.next is not None):
            return None
        counts = Counter(it.account for it in self.waiting)
        most = max(counts.values())
        gone = next(it for it in reversed(self.waiting) if counts[it.account] == most)
        self.waiting.remove(gone)
        return gone

    @property
    def next(self) -> Ticket | None:
        """Who is to run now. A large request is not overtaken by smaller ones for which there is room."""
        if not self.waiting:
            return None
        rows_of = Counter[str]()
        for ticket in self.running:
            rows_of[ticket.account] += ticket.rows
        first = min(self.waiting, key=lambda it: rows_of[it.account])  # the earliest of several
        return first if first.rows <= self.free_rows else None

    def start(self, ticket: Ticket) -> None:
        """From waiting to running."""
        self.waiting.remove(ticket)
        self.running.append(ticket)

    def leave(self, ticket: Ticket) -> None:
        """It is over, however it ended; may be called twice."""
        for tickets in (self.waiting, self.running):
            if ticket in tickets:
                tickets.remove(ticket)


class Admission:
    """The queue of one event loop.

    Args:
        max_rows: rows at once.
        max_waiting: requests that wait.
        max_wait_s: how long they wait.
    """

    def __init__(self, *, max_rows: int, max_waiting: int, max_wait_s: float):
        self.queue = Queue(max_rows=max_rows, max_waiting=max_waiting)
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._max_wait_s = max_wait_s
        self._row_s = 1.0
        """How long rows were held lately."""

    @asynccontextmanager
    async def hold(self, account: str, rows: int) -> AsyncIterator[None]:
        """Wait for a turn and keep it.

        Raises:
            ApiError: too much at once (429), or more rows than there will ever be.
        """
        if rows > self.queue.max_rows:
            raise ApiError(f"{rows} answers at once, at most {self.queue.max_rows}", param="n")
        ticket = Ticket(account=account, rows=rows)
        self._turns[ticket] = asyncio.get_running_loop().create_future()
        try:
            await self._turn(ticket)
            started = time.monotonic()
            yield
            self._row_s = _DECAY * self._row_s + (1 - _DECAY) * (time.monotonic() - started)
        finally:
            del self._turns[ticket]
            self.queue.leave(ticket)
            self._start_next()

    async def _turn(self, ticket: Ticket) -> None:
        turn = self._turns[ticket]
        if (gone := self.queue.arrive(ticket)) is not None and not self._turns[gone].done():
            self._turns[gone].set_exception(self._busy())
        self._start_next()
        try:
            async with asyncio.timeout(self._max_wait_s):
                await turn
        except TimeoutError as error:
            raise self._busy() from error

    def _start_next(self) -> None:
        while (ticket := self.queue.next) is not None:
            self.queue.start(ticket)
            if not self._turns[ticket].done():  # or else it has given up, and leaves in a moment
                self._turns[ticket].set_result(None)

    def _busy(self) -> ApiError:
        queue = self.queue
        rows = sum(ticket.rows for ticket in queue.waiting) + 1
        return overloaded(
            f"{len(queue.running)} requests run and {len(queue.waiting)} wait: come back later",
            min(MAX_RETRY_S, max(1.0, self._row_s * rows / queue.max_rows)),
        )
