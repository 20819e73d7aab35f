"""Which rows go into the next batch, of sessions that have their pages: fair between clients, decode rows first.

    sessions ─► _Turns (decode, prompts): least served client first ─► Chooser.run ─► rows

Within a client decode rows go before prompts, and both in order of arrival. Between clients the least served goes
first (`server.fairness`): decode rows still go before prompts, unless their client is more than `lead` ahead of one who
is left out. Next to decode rows, prompts get as many tokens as prolong the batch by STALL (`server.step_cost`); no more
run when there are none just now, but will be in a moment.

Bound: for two clients that both have ready work left out of every batch of an interval, service in it differs by at
most 2 * max(w_p * L_in, w_q * M), where L_in is the most prompt tokens of a batch and M the most decode rows of one;
both are `token_budget`. For no counter ever gets further from one left behind than lead + token_budget * w_p, which
with lead = w_q * token_budget / 2 is w_q * M. Who waits for pages may wait for the turn of another session, besides,
which is as many tokens as `server.memory` says. Pure.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import NamedTuple

from swarm.server.blocks.step import Chunk
from swarm.server.fairness import W_DECODE, W_PROMPT, VirtualCounters
from swarm.server.host_pages import Seat
from swarm.server.memory import KvMemory
from swarm.server.pages import PAGE_SIZE
from swarm.server.sequences import CachedSession, Job
from swarm.server.step_cost import StepCost

PROMPT_SHARE = 0.25
"""Part of the budget that decode rows leave to a prompt that waits."""


class BatchRow(NamedTuple):
    """`chunk` of row `row` of a session."""

    session: CachedSession
    job: Job
    row: int
    chunk: Chunk
    skip: int
    """Leading outputs that nobody wants."""
    seat: Seat | None = None
    """Where its adapter is."""


class _Turns:
    """Sessions to choose from: those of the least served client first, and within a client in order of arrival."""

    def __init__(self, counters: VirtualCounters):
        self._counters = counters
        self._queues: dict[str, deque[CachedSession]] = {}
        self._heap: list[tuple[float, str]] = []

    def add(self, session: CachedSession) -> None:
        queue = self._queues.get(session.client)
        if queue is None:
            queue = self._queues[session.client] = deque()
        queue.append(session)

    def order(self) -> None:
        """All have been added."""
        self._heap = [(self._counters.of(client), client) for client in self._queues]
        heapify(self._heap)

    @property
    def least(self) -> float:
        """The least counter of their clients; infinite when there are none."""
        heap = self._heap
        while heap:
            counter, client = heap[0]
            if not self._queues[client]:
                heappop(heap)
                continue
            present = self._counters.of(client)
            if present == counter:
                return counter
            heapreplace(heap, (present, client))
        return inf

    def least_beside(self, client: str) -> float:
        """The same among all clients but one."""
        least = self.least
        if not self._heap or self._heap[0][1] != client:
            return least
        return min((self._counters.of(it) for it, queue in self._queues.items() if queue and it != client), default=inf)

    def next(self) -> CachedSession:
        """The next session, after `least` was asked."""
        return self._queues[self._heap[0][1]][0]

    def pop(self) -> CachedSession:
        """Take it out."""
        return self._queues[self._heap[0][1]].popleft()


class Chooser:
    """Fills one batch from sessions that have their pages; see the module for the rules.

    Args:
        sessions: those that may run, in order of arrival.
        memory: gives them their pages.
        counters: who has been served least.
        costs: what batches cost.
        token_budget: most tokens in the batch.
        num_expected: decode rows that will come in a moment.
    """

    def __init__(
        self,
        sessions: Sequence[CachedSession],
        memory: KvMemory,
        counters: VirtualCounters,
        costs: StepCost,
        token_budget: int,
        num_expected: int,
    ):
        self.rows: list[BatchRow] = []
        self.num_tokens = 0
        self.num_decode = 0
        self._memory, self._counters, self._costs, self._budget = memory, counters, costs, token_budget
        self._num_expected = num_expected
        self._lead = W_DECODE * token_budget / 2
        self._decode, self._prompts = _Turns(self._counters), _Turns(self._counters)
        for session in sessions:
            (self._decode if session.job.is_decode else self._prompts).add(session)
        self._decode.order()
        self._prompts.order()

    def run(self) -> None:
        """Decode rows, then prompts, then decode rows that were held back for prompts that didn't need the room."""
        has_prompts = self._prompts.least < inf
        self._take_decode(self._budget - (int(self._budget * PROMPT_SHARE) if has_prompts else 0))
        if has_prompts:
            self._take_prompts()
            self._take_decode(self._budget - self.num_tokens)

    def _take_decode(self, room: int) -> None:
        """Rows of clients that are not too far ahead of one whose prompt waits."""
        while room > 0 and (least := self._decode.least) < inf:
            ahead = least - self._prompts.least_beside(self._decode.next().client)
            if ahead > self._lead:
                return
            most = room if ahead == -inf else min(room, int((self._lead - ahead) / W_DECODE) + 1)
            room -= self._take(self._decode.pop(), most, W_DECODE)

    def _take_prompts(self) -> None:
        """Chunks of clients that are not too far ahead of one whose decode rows were left out."""
        num_decode = self.num_decode or self._num_expected
        room = self._costs.prompt_limit(num_decode, self._budget - self.num_tokens)
        while room > 0 and (least := self._prompts.least) < inf:
            session = self._prompts.next()
            if least - self._decode.least_beside(session.client) > self._lead:
                return
            room -= self._take(session, room, W_PROMPT)
            if room == 0 and session.job.num_left:
                return  # it was cut, so it is still left out
            self._prompts.pop()

    def _take(self, session: CachedSession, most: int, price: float) -> int:
        """Add at most so many tokens of a session's first job; returns how many."""
        job = session.job
        most, taken = min(most, job.allowance), 0
        for index, left in enumerate(job.left):
            if not left:
                continue
            count = min(left, most - taken)
            done = self._take_row(session, job, index, count) if count else 0
            taken += done
            if done < left:
                break
        self.num_tokens += taken
        if job.is_decode:
            self.num_decode += taken
        self._counters.charge(session.client, price * session.share * taken)
        return taken

    def _take_row(self, session: CachedSession, job: Job, index: int, count: int) -> int:
        row = session.rows[index]
        position = row.table.length
        rest = (position + count) % PAGE_SIZE
        if count < job.left[index] and 4 * rest <= count:  # end with a full page: then pages of others may follow
            count -= rest
        self._memory.grow(session, index, count)
        chunk = Chunk(
            hidden_states=job.take(index, count),
            position=position,
            pages=row.table.pages,
            entry=session.blocks.start,
            exit=session.blocks.end,
            state=row.state,
        )
        skip = max(0, job.work.outputs_from[index] - position)
        seat = self._memory.adapters.seat(session.adapters[index]) if session.adapters else None
        self.rows.append(BatchRow(session, job, index, chunk, skip, seat))
        return count
