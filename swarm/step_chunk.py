"""What crosses a link: a part of a step, as the sending end cuts it and the receiving end takes it.

    Link.next_chunk ─► StepChunk ─ as_step, as_result ─► message ~~~~► message ─ of ─► StepChunk ─► Intake.accept

Knows what a chunk says, not whether it fits anybody's rows: that is `swarm.intake`'s business.
"""

from dataclasses import dataclass

import torch

from swarm.protocol import HopTrace, Step, StepResult, TensorSpec
from swarm.rows import RowChange


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChunk:
    """A part of a step; the fields mean what they mean in `swarm.protocol.Step`."""

    step_id: int
    order: tuple[int, ...] | None
    base: tuple[int, ...]
    positions: tuple[int, ...]
    num_tokens: tuple[int, ...]
    outputs_from: tuple[int, ...]
    hidden_states: torch.Tensor
    """[sum(num_tokens), hidden], row after row."""

    @property
    def change(self) -> RowChange:
        """What the step does to the rows before its tokens come."""
        return RowChange(self.order, self.base)

    @classmethod
    def of(cls, step: Step, hidden_states: torch.Tensor) -> "StepChunk":
        """What a message says, with its body decoded."""
        return cls(
            step_id=step.step_id,
            order=step.order,
            base=step.base,
            positions=step.positions,
            num_tokens=step.num_tokens,
            outputs_from=step.outputs_from,
            hidden_states=hidden_states,
        )

    def as_step(self, spec: TensorSpec, trace: tuple[HopTrace, ...] = ()) -> Step:
        """The message to a server, whose body `spec` describes."""
        return Step(
            step_id=self.step_id,
            order=self.order,
            base=self.base,
            positions=self.positions,
            num_tokens=self.num_tokens,
            outputs_from=self.outputs_from,
            hidden_states=spec,
            trace=trace,
        )

    def as_result(self, spec: TensorSpec, trace: tuple[HopTrace, ...]) -> StepResult:
        """The message to the client."""
        return StepResult(
            step_id=self.step_id,
            positions=self.positions,
            num_tokens=self.num_tokens,
            hidden_states=spec,
            trace=trace,
        )
