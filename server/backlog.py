"""What one session has given the executor and not got back yet: work, in order, and the steps that it belongs to.

    add(work) ─► [work, work, ...] ─done(step, tokens)─► steps whose outputs begin now
                        └─take_back(base)─► nothing is left, where a new step makes all of it void

Pure. A client that gives a step up begins the next where that one began; what is queued of it need not run.
"""

from collections import deque
from dataclasses import dataclass

from swarm.protocol import TensorSpec
from swarm.server.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStart:
    """How a step begins at the next receiver, and how its tensors travel."""

    step_id: int
    order: tuple[int, ...] | None
    base: tuple[int, ...]
    outputs_from: tuple[int, ...]
    spec: TensorSpec
    """Of the step as it came in: what goes on has the same dtype and encoding."""


@dataclass(slots=True, kw_only=True)
class _Queued:
    work: Work
    starts: tuple[int, ...]
    num_left: int

    def is_void(self, base: tuple[int, ...]) -> bool:
        """Whether rows that keep `base` tokens keep none of these."""
        counts = self.work.num_tokens
        return self.work.order is None and all(
            not count or start >= kept for start, count, kept in zip(self.starts, counts, base, strict=True)
        )


class Backlog:
    """Unfinished work of one session."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Tokens that are still to be run."""
        self._queue: deque[_Queued] = deque()
        self._starts: deque[StepStart] = deque()
        self._first_valid_step = 0

    def add(self, work: Work, starts: tuple[int, ...], step: StepStart | None) -> None:
        """The executor gets this work.

        Args:
            work: the work.
            starts: position of the first token of each row.
            step: where the work is the first of a step: how it begins.
        """
        num_tokens = sum(work.num_tokens)
        self._queue.append(_Queued(work=work, starts=starts, num_left=num_tokens))
        self.num_tokens += num_tokens
        if step is not None:
            self._starts.append(step)

    def done(self, step_id: int, num_tokens: int) -> list[StepStart]:
        """So many tokens were run, of that step; returns the steps that begin with them."""
        self.num_tokens -= num_tokens
        while num_tokens and self._queue:
            first = self._queue[0]
            run = min(num_tokens, first.num_left)
            first.num_left -= run
            num_tokens -= run
            if not first.num_left:
                self._queue.popleft()
        begun: list[StepStart] = []
        while self._starts and self._starts[0].step_id <= step_id:
            begun.append(self._starts.popleft())
        return begun

    def is_void(self, step_id: int) -> bool:
        """Whether outputs of this step do not count any more."""
        return step_id < self._first_valid_step

    def take_back(self, step_id: int, order: tuple[int, ...] | None, base: tuple[int, ...]) -> tuple[int, ...] | None:
        """Forget all work if this new step keeps nothing of it.

        Returns:
            What the rows keep of what they had before the forgotten work; None where nothing was forgotten.
        """
        if not self._queue or order is not None or not all(queued.is_void(base) for queued in self._queue):
            return None
        for work in (queued.work for queued in self._queue):
            base = base if work.base is None else tuple(map(min, base, work.base))
        self._queue.clear()
        self._starts.clear()
        self.num_tokens, self._first_valid_step = 0, step_id
        return base
