"""Training on the device thread: whose micro-batches go through the blocks next, slice by slice between other work.

    forth, back ─► jobs of runs ─ the least served client first, small ones together ─► TrainingPass
    advance: one block of one pass ─► ... ─► results to the run, on the loop thread

A slice is one block. While inference is going on, training rests after each slice for as long as it took, so that it
has at most half of the device. What is kept for the way back is counted, and a run gets at most its share of it while
others train, too. It knows no messages; the device thread owns the one instance.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from swarm.errors import PeerError, SwarmError
from swarm.server.blocks.span import BlockSpan
from swarm.server.blocks.training_pass import Part, TrainingPass
from swarm.server.fairness import VirtualCounters
from swarm.server.host_pages import HostBudget
from swarm.server.lean import return_free_memory
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30
"""Memory for what is kept between forward and backward."""
KEEP_S = 600.0
"""How long a micro-batch is kept for its way back."""
TRIM_S = 30.0
"""Least time between two returns of free memory to the system."""
BUSY_S = 1.0
"""How long after a batch of inference the next one is expected."""
GOOD_TOKENS = {"cpu": 128, "cuda": 4096}
"""Tokens from which on a pass is no faster per token: products of 128 rows reach a CPU core's full speed. Smaller
micro-batches of different runs go together."""
W_FORTH, W_BACK = 1.0, 2.0
"""Service of a token, as the counters see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forth:
    """A micro-batch has gone forth."""

    number: int
    outputs: Tensor
    """[tokens, H] on the host."""
    is_kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """A micro-batch has come back; None where it was not kept any more."""

    number: int
    input_gradients: Tensor | None
    """[tokens, H] on the host."""
    deltas: Mapping[int, list[Tensor]] = field(default_factory=dict)
    """Gradients of its version of the parameters, by block, in the order of `BlockDelta.tensors()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A micro-batch could not be run."""

    number: int
    error: SwarmError


Result = Forth | Back | Failed


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A way forth (with a part) or back (with gradients)."""

    number: int
    part: Part | None = None
    keep: bool = False
    gradients: Tensor | None = None


@dataclass(slots=True, eq=False)
class _Held:
    """A micro-batch that is kept for its way back: its pass, or, if it went in company, its inputs alone."""

    part: Part
    expires: float
    whole: TrainingPass | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One client's training on this server."""

    client: str
    blocks: BlockRange
    tell: Callable[[Result], None]
    """Is called on the loop thread."""
    budget: "_Share"
    jobs: deque[_Job] = field(default_factory=deque)
    held: dict[int, _Held] = field(default_factory=dict)
    is_closed: bool = False

    def drop(self, number: int) -> None:
        """Keep this micro-batch no longer."""
        held = self.held.pop(number, None)
        if held is not None and held.whole is not None:
            held.whole.release()
        elif held is not None:
            self.budget.give_back(held.part.hidden_states.nbytes)


class _Share(HostBudget):
    """What one run takes of the memory of all: no more than a fair share while there are others.

    Args:
        whole: the memory of all.
        count: how many run.
    """

    def __init__(self, whole: HostBudget, count: Callable[[], int]):
        super().__init__(whole.capacity)
        self._whole, self._count = whole, count

    def has_room(self, num_bytes: int) -> bool:
        share = self.capacity // max(1, self._count())
        return self._whole.has_room(num_bytes) and self.used + num_bytes <= share

    def take(self, num_bytes: int) -> None:
        super().take(num_bytes)
        self._whole.take(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        super().give_back(num_bytes)
        self._whole.give_back(num_bytes)


class Trainer:
    """See the module docstring.

    Args:
        span: the loaded blocks.
        post: calls a function on the loop thread.
        kept_bytes: memory for what is kept between forward and backward; 0 keeps nothing.
        trim: called now and then when nothing is kept.
    """

    def __init__(
        self,
        span: BlockSpan,
        post: Callable[[Callable[[], None]], object],
        *,
        kept_bytes: int = KEPT_BYTES,
        trim: Callable[[], None] = return_free_memory,
    ):
        self.span = span
        self.budget = HostBudget(kept_bytes)
        self.good_tokens = GOOD_TOKENS[span.device.type]
        self.inference_at = -inf
        """When a batch of inference ended last."""
        self._post, self._trim = post, trim
        self._counters = VirtualCounters()
        self._runs: list[Run] = []
        self._activity: Iterator[None] | None = None
        self._rested_at = -inf
        """When training may go on while there is inference."""
        self._trimmed_at = -inf

    # -- commands -----------------------------------------------------------------------------------------------

    def new_run(self, client: str, blocks: BlockRange, tell: Callable[[Result], None]) -> Run:
        """A run, which counts from `open` on; may be called on any thread."""
        return Run(client=client, blocks=blocks, tell=tell, budget=_Share(self.budget, lambda: len(self._runs)))

    def open(self, run: Run) -> None:
        """The run begins."""
        self._runs.append(run)

    def close(self, run: Run) -> None:
        """Forget a run and all that is kept of it; it is told nothing more."""
        run.is_closed = True
        run.jobs.clear()
        self.forget(run, list(run.held))
        if run in self._runs:
            self._runs.remove(run)

    def forth(self, run: Run, number: int, part: Part, *, keep: bool) -> None:
        """Queue a micro-batch on its way forth."""
        self._queue(run, _Job(number, part=part, keep=keep))

    def back(self, run: Run, number: int, gradients: Tensor) -> None:
        """Queue a micro-batch on its way back."""
        self._queue(run, _Job(number, gradients=gradients))

    def forget(self, run: Run, numbers: Sequence[int]) -> None:
        """These micro-batches will not go back; those that wait to go anywhere won't."""
        forgotten = set(numbers)
        for number in forgotten:
            run.drop(number)
        run.jobs = deque(job for job in run.jobs if job.number not in forgotten)

    def _queue(self, run: Run, job: _Job) -> None:
        if not run.is_closed:
            run.jobs.append(job)
            self._counters.arrive(run.client)

    # -- running ------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do."""
        return self._activity is not None or any(run.jobs for run in self._runs)

    def wait_s(self, now: float) -> float:
        """How long to rest before the next slice; infinite where there is nothing to do."""
        if not self.has_work:
            return inf
        return max(0.0, self._rested_at - now) if now < self.inference_at + BUSY_S else 0.0

    def advance(self) -> None:
        """Run a slice."""
        started = time.monotonic()
        if self._activity is None:
            self._activity = self._begin(started)
        if next(self._activity, self) is self:
            self._activity = None
        ended = time.monotonic()
        self._rested_at = ended + (ended - started)
        if self._activity is None and not self.budget.used and ended > self._trimmed_at + TRIM_S:
            self._trimmed_at = ended
            self._trim()

    def _begin(self, now: float) -> Iterator[None]:
        """Choose what to do next."""
        for run in self._runs:
            for number in [number for number, held in run.held.items() if now > held.expires]:
                run.drop(number)
        ready = sorted((run for run in self._runs if run.jobs), key=lambda run: self._counters.of(run.client))
        first = ready[0]
        chosen = [first]
        if self._may_have_company(first):
            num_tokens = self._num_tokens(first)
            for run in ready[1:]:
                if num_tokens >= self.good_tokens:
                    break
                if run.blocks == first.blocks and self._is_like(run, first) and self._may_have_company(run):
                    chosen.append(run)
                    num_tokens += self._num_tokens(run)
        jobs = [(run, run.jobs.popleft()) for run in chosen]
        self._charge(jobs)
        return self._guarded(jobs)

    def _charge(self, jobs: Sequence[tuple[Run, _Job]]) -> None:
        for run, job in jobs:
            tensor = job.part.hidden_states if job.part is not None else job.gradients
            assert tensor is not None
            share = len(run.blocks) / len(self.span.blocks)
            self._counters.charge(run.client, (W_FORTH if job.part is not None else W_BACK) * share * len(tensor))
        self._counters.settle({run.client for run in self._runs if run.jobs})

    def _num_tokens(self, run: Run) -> int:
        job = run.jobs[0]
        tensor = job.part.hidden_states if job.part is not None else job.gradients
        assert tensor is not None
        return len(tensor)

    def _is_like(self, run: Run, other: Run) -> bool:
        return (run.jobs[0].part is None) == (other.jobs[0].part is None)

    def _may_have_company(self, run: Run) -> bool:
        """Whether the run's next job may share a pass: one that is small, and has no pass of its own yet."""
        job = run.jobs[0]
        held = run.held.get(job.number)
        has_pass = job.part is None and (held is None or held.whole is not None)
        return not has_pass and self._num_tokens(run) < self.good_tokens

    def _guarded(self, jobs: Sequence[tuple[Run, _Job]]) -> Iterator[None]:
        try:
            yield from self._forth(jobs) if jobs[0][1].part is not None else self._back(jobs)
        except SwarmError as error:
            self._fail(jobs, error)
        except Exception:
            logger.exception("a training pass of %d micro-batches failed", len(jobs))
            self._fail(jobs, PeerError("the blocks failed on this micro-batch"))

    def _fail(self, jobs: Sequence[tuple[Run, _Job]], error: SwarmError) -> None:
        for run, job in jobs:
            run.drop(job.number)
            self._tell(run, Failed(number=job.number, error=error))

    def _forth(self, jobs: Sequence[tuple[Run, _Job]]) -> Iterator[None]:
        parts = [job.part for _, job in jobs if job.part is not None]
        (run, job), is_alone = jobs[0], len(jobs) == 1
        whole = self.span.training_pass(run.blocks, parts, run.budget)
        try:
            yield from whole.forward(keep=is_alone and job.keep)
            for (run, job), part, outputs in zip(jobs, parts, whole.outputs, strict=True):
                is_kept = job.keep and not run.is_closed
                if is_alone:
                    is_kept = is_kept and whole.is_kept
                elif is_kept and (is_kept := run.budget.has_room(part.hidden_states.nbytes)):
                    run.budget.take(part.hidden_states.nbytes)
                if is_kept:
                    expires = time.monotonic() + KEEP_S
                    run.held[job.number] = _Held(part, expires, whole if is_alone else None)
                self._tell(run, Forth(number=job.number, outputs=_to_host(outputs), is_kept=is_kept))
        finally:
            if not any(job.number in run.held for run, job in jobs):
                whole.release()

    def _back(self, jobs: Sequence[tuple[Run, _Job]]) -> Iterator[None]:
        for run, job in jobs:
            if job.number not in run.held:
                self._tell(run, Back(number=job.number, input_gradients=None))
        jobs = [(run, job) for run, job in jobs if job.number in run.held]
        if not jobs:
            return
        held = [run.held.pop(job.number) for run, job in jobs]
        whole = held[0].whole
        if whole is None:
            for (run, _), it in zip(jobs, held, strict=True):
                run.budget.give_back(it.part.hidden_states.nbytes)
            whole = self.span.training_pass(jobs[0][0].blocks, [it.part for it in held], _Forced(self.budget))
        try:
            if not whole.is_kept:
                yield from whole.forward(keep=True)
            gradients = [job.gradients for _, job in jobs if job.gradients is not None]
            yield from whole.backward(gradients)
            for (run, job), found in zip(jobs, whole.gradients, strict=True):
                deltas = {block: [_to_host(it) for it in own] for block, own in found.deltas.items()}
                result = Back(number=job.number, input_gradients=_to_host(found.hidden_states), deltas=deltas)
                self._tell(run, result)
        finally:
            whole.release()

    def _tell(self, run: Run, result: Result) -> None:
        def tell() -> None:
            if not run.is_closed:
                run.tell(result)

        self._post(tell)


class _Forced(HostBudget):
    """Takes from the memory of all what a pass needs at least, whether there is room or not: it was counted before."""

    def __init__(self, whole: HostBudget):
        super().__init__(whole.capacity)
        self._whole = whole

    def has_room(self, num_bytes: int) -> bool:
        return self.used == 0 or self._whole.has_room(num_bytes)

    def take(self, num_bytes: int) -> None:
        super().take(num_bytes)
        self._whole.take(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        super().give_back(num_bytes)
        self._whole.give_back(num_bytes)


def _to_host(tensor: Tensor) -> Tensor:
    """In memory of its own."""
    host = tensor.detach().cpu()
    return host.clone() if host.nbytes < host.untyped_storage().nbytes() else host
