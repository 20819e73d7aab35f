"""Which rows of which sessions run next: iteration-level batching with decode first and prompts in chunks.

Pure: time enters as `now`, nothing blocks, no tensor is computed. The device thread owns the one instance.

    submit(job) ─► waiting ─schedule(now)─► Batch(rows, copies, refused) ─run─► finish(batch, outputs) ─► jobs done
                      ▲                                                            │
                      └──────────────── rest of a long prompt ─────────────────────┘

A job is one step of one session. It first takes its place in the cache (beam order, rollback), then its rows run in one
or more batches, as the token budget and the free pages allow. Decode rows go first, but leave a share of the budget to
the oldest prompt. A job that finds no page for PAGE_WAIT_S is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from swarm.errors import PeerBusy, PeerError, SwarmError
from swarm.protocol import Step
from swarm.server.blocks.internals import SequenceState
from swarm.server.blocks.step import Chunk
from swarm.server.pages import OutOfPages, PageAllocator, PageTable
from swarm.types import BlockRange

TOKEN_BUDGET = 512
"""Tokens in one batch; a longer prompt runs in chunks, so that it stalls nobody's decode for longer than one chunk."""
PROMPT_SHARE = 0.25
"""Part of the budget that decode rows leave to a prompt that waits."""
PAGE_WAIT_S = 30.0
"""How long a step may find no free page before its session is told that the server is busy."""


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSequence:
    """One row of a session on this server: its pages and, for recurrent layers, its state."""

    table: PageTable
    state: SequenceState | None

    def fork(self) -> "CachedSequence":
        """A second sequence with the same tokens."""
        state = None if self.state is None else self.state.fork()  # first: there may be no memory for it
        return CachedSequence(table=self.table.fork(), state=state)


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSession:
    """The cache of one session: the rows, and which blocks they run through."""

    blocks: BlockRange
    rows: list[CachedSequence]

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row `order[i]` was."""
        kept: set[int] = set()
        rows: list[CachedSequence] = []
        forks: list[CachedSequence] = []
        try:
            for old in order:
                if old in kept:
                    forks.append(self.rows[old].fork())
                rows.append(forks[-1] if old in kept else self.rows[old])
                kept.add(old)
        except BaseException:  # out of memory for a recurrent state
            for fork in forks:
                fork.table.free()
            raise
        for index, row in enumerate(self.rows):
            if index not in kept:
                row.table.free()
        self.rows = rows

    def free(self) -> None:
        """Give all pages back."""
        for row in self.rows:
            row.table.free()


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One step of one session, validated, with the progress it has made."""

    session: CachedSession
    step: Step
    hidden_states: torch.Tensor
    """[sum(step.num_tokens), hidden] on the host."""
    arrived: float
    starved_since: float | None = None
    """Since when it has wanted a page and found none."""
    started: float | None = None
    compute_s: float = 0.0
    batch_tokens: int = 0
    num_done: list[int] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.started is not None and tuple(self.num_done) == self.step.num_tokens

    @property
    def is_decode(self) -> bool:
        return max(self.step.num_tokens) <= 1

    def is_starved_at(self, now: float) -> bool:
        """Whether it has waited too long for a page."""
        return self.starved_since is not None and now >= self.starved_since + PAGE_WAIT_S

    def start(self, now: float) -> None:
        """Take the step's place in the cache: reorder, then roll back."""
        self.started = now
        self.num_done = [0] * len(self.step.num_tokens)
        self.inputs = list(self.hidden_states.split(list(self.step.num_tokens)))
        self.outputs = [[] for _ in self.step.num_tokens]
        if self.step.order is not None:
            self.session.reorder(self.step.order)
        for row, position in zip(self.session.rows, self.step.positions, strict=True):
            row.table.truncate(position)

    def result(self) -> torch.Tensor:
        """The wanted outputs [sum(num_outputs), hidden], row after row."""
        pieces = [piece for row in self.outputs for piece in row]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """`chunk` of row `row` of `job`."""

    job: Job
    row: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What to run now, the page copies that come first, and the jobs that waited too long."""

    rows: tuple[BatchRow, ...]
    copies: tuple[tuple[int, int], ...]
    refused: tuple[tuple[Job, SwarmError], ...]

    @property
    def chunks(self) -> list[Chunk]:
        return [row.chunk for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.chunk.hidden_states) for row in self.rows)


class Scheduler:
    """Jobs that wait or run, in order of arrival.

    Args:
        allocator: the pages of the cache.
        token_budget: most tokens in one batch.
    """

    def __init__(self, allocator: PageAllocator, *, token_budget: int = TOKEN_BUDGET):
        self.allocator = allocator
        self.token_budget = token_budget
        self.can_progress = False
        """Whether the last batch was not empty, or something changed since: if not, wait for a command."""
        self._jobs: list[Job] = []

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def next_deadline(self) -> float | None:
        """When the first waiting job must be refused."""
        starved = (job.starved_since for job in self._jobs if job.starved_since is not None)
        first = min(starved, default=None)
        return None if first is None else first + PAGE_WAIT_S

    def submit(self, job: Job) -> None:
        """Add a step."""
        self._jobs.append(job)
        self.can_progress = True

    def drop(self, job: Job) -> None:
        """Forget a job that failed."""
        self._jobs = [other for other in self._jobs if other is not job]

    def cancel(self, session: CachedSession) -> None:
        """Drop the jobs of a session that is gone and free its pages."""
        self._jobs = [job for job in self._jobs if job.session is not session]
        session.free()
        self.can_progress = True

    def schedule(self, now: float) -> Batch:
        """Choose the next batch; it is empty when nothing can run for want of pages."""
        rows: list[BatchRow] = []
        copies: list[tuple[int, int]] = []
        refused: list[tuple[Job, SwarmError]] = []
        prompts = [job for job in self._jobs if not job.is_decode]
        budget = self.token_budget - (int(self.token_budget * PROMPT_SHARE) if prompts else 0)
        for job in (job for job in self._jobs if job.is_decode):
            budget -= self._take(job, budget, now, rows, copies, refused)
        budget = self.token_budget - len(rows)
        for job in prompts:
            budget -= self._take(job, budget, now, rows, copies, refused)
        refused += [(job, self._refusal(job)) for job in self._jobs if job.is_starved_at(now)]
        gone = {id(job) for job, _ in refused}
        self._jobs = [job for job in self._jobs if id(job) not in gone]
        self.can_progress = bool(rows)
        return Batch(rows=tuple(rows), copies=tuple(copies), refused=tuple(refused))

    def finish(self, batch: Batch, outputs: Sequence[torch.Tensor], compute_s: float) -> list[Job]:
        """Hand the outputs of a batch to its jobs and return those that are complete."""
        for row, output in zip(batch.rows, outputs, strict=True):
            job, wanted_from = row.job, row.job.step.num_tokens[row.row] - row.job.step.num_outputs[row.row]
            skip = max(0, wanted_from - job.num_done[row.row])
            if skip < len(output):
                job.outputs[row.row].append(output[skip:])
            job.num_done[row.row] += len(output)
        for job in {id(row.job): row.job for row in batch.rows}.values():
            job.compute_s += compute_s
            job.batch_tokens = max(job.batch_tokens, batch.num_tokens)
        done = [job for job in self._jobs if job.is_done]
        self._jobs = [job for job in self._jobs if not job.is_done]
        return done

    def _take(
        self,
        job: Job,
        budget: int,
        now: float,
        rows: list[BatchRow],
        copies: list[tuple[int, int]],
        refused: list[tuple[Job, SwarmError]],
    ) -> int:
        """Add to the batch what the budget and the free pages allow of a job; returns the tokens added."""
        if budget <= 0:
            return 0
        if job.started is None:
            try:
                job.start(now)
            except (RuntimeError, MemoryError) as error:  # no memory for the copies of a recurrent state
                refused.append((job, PeerError(f"the step's rows can't be set up: {error}")))
                return 0
        taken, is_starved = 0, False
        for index, (total, done) in enumerate(zip(job.step.num_tokens, job.num_done, strict=True)):
            count = min(total - done, budget - taken)
            if count <= 0:
                continue
            row = job.session.rows[index]
            position = job.step.positions[index] + done
            try:
                copies += row.table.grow(position + count)
            except OutOfPages:
                is_starved = True
                break
            taken += count
            chunk = Chunk(
                hidden_states=job.inputs[index][done : done + count],
                position=position,
                pages=row.table.pages,
                entry=job.session.blocks.start,
                exit=job.session.blocks.end,
                state=row.state,
            )
            rows.append(BatchRow(job=job, row=index, chunk=chunk))
        if taken or not is_starved:
            job.starved_since = None
        elif job.starved_since is None:
            job.starved_since = now
        return taken

    def _refusal(self, job: Job) -> PeerBusy:
        lengths = [sum(pair) for pair in zip(job.step.positions, job.step.num_tokens, strict=True)]
        needed = sum(row.table.pages_needed(length) for row, length in zip(job.session.rows, lengths, strict=True))
        return PeerBusy(f"KV cache is full: need {needed} pages, {self.allocator.num_free} free", retry_after_s=5.0)
