"""Checks the steps of one session as they come from the network; behind it, steps are trusted.

    Step, body ─ shape, size ─► StepChunk ─ Intake: rows, positions ─► could the cache ever hold it? ─► Accepted

Knows what the session has received and what this server could hold, not what it has done with it.
"""

from swarm.codec import decode_tensor
from swarm.errors import InvalidRequest, PeerBusy
from swarm.intake import Accepted, Intake, IntakeState
from swarm.protocol import OpenSession, Step
from swarm.server.executor import Executor
from swarm.server.meters import SessionMeter
from swarm.server.pages import PAGE_SIZE
from swarm.step_chunk import StepChunk


class StepIntake:
    """What one session has received.

    Args:
        opened: its rows.
        executor: runs the blocks, and has the cache.
        max_step_tokens: most tokens in one Step.
        meter: counts replays.
    """

    def __init__(self, opened: OpenSession, executor: Executor, *, max_step_tokens: int, meter: SessionMeter):
        self._executor, self._max_step_tokens, self._meter = executor, max_step_tokens, meter
        self._intake = Intake(opened.batch_size, max_length=opened.max_length, adapter_of=opened.adapter_of)
        self._was_reordered = False
        """Whether rows may share pages."""

    @property
    def step_id(self) -> int:
        """The latest step that has begun."""
        return self._intake.step_id

    @property
    def received(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._intake.lengths)

    @property
    def num_pages(self) -> int:
        """Pages that the tokens fill, not counting that beams and prompts share some."""
        return sum(_pages(length) for length in self._intake.lengths)

    def take(self, step: Step, body: memoryview) -> Accepted | None:
        """What is new in a step, if anything.

        Raises:
            InvalidRequest: it does not fit the session.
            PeerMisbehaved: a body of another length than declared.
            PeerBusy: this server's cache could never hold it.
        """
        chunk = self._check(step, body)
        if self._intake.step_id < 0 < step.step_id:
            self._meter.replayed(sum(step.num_tokens))
        return self._intake.accept(chunk)

    def _check(self, step: Step, body: memoryview) -> StepChunk:
        span = self._executor.span
        expected = (sum(step.num_tokens), span.hidden_size)
        if step.hidden_states.shape != expected or not 1 <= expected[0] <= self._max_step_tokens:
            raise InvalidRequest(
                f"hidden states of shape {step.hidden_states.shape}, expected {expected} and 1 to"
                f" {self._max_step_tokens} tokens"
            )
        chunk = StepChunk.of(step, decode_tensor(step.hidden_states, body))
        self._intake.check(chunk)
        if span.stateful and self._intake.rolls_back(chunk):
            raise InvalidRequest("this model keeps a recurrent state: its rows can't be rolled back")
        self._check_room(chunk)
        return chunk

    def _check_room(self, chunk: StepChunk) -> None:
        """Refuse what the cache could never hold; rows that were reordered may share pages, so they are let through."""
        self._was_reordered |= chunk.order is not None
        pages = [_pages(position + count) for position, count in zip(chunk.positions, chunk.num_tokens, strict=True)]
        needed = (max(pages) if self._was_reordered else sum(pages)) * PAGE_SIZE
        if needed > self._executor.total_tokens:
            raise PeerBusy(
                f"the session needs {needed} tokens of KV cache, the server has {self._executor.total_tokens}",
                retry_after_s=600.0,
            )

    def save(self) -> IntakeState:
        """What another server needs to go on in place of this one."""
        return self._intake.save()

    def resume(self, state: IntakeState) -> None:
        """Go on, before the first step, where another server was."""
        self._intake.resume(state)
        self._was_reordered = True


def _pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)
