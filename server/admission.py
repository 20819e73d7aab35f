"""Who gets pages for the next batch: everybody while there are enough, else by turns, least served client first.

    admit(ready sessions) ─► enough for all ──► all
                         └─► in order of service, for each:
                               free and idle pages ─► preempt: idle sessions, then those whose client had more
                               (for its adapters, too, where no other session has them on the device)
                               still not enough ─► it starves, and nobody behind it gets pages before it

Whoever has starved for LATE_S comes first for once. Who still has no pages after HOLD_S no longer keeps others from
those that are free.

Pure; the pages are in `server.memory`.
"""

from collections.abc import Sequence
from enum import Enum

from swarm.server.adapter_debts import AdapterDebts
from swarm.server.fairness import VirtualCounters
from swarm.server.memory import KvMemory
from swarm.server.pages import PAGE_SIZE
from swarm.server.sequences import CachedSession, pages_to_grow, tokens_within

LATE_S = 8.0
"""A client that has waited for pages so long gets a turn, though it may have had more than others: nobody is refused
for having come with a long prompt."""
HOLD_S = 16.0
"""So long pages are kept free for a session that needs more: then nobody will make room for it, it seems, and it would
be refused in the end together with all who wait behind it."""
MAX_ATTACHES = 2
"""Adapters that come to the device before one batch, but for a session that has more: the others wait so long."""
IDLE_S = 1.0
"""A session without work for so long gives up its pages before any other."""


def admit(
    memory: KvMemory,
    ready: Sequence[CachedSession],
    counters: VirtualCounters,
    budget: int,
    now: float,
    debts: AdapterDebts | None = None,
) -> list[CachedSession]:
    """Those that may run now, with pages for `job.allowance` tokens; their jobs have begun.

    Args:
        memory: the pages.
        ready: sessions with work, in order of arrival.
        counters: who has been served least.
        budget: most tokens of a batch.
        now: the time.
        debts: what clients owe for adapters; nobody owes anything if not given.
    """
    ready = _attachable(memory, ready, counters, AdapterDebts() if debts is None else debts, now)
    wanted = sum(_most_pages(session, budget) for session in ready)
    if wanted + memory.adapters.pages_wanted(ready) <= memory.allocator.num_free:
        unplaced = memory.adapters.hold(ready)
        for session in ready:
            if session.swapped is not None and session not in unplaced:
                wanted -= session.swapped.num_pages
                memory.swap_in(session)
        for session in unplaced:
            _starve(session, now)
        return [
            session
            for session in ready
            if session not in unplaced and memory.begin(session, budget, memory.allocator.num_free - wanted)
        ]
    memory.adapters.touch(ready)
    late = _late(ready, now)
    order = sorted(
        ready,
        key=lambda session: (session not in late, counters.of(session.client), session.job.ready_since),
    )
    return _Admission(memory, order, late, counters, budget, now).run()


def _attachable(
    memory: KvMemory, ready: Sequence[CachedSession], counters: VirtualCounters, debts: AdapterDebts, now: float
) -> Sequence[CachedSession]:
    """All but those for whom more adapters would have to be brought to the device than fit between two batches.

    Nor those whose client has still to make up for what came before; but who waits for pages keeps its turn.
    """
    cold = {session: memory.adapters.to_attach(session) for session in ready if session.adapters}
    num_cold = sum(map(len, cold.values()))
    if not num_cold or (num_cold <= MAX_ATTACHES and not debts):
        return ready
    coming = set().union(*(digests for session, digests in cold.items() if session.starved_since is not None))
    fresh: set[str] = set()
    for session in sorted(cold, key=lambda it: counters.of(it.client)):
        new = cold[session] - coming
        fits = not fresh or len(fresh | new) <= MAX_ATTACHES
        if fits and (not new or debts.may_load(session.client, now)):
            fresh |= new
            coming |= new
        elif new:
            session.job.allowance = 0  # it will be in the next batch
    return [session for session in ready if cold.get(session, coming) <= coming]


def _late(ready: Sequence[CachedSession], now: float) -> set[CachedSession]:
    """Who has waited so long that service counts no more: of each client the session that has waited longest."""
    first: dict[str, CachedSession] = {}
    for session in ready:
        since = session.starved_since
        if since is not None and now - since >= LATE_S:
            other = first.get(session.client)
            if other is None or since < (other.starved_since or 0.0):
                first[session.client] = session
    return set(first.values())


class _Gate(Enum):
    """Who may take pages after somebody has starved."""

    OPEN = 1
    """Anybody: nobody has starved."""
    TURNS = 2
    """Those in their turn; when it ends, who starves gets their pages."""
    CLOSED = 3
    """Nobody."""


class _Admission:
    """Pages by turns, in one batch; `order` has the least served first."""

    def __init__(
        self,
        memory: KvMemory,
        order: list[CachedSession],
        late: set[CachedSession],
        counters: VirtualCounters,
        budget: int,
        now: float,
    ):
        self._memory, self._order, self._late, self._counters = memory, order, late, counters
        self._budget, self._now = budget, now
        self._place = {session: place for place, session in enumerate(order)}
        self._admitted: dict[CachedSession, None] = {}
        self._promised = 0
        """Pages that those admitted may take."""
        self._gate = _Gate.OPEN

    def run(self) -> list[CachedSession]:
        prompt_budget = self._budget
        for place, session in enumerate(self._order):
            is_decode = session.job.is_decode
            budget = self._budget if is_decode else prompt_budget
            if budget:
                tokens = self._admit(session, place, budget)
                prompt_budget -= 0 if is_decode else tokens
            else:
                session.job.allowance = 0  # it will be somebody else's batch
        return list(self._admitted)

    @property
    def _num_free(self) -> int:
        return self._memory.allocator.num_free - self._promised

    def _admit(self, session: CachedSession, place: int, budget: int) -> int:
        """Let a session run as many tokens as there are pages for; returns how many."""
        memory = self._memory
        adapters = memory.adapters.pages_wanted([session])
        wanted = adapters + _pages_for(session, budget)
        least = adapters + (1 if session.swapped is None else session.swapped.num_pages)
        may_take = self._gate is _Gate.OPEN or (self._gate is _Gate.TURNS and memory.is_in_turn(session))
        if may_take and wanted > self._num_free:
            victims = self._victims(session, place)
            memory.preempt(session, victims, target=self._promised + wanted, least=self._promised + least)
            before, adapters = adapters, memory.adapters.pages_wanted([session])  # a victim may have held some of them
            least += adapters - before
        if (session.swapped is not None or adapters) and (not may_take or least > self._num_free):
            return self._starve(session)
        if memory.adapters.hold([session]):
            return self._starve(session)  # there are pages enough, but not in one place
        if session.swapped is not None:
            memory.swap_in(session)
        was_starved = session.starved_since
        if not memory.begin(session, budget, self._num_free if may_take else 0):
            return 0
        tokens, pages = _fit(session, self._num_free if may_take else 0, budget)
        if not tokens:
            session.starved_since = was_starved
            return self._starve(session)
        session.job.allowance = tokens
        self._promised += pages
        self._admitted[session] = None
        return tokens

    def _starve(self, session: CachedSession) -> int:
        _starve(session, self._now)
        assert session.starved_since is not None
        if self._gate is _Gate.OPEN and self._now - session.starved_since < HOLD_S:
            others = (other for other in self._memory.sessions if other not in self._admitted)
            self._gate = _Gate.TURNS if any(map(self._memory.is_in_turn, others)) else _Gate.CLOSED
        return 0

    def _victims(self, session: CachedSession, place: int) -> list[CachedSession]:
        """Whose pages this session may have: first of the idle, then of those whose client had more."""
        own = 0.0 if session in self._late else self._counters.of(session.client)
        idle: list[CachedSession] = []
        others: list[CachedSession] = []
        for other in self._memory.sessions:
            if other.jobs and self._place.get(other, place) <= place:
                continue  # itself, or who comes first
            if other.swapped is not None or other.error is not None or not other.has_pages:
                continue
            if not other.jobs and self._now - other.last_used >= IDLE_S:
                idle.append(other)
            elif (other.jobs or self._counters.of(other.client) >= own) and not self._memory.is_in_turn(other):
                others.append(other)
        idle.sort(key=lambda other: other.last_used)
        others.sort(key=lambda other: (self._counters.of(other.client), other.last_used), reverse=True)
        return idle + others


def _starve(session: CachedSession, now: float) -> None:
    session.job.allowance = 0
    if session.starved_since is None:
        session.starved_since = now


def _most_pages(session: CachedSession, budget: int) -> int:
    """Pages that the first job may take in a batch, at most."""
    rows = len(session.rows)
    most = 0 if session.swapped is None else session.swapped.num_pages
    job = session.job
    return most + (rows if job.is_decode else 2 * rows + min(job.num_left, budget) // PAGE_SIZE)


def _pages_for(session: CachedSession, budget: int) -> int:
    """Pages that the first job takes in a batch; the most that it may, where its rows are still to be changed."""
    work = session.job.work
    are_ready = work.order is None and (
        work.base is None or all(base >= row.table.length for row, base in zip(session.rows, work.base, strict=True))
    )
    if session.swapped is None and (session.job.is_started or are_ready):
        return _fit(session, _most_pages(session, budget), budget)[1]
    return _most_pages(session, budget)


def _fit(session: CachedSession, room: int, budget: int) -> tuple[int, int]:
    """Tokens of the first job, row after row, for which `room` pages suffice, and the pages that they take."""
    tokens = pages = 0
    for row, left in zip(session.rows, session.job.left, strict=True):
        count = min(left, budget - tokens, tokens_within(row, room - pages))
        if count > 0:
            pages += pages_to_grow(row, count)
            tokens += count
        if count < left:
            break
    return tokens, pages
