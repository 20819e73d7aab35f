"""What a session and the device thread say to each other: work goes in, outputs come back batch by batch.

    server.session ──Work──► server.executor ──Produced──► SessionListener (on the loop thread)

Plain values; this module knows neither messages on the wire nor how a batch is chosen.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from swarm.errors import SwarmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """New tokens of one step for one session; each row goes on where it ends."""

    step_id: int
    order: tuple[int, ...] | None
    """For each row, which old row it continues; given in the first work of a step only, and applied before `base`."""
    base: tuple[int, ...] | None
    """Tokens that each row keeps from before the step; given in the first work of a step only."""
    num_tokens: tuple[int, ...]
    outputs_from: tuple[int, ...]
    """First position of each row whose output is wanted."""
    hidden_states: torch.Tensor
    """[sum(num_tokens), hidden] on the host, row after row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducedRow:
    """Outputs of consecutive tokens of one row."""

    row: int
    position: int
    hidden_states: torch.Tensor
    """[tokens, hidden] on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Produced:
    """What one batch did for one session."""

    step_id: int
    rows: tuple[ProducedRow, ...]
    """Rows with outputs that are wanted; none where the batch only brought the step further."""
    num_tokens: int
    """Tokens of this session in the batch."""
    queue_s: float
    """How long these tokens waited."""
    compute_s: float
    """How long the batch took."""
    batch_tokens: int
    """Tokens of all sessions in the batch."""


class SessionListener(Protocol):
    """Who is told what became of a session's work; called on the loop thread, in the order of the work."""

    def produced(self, produced: Produced) -> None:
        """One batch has run."""

    def failed(self, step_id: int, error: SwarmError) -> None:
        """The work of this step can't be done; nothing more of it will come."""

    def waiting(self, step_id: int, expected_s: float) -> None:
        """The work waits for room in the cache; said again at most once a second."""
