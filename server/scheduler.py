"""Which rows of which sessions run next: iteration-level batching, fair between clients, with prompts in chunks.

    submit(session, work) ─► jobs ─schedule(now)─► Batch(moves, rows, notices) ─run─► finish(batch, outputs) ─► notices
                              ▲     │ admit: who has pages                              │
                              │     │ AdapterLimit: whose adapter is worth its time     │
                              │     └ Chooser: whose turn it is                         │
                              └──────────────── rest of a long prompt ──────────────────┘

Pure: time enters as `now`, nothing blocks, no tensor is computed. The device thread owns the one instance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from swarm.errors import PeerBusy, SwarmError
from swarm.server.adapter_debts import AdapterDebts
from swarm.server.adapter_limit import AdapterLimit
from swarm.server.admission import MAX_ATTACHES, admit
from swarm.server.blocks.step import Chunk
from swarm.server.chooser import BatchRow, Chooser, lead
from swarm.server.fairness import W_PROMPT, VirtualCounters
from swarm.server.gathering import Gathering
from swarm.server.host_pages import Attach, Move, SwapIn, SwapOut
from swarm.server.memory import Hit, KvMemory
from swarm.server.pages import PAGE_SIZE
from swarm.server.sequences import CachedSession, Job
from swarm.server.step_cost import NO_ADAPTERS, AdapterLoad, StepCost
from swarm.server.work import Produced, ProducedRow, Work

TOKEN_BUDGET = 512
"""Tokens in one batch; a longer prompt runs in chunks, so that it stalls nobody's decode for longer than one chunk."""
PAGE_WAIT_S = 30.0
"""How long work may find no free page before its session is told that the server is busy."""
TELL_PERIOD_S = 1.0
"""How often a session that waits for pages is told so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The work of a session can't be done."""

    step_id: int
    error: SwarmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """The work of a session waits for pages, or until its client has made up for adapters that it had loaded."""

    step_id: int
    expected_s: float


Notice = tuple[CachedSession, Produced | Failed | Waits]
"""What a session's listener is to be told."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """What to do now: tell `notices`, move pages, run rows."""

    notices: list[Notice]
    moves: list[Move]
    rows: list[BatchRow]
    num_tokens: int
    num_decode: int
    started: float
    adapters: AdapterLoad = NO_ADAPTERS
    brought: Sequence[str] = ()
    """For which client each adapter comes that is among the moves."""

    @property
    def chunks(self) -> list[Chunk]:
        """What the span runs; the adapters of rows are known only once the moves have been carried out."""
        return [row.chunk if row.seat is None else replace(row.chunk, adapter=row.seat.handle) for row in self.rows]

    @property
    def sessions(self) -> list[CachedSession]:
        """All whose cache it touches."""
        moved = (move.session for move in self.moves if isinstance(move, SwapOut | SwapIn))
        return list(dict.fromkeys([*(row.session for row in self.rows), *moved]))


class Scheduler:
    """Work that waits or runs.

    Args:
        memory: the pages of the cache.
        token_budget: most tokens in one batch.
        counters: service of each client.
        costs: what batches cost.
        gathering: how long batches wait for decode rows.
        num_ranks: rank rows of an adapter in the whole span; what `memory` says if not given.
    """

    def __init__(
        self,
        memory: KvMemory,
        *,
        token_budget: int = TOKEN_BUDGET,
        counters: VirtualCounters | None = None,
        costs: StepCost | None = None,
        gathering: Gathering | None = None,
        num_ranks: Callable[[str], int] | None = None,
    ):
        self.memory = memory
        self.counters = VirtualCounters() if counters is None else counters
        self.costs = StepCost() if costs is None else costs
        self.gathering = Gathering() if gathering is None else gathering
        self.debts = AdapterDebts()
        self.adapter_limit = AdapterLimit(self.costs, num_ranks or memory.adapters.num_ranks)
        self.token_budget = token_budget
        self.can_progress = False
        """Whether the last batch did something, or something changed since: if not, wait for a command."""
        self.num_waiting = 0
        """Sessions whose work waits for pages."""
        self._ready: dict[CachedSession, None] = {}
        self._idle_since = 0.0
        self._loads_again_at = inf
        """When an adapter may come that its client's debts keep away."""

    @property
    def num_ready(self) -> int:
        """Sessions with work."""
        return len(self._ready)

    def wait_until(self, now: float) -> float:
        """When the next batch should be made, whatever comes before; not after `now` for at once."""
        if not self.can_progress:
            return self.next_deadline()
        sessions = self._ready
        if not sessions or self.num_waiting or not all(session.job.is_decode for session in sessions):
            return now
        since = max(self._idle_since, min(session.job.ready_since for session in sessions))
        return self.gathering.until(sum(len(session.rows) for session in sessions), since, now, self.costs)

    def next_deadline(self) -> float:
        """When to look again although nothing happened."""
        starved = [(it.starved_since, it.told_at) for it in self._ready if it.starved_since is not None]
        deadline = min((min(since + PAGE_WAIT_S, told + TELL_PERIOD_S) for since, told in starved), default=inf)
        return min(deadline, self._loads_again_at)

    # -- commands -----------------------------------------------------------------------------------------------

    def submit(self, session: CachedSession, work: Work, now: float) -> Notice | None:
        """Add work; returns what to tell where the session can do none any more."""
        if session.error is not None:
            return session, Failed(step_id=work.step_id, error=session.error)
        session.jobs.append(Job(work, now))
        if len(session.jobs) == 1:
            self._ready[session] = None
            self.counters.arrive(session.client)
            self.debts.seen(session.client, now)
            if session.job.is_decode:
                self.gathering.returned(session, now)
        self.memory.add(session)
        self.can_progress = True
        return None

    def drop_queued(self, session: CachedSession) -> None:
        """Forget the work of a session."""
        session.jobs.clear()
        self._rest(session)

    def close(self, session: CachedSession, now: float) -> None:
        """Forget a session: its work and all that it holds."""
        self.drop_queued(session)
        self.gathering.forget(session)
        self.memory.free(session, now)

    def _rest(self, session: CachedSession) -> None:
        """The session has no work any more."""
        self._ready.pop(session, None)
        if session.starved_since is not None:
            session.starved_since = None
            self.num_waiting -= 1
        self.can_progress = True

    # -- batches ------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch:
        """Choose the next batch; it has no rows when nothing can run for want of pages."""
        self.can_progress = False
        notices = self._refuse_starved(now)
        sessions = admit(self.memory, list(self._ready), self.counters, self.token_budget, now, self.debts)
        notices += self._told_by_memory(now)
        expected = self.gathering.num_rows(now)
        sessions = self.adapter_limit.choose(sessions, self.counters, lead(self.token_budget), now)
        chooser = Chooser(
            sessions, self.memory, self.counters, self.costs, self.token_budget, expected, self.adapter_limit
        )
        chooser.run()
        self._prefetch(now)
        notices += self._in_debt(now)
        self.counters.settle({session.client for session in self._ready if session.job.num_left})
        notices += self._starving(now)
        moves, self.memory.moves = self.memory.moves, []
        brought, self.memory.adapters.brought = self.memory.adapters.brought, []
        self.can_progress |= bool(chooser.rows or moves)
        return Batch(
            notices=notices,
            moves=moves,
            rows=chooser.rows,
            num_tokens=chooser.num_tokens,
            num_decode=chooser.num_decode,
            started=now,
            adapters=chooser.adapters,
            brought=brought,
        )

    def moved(self, batch: Batch, seconds: float, now: float) -> None:
        """The moves of a batch have taken so long: who had adapters brought pays for it."""
        for client in batch.brought:
            self.worked(client, seconds / len(batch.brought), now)

    def worked(self, client: str, seconds: float, now: float) -> None:
        """The server has loaded an adapter for a client, for so long: that is service, and delays the next one."""
        self.debts.worked(client, seconds, now)
        self.used(client, seconds)

    def used(self, client: str, seconds: float) -> None:
        """Something was done for a client beside its batches, for so long: as much service as prompts have then."""
        if self.costs.is_measured:
            per_token = self.costs.seconds(0, self.token_budget) / self.token_budget
            self.counters.charge(client, W_PROMPT * seconds / max(per_token, 1e-9))

    def finish(
        self, batch: Batch, outputs: Sequence[torch.Tensor | None], compute_s: float, now: float
    ) -> list[Notice]:
        """Hand out the outputs of a batch.

        Args:
            batch: has run.
            outputs: for each of its rows the wanted ones [chunk's tokens - skip, hidden] on the host, None where skip
                leaves none.
            compute_s: how long it took.
            now: the time.
        """
        self._idle_since = now
        self.debts.ran(compute_s, now)
        if batch.rows:
            self.costs.observe(batch.num_decode, batch.num_tokens - batch.num_decode, compute_s, batch.adapters)
        notices: list[Notice] = []
        produced: list[ProducedRow] = []
        count, last = 0, len(batch.rows) - 1
        for number, (row, output) in enumerate(zip(batch.rows, outputs, strict=True)):
            session, chunk = row.session, row.chunk
            count += chunk.num_tokens
            if output is not None:
                position = chunk.position + row.skip
                produced.append(ProducedRow(row=row.row, position=position, hidden_states=output))
            if not row.job.is_decode:
                whole = output if row.skip == 0 else None
                self.memory.remember(session.rows[row.row], chunk.position, chunk.num_tokens, whole)
            if number == last or batch.rows[number + 1].session is not session:
                told = Produced(
                    step_id=row.job.work.step_id,
                    rows=tuple(produced),
                    num_tokens=count,
                    queue_s=max(0.0, batch.started - row.job.ready_since),
                    compute_s=compute_s,
                    batch_tokens=batch.num_tokens,
                )
                notices.append((session, told))
                self._advance(session, row.job, count, now)
                produced, count = [], 0
        return notices

    def fail(self, batch: Batch, error: SwarmError) -> list[Notice]:
        """A batch has failed: what its sessions have in the cache can't be trusted any more."""
        came = {move.seat.digest: error for move in batch.moves if isinstance(move, Attach)}
        sessions, batch.rows = batch.sessions, []
        notices = self.drop_adapters(batch, came)
        return notices + [self._fail(session, error) for session in sessions if session.error is None]

    def drop_adapters(self, batch: Batch, failures: Mapping[str, SwarmError]) -> list[Notice]:
        """These adapters could not be brought to the device: who holds them fails, the rest of the batch may run."""
        notices: list[Notice] = []
        for digest, error in failures.items():
            users = [it for it in self.memory.sessions if it.holds_adapters and digest in it.adapters]
            self.memory.adapters.failed(digest)
            notices += [self._fail(session, error) for session in users if session.error is None]
        if failures:
            batch.rows = [row for row in batch.rows if row.session.error is None]
        return notices

    # -- details ------------------------------------------------------------------------------------------------

    def _advance(self, session: CachedSession, job: Job, count: int, now: float) -> None:
        session.last_used = now
        session.turn_tokens += count
        self.debts.seen(session.client, now)
        if job.is_decode:
            self.gathering.answered(session, len(session.rows), now)
        if job.num_left:
            job.ready_since = now
            return
        del self._ready[session]
        session.jobs.popleft()
        if session.jobs:
            self._ready[session] = None  # behind all others
            session.job.ready_since = max(now, session.job.ready_since)
            self.counters.arrive(session.client)

    def _prefetch(self, now: float) -> None:
        """Bring adapters of sessions that are to come, beside those that came for this batch."""
        adapters = self.memory.adapters
        limit = max(0, MAX_ATTACHES - len(adapters.brought))
        self.can_progress |= adapters.prefetch(limit, lambda client: self.debts.may_load(client, now))

    def _in_debt(self, now: float) -> list[Notice]:
        """Tell those whose adapters have to wait for what their client owes, now and then; and look again in time."""
        self._loads_again_at = inf
        if not self.debts:
            return []
        to_attach = self.memory.adapters.to_attach
        cold = [it for it in self._ready if it.adapters and it.starved_since is None and to_attach(it)]
        notices: list[Notice] = []
        for session in cold:
            free_at = self.debts.free_at([session.client], now)
            self._loads_again_at = min(self._loads_again_at, free_at)
            if free_at > now >= session.told_at + TELL_PERIOD_S:
                session.told_at = now
                notices.append((session, Waits(step_id=session.job.work.step_id, expected_s=free_at - now)))
        return notices

    def _fail(self, session: CachedSession, error: SwarmError) -> Notice:
        session.error = error
        step_id = session.job.work.step_id if session.jobs else 0
        self.drop_queued(session)
        return session, Failed(step_id=step_id, error=error)

    def _told_by_memory(self, now: float) -> list[Notice]:
        """Sessions whose work was known already, or could not begin."""
        if not self.memory.hits and not self.memory.failures:
            return []
        self.can_progress = True
        notices: list[Notice] = [(hit.session, _known(hit, now)) for hit in self.memory.hits]
        for session, job in {hit.session: hit.job for hit in self.memory.hits}.items():
            self._advance(session, job, 0, now)
        notices += [self._fail(session, error) for session, error in self.memory.failures]
        self.memory.hits, self.memory.failures = [], []
        return notices

    def _refuse_starved(self, now: float) -> list[Notice]:
        if not self.num_waiting:
            return []
        late = [it for it in self._ready if it.starved_since is not None and now >= it.starved_since + PAGE_WAIT_S]
        return [self._fail(session, self._refusal(session, now)) for session in late]

    def _refusal(self, session: CachedSession, now: float) -> PeerBusy:
        needed, free = self.memory.pages_wanted(session), self.memory.allocator.num_free
        expected = self.memory.rate.expected_s(now, max(1, needed - free))
        return PeerBusy(
            f"KV cache is full: need {needed} pages, {free} free", retry_after_s=min(max(expected, 1.0), 600.0)
        )

    def _starving(self, now: float) -> list[Notice]:
        """Tell those who wait for pages, now and then, how long it may take."""
        waiting = [session for session in self._ready if session.starved_since is not None]
        self.num_waiting = len(waiting)
        notices: list[Notice] = []
        for session in waiting:
            if now >= session.told_at + TELL_PERIOD_S:
                session.told_at = now
                missing = self.memory.pages_wanted(session) - self.memory.allocator.num_free
                expected = self.memory.rate.expected_s(now, max(1, missing))
                notices.append((session, Waits(step_id=session.job.work.step_id, expected_s=expected)))
        return notices


def _known(hit: Hit, now: float) -> Produced:
    """What a session is told about pages that need no computing."""
    wanted_from = hit.job.work.outputs_from[hit.row]
    end = hit.position + len(hit.outputs) * PAGE_SIZE
    rows: tuple[ProducedRow, ...] = ()
    if wanted_from < end:
        first = max(hit.position, wanted_from)
        pages = [it for it in hit.outputs[(first - hit.position) // PAGE_SIZE :] if it is not None]
        outputs = torch.cat(pages)[(first - hit.position) % PAGE_SIZE :]
        rows = (ProducedRow(row=hit.row, position=first, hidden_states=outputs),)
    return Produced(
        step_id=hit.job.work.step_id,
        rows=rows,
        num_tokens=len(hit.outputs) * PAGE_SIZE,
        queue_s=max(0.0, now - hit.job.ready_since),
        compute_s=0.0,
        batch_tokens=0,
    )
