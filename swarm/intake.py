"""The receiving end of a link: how many tokens each row has, and what is new in a chunk.

    Step ─► StepChunk ─► Intake.accept ─► Accepted: only what is new ─► Work          lengths: what it has

A step's order and rollback are applied once, and tokens that are here already are skipped, so a sender may send
anything again. Chunks come from the network: `check` refuses what can't belong to these rows. Pure; it keeps no
tensors, and does not know who sends. The other end is `swarm.link`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.errors import InvalidRequest
from swarm.history import join
from swarm.rows import RowChange, check_order
from swarm.step_chunk import StepChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What is new in a chunk. `order` and `base` are given with the first new tokens of a step only."""

    step_id: int
    order: tuple[int, ...] | None
    base: tuple[int, ...] | None
    num_tokens: tuple[int, ...]
    outputs_from: tuple[int, ...]
    hidden_states: torch.Tensor
    """[sum(num_tokens), hidden]; each row goes on where it ends now."""

    @property
    def is_new_step(self) -> bool:
        return self.base is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeState:
    """An intake between two messages, for whoever goes on with it; `base` is None where no step has begun without any
    new tokens.
    """

    step_id: int
    lengths: tuple[int, ...]
    outputs_from: tuple[int, ...]
    order: tuple[int, ...] | None
    base: tuple[int, ...] | None

    def lengths_after(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """What rows of these lengths have once the step's order and base are applied."""
        if self.base is None:
            return tuple(lengths)
        return RowChange(self.order, self.base).apply(lengths)


class Intake:
    """The receiving end: how many tokens each row holds, and which step is under way.

    Args:
        num_rows: rows of the session.
        max_length: most tokens in a row.
        adapter_of: which adapter each row uses; empty where none does.
    """

    def __init__(self, num_rows: int, *, max_length: int, adapter_of: Sequence[int] = ()):
        self.step_id = -1
        self.lengths = [0] * num_rows
        self._max_length, self._adapter_of = max_length, adapter_of
        self._outputs_from = (0,) * num_rows
        """As the first message of the step said, for all of it: a gap between outputs could not be sent on."""
        self._begun: RowChange | None = None
        """What the step does to the rows, until its first new tokens are handed out with that."""
        self._checked: StepChunk | None = None
        """Which chunk needs no other check, as long as nothing was accepted since."""

    def check(self, chunk: StepChunk) -> None:
        """Whether `accept` will take this chunk.

        Raises:
            InvalidRequest: for rows, positions or counts that do not fit the session.
        """
        rows = len(self.lengths)
        counts = {len(chunk.base), len(chunk.positions), len(chunk.num_tokens), len(chunk.outputs_from)}
        if counts != {rows} or (chunk.order is not None and len(chunk.order) != rows):
            raise InvalidRequest(f"the session has {rows} rows, the step speaks of {sorted(counts)}")
        if chunk.order is not None and max(chunk.order) >= rows:
            raise InvalidRequest(f"order names row {max(chunk.order)} of {rows}")
        check_order(chunk.order, self._adapter_of)
        if any(first < base for first, base in zip(chunk.outputs_from, chunk.base, strict=True)):
            raise InvalidRequest(f"outputs wanted from {chunk.outputs_from}, but the step begins at {chunk.base}")
        if len(chunk.hidden_states) != sum(chunk.num_tokens) or not sum(chunk.num_tokens):
            raise InvalidRequest(f"{len(chunk.hidden_states)} hidden states for {sum(chunk.num_tokens)} tokens")
        for row, (held, position, count) in enumerate(
            zip(self._lengths_in(chunk), chunk.positions, chunk.num_tokens, strict=True)
        ):
            if count and position > held:
                raise InvalidRequest(f"row {row} holds {held} tokens, cannot continue at position {position}")
            if position + count > self._max_length:
                raise InvalidRequest(f"row {row}: {count} tokens at {position}, session limit {self._max_length}")
        self._checked = chunk

    def accept(self, chunk: StepChunk) -> Accepted | None:
        """Take what is new in a chunk; None when it is of an old step, or all of it is here already.

        Raises:
            InvalidRequest: for rows, positions or counts that do not fit the session.
        """
        if chunk.step_id < self.step_id:
            return None
        if chunk is not self._checked:
            self.check(chunk)
        self._checked = None
        is_new = chunk.step_id > self.step_id
        lengths = self._lengths_in(chunk)
        skipped = [
            min(max(0, held - position), count)
            for held, position, count in zip(lengths, chunk.positions, chunk.num_tokens, strict=True)
        ]
        num_tokens = tuple(count - skip for count, skip in zip(chunk.num_tokens, skipped, strict=True))
        if is_new:
            self.step_id, self.lengths, self._outputs_from = chunk.step_id, lengths, chunk.outputs_from
            self._begun = chunk.change if self._begun is None else self._begun.then(chunk.change)
        if not any(num_tokens):
            return None
        hidden_states = chunk.hidden_states
        if any(skipped):
            parts = hidden_states.split(list(chunk.num_tokens))
            hidden_states = join([part[skip:] for part, skip in zip(parts, skipped, strict=True)])
        begun, self._begun = self._begun, None
        self.lengths = [held + count for held, count in zip(lengths, num_tokens, strict=True)]
        return Accepted(
            step_id=chunk.step_id,
            order=None if begun is None else begun.order,
            base=None if begun is None else begun.base,
            num_tokens=num_tokens,
            outputs_from=self._outputs_from,
            hidden_states=hidden_states,
        )

    def save(self) -> IntakeState:
        """What another intake needs to go on in place of this one."""
        begun = self._begun
        return IntakeState(
            step_id=self.step_id,
            lengths=tuple(self.lengths),
            outputs_from=self._outputs_from,
            order=None if begun is None else begun.order,
            base=None if begun is None else begun.base,
        )

    def resume(self, state: IntakeState) -> None:
        """Go on, before anything came in, where another intake was."""
        self.step_id, self.lengths, self._outputs_from = state.step_id, list(state.lengths), state.outputs_from
        self._begun = None if state.base is None else RowChange(state.order, state.base)

    def rolls_back(self, chunk: StepChunk) -> bool:
        """Whether this chunk begins a step that forgets tokens."""
        if chunk.step_id <= self.step_id:
            return False
        return any(held > base for held, base in zip(chunk.change.permute(self.lengths), chunk.base, strict=True))

    def _lengths_in(self, chunk: StepChunk) -> list[int]:
        """Lengths of the rows once the chunk's step has begun."""
        if chunk.step_id <= self.step_id:
            return self.lengths
        return list(chunk.change.apply(self.lengths))
