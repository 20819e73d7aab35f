"""The sending end of a link: what belongs to the receiver, how much of that it holds, and so what it still lacks.

    begin(step) ─► history of each row ─ next_chunk ─► StepChunk ~~~~► Intake.accept, at the other end
    append(...) ──────┘   held: what the receiver has, at least

A link whose receiver is behind sends: a new token, a prompt in chunks and a replay to a replacement are one case. The
bound may be too low, since the receiver skips what it has (`swarm.intake`). Client and servers use the same class,
which is pure: no I/O, no clock. It does not know who the receiver is. See docs/protocol.md for the fields of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.errors import InvalidRequest, SwarmError
from swarm.history import RowHistory, join
from swarm.rows import RowChange
from swarm.step_chunk import StepChunk


class HistoryLost(SwarmError):
    """The receiver lacks tokens that this link keeps no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """A link between two messages, for whoever goes on with it."""

    step_id: int
    order: tuple[int, ...] | None
    base: tuple[int, ...]
    outputs_from: tuple[int, ...]
    starts: tuple[int, ...]
    """Per row the position of the first hidden state that is kept."""
    kept: tuple[tuple[torch.Tensor, ...], ...]
    """Per row pieces [n, hidden] of what is kept from there on."""


class Link:
    """The sending end: per row the history of what belongs to the receiver, and how much of it the receiver holds.

    A link leads to the next server, or from the last one back to the client, who wants the outputs from `outputs_from`
    on and nothing else; such a link keeps no history of what it sent.

    Args:
        num_rows: rows of the session.
        to_client: whether it is the last link; any other keeps what belongs to its receiver until `connect` names one.
        keeps_history: whether what was sent to a server is kept for its replacement.
    """

    def __init__(self, num_rows: int, *, to_client: bool, keeps_history: bool = True):
        self.step_id = -1
        self.is_connected = self.leads_to_client = self._is_last = to_client
        self._keeps_history = keeps_history
        self._history = [RowHistory() for _ in range(num_rows)]
        self._held = [0] * num_rows
        self._as_of = -2
        self._max_step_tokens = 1 << 16
        self._change = RowChange(None, (0,) * num_rows)
        """What the step under way does to the rows."""
        self._outputs_from: tuple[int, ...] = (0,) * num_rows

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Per row the position after the last token that belongs to the receiver."""
        return tuple(row.length for row in self._history)

    @property
    def held(self) -> tuple[int, ...]:
        """Tokens of each row that were sent to the receiver, or that it had."""
        return tuple(self._held)

    @property
    def is_behind(self) -> bool:
        """Whether the receiver lacks something."""
        return any(row.length > held for row, held in zip(self._history, self._held, strict=True))

    @property
    def num_unsent(self) -> int:
        """Tokens that the receiver lacks."""
        return sum(max(0, row.length - held) for row, held in zip(self._history, self._held, strict=True))

    @property
    def history_bytes(self) -> int:
        """Memory of the history."""
        return sum(row.num_bytes for row in self._history)

    # -- what belongs to the receiver ---------------------------------------------------------------------------

    def begin(
        self,
        step_id: int,
        *,
        order: tuple[int, ...] | None,
        base: tuple[int, ...],
        outputs_from: tuple[int, ...],
    ) -> None:
        """A new step: permute the rows, forget what it rolls back."""
        self.step_id, self._change, self._outputs_from = step_id, RowChange(order, base), outputs_from
        if order is not None:
            self._history = [self._history[old].fork() for old in order]
        for row, position in zip(self._history, base, strict=True):
            if row.length > position:
                row.truncate(position)
        if step_id > self._as_of:
            self._held = list(self._change.apply(self._held))
        if self._is_last and self.leads_to_client:
            self._held = list(outputs_from)

    def append(self, row: int, position: int, hidden_states: torch.Tensor) -> None:
        """Tokens [position, position + n) of a row now belong to the receiver; those known already are skipped.

        Where the positions before are missing (nobody wanted them), the history restarts.
        """
        history = self._history[row]
        if position > history.length:
            history.restart(position)
        history.append(hidden_states[history.length - position :] if position < history.length else hidden_states)

    # -- the receiver -------------------------------------------------------------------------------------------

    def connect(
        self, *, held: Sequence[int], as_of: int, max_step_tokens: int = 1 << 16, to_client: bool = False
    ) -> None:
        """The receiver is another one now, and holds `held` tokens per row in the order of rows after step `as_of`.

        That step is the one under way here, the one before, or one to come. Older ones say nothing any more (steps came
        by while the word was on its way): the receiver gets everything then, and skips what it holds.

        Raises:
            HistoryLost: it lacks tokens that are not kept any more; the link is then not connected.
            InvalidRequest: `held` has another number of rows.
        """
        if len(held) != len(self._history):
            raise InvalidRequest(f"the session has {len(self._history)} rows, the link speaks of {len(held)}")
        now_held = self._now(held, as_of)
        self.is_connected = False
        for history, count in zip(self._history, now_held, strict=True):
            if count < history.start:
                raise HistoryLost(f"the receiver holds {count} tokens, history begins at {history.start}")
        self._held, self._as_of = now_held, as_of
        self._max_step_tokens, self.leads_to_client, self.is_connected = max_step_tokens, to_client, True

    def save(self) -> LinkState:
        """What another link needs to go on in place of this one."""
        return LinkState(
            step_id=self.step_id,
            order=self._change.order,
            base=self._change.base,
            outputs_from=self._outputs_from,
            starts=tuple(row.start for row in self._history),
            kept=tuple(tuple(row.slice(row.start, row.length)) for row in self._history),
        )

    def resume(self, state: LinkState) -> None:
        """Go on, before anything else was done, where another link was. Whoever it led to holds nothing, as far as
        known; only the client has had all that it was to get."""
        self.step_id, self._change = state.step_id, RowChange(state.order, state.base)
        self._outputs_from = state.outputs_from
        for row, start, pieces in zip(self._history, state.starts, state.kept, strict=True):
            row.restart(start)
            for piece in pieces:
                row.append(piece)
        if self._is_last:
            self._held = list(self.lengths)

    def disconnect(self) -> None:
        """The receiver is gone; what belongs to it is kept for the next."""
        self.is_connected = False

    def next_chunk(self) -> StepChunk | None:
        """What to send next, counted as held from now on; None when the receiver has everything, or is gone.

        Nothing is sent, either, before the step has begun as of which it is known what the receiver holds.
        """
        if not self.is_connected or self.step_id < self._as_of or not self.is_behind:
            return None
        budget = self._max_step_tokens
        positions = tuple(self._held)
        num_tokens: list[int] = []
        pieces: list[torch.Tensor] = []
        for history, held in zip(self._history, positions, strict=True):
            count = max(0, min(history.length - held, budget))
            budget -= count
            num_tokens.append(count)
            pieces += history.slice(held, held + count) if count else []
        self._held = [held + count for held, count in zip(positions, num_tokens, strict=True)]
        chunk = StepChunk(
            step_id=self.step_id,
            order=self._change.order,
            base=self._change.base,
            positions=positions,
            num_tokens=tuple(num_tokens),
            outputs_from=self._outputs_from,
            hidden_states=join(pieces),
        )
        if self.leads_to_client or not self._keeps_history:
            self.drop_history()
        return chunk

    def drop_history(self) -> None:
        """Forget what the receiver holds; a replacement for it can then not be fed from here."""
        for history, held in zip(self._history, self._held, strict=True):
            history.drop(held)

    def _now(self, held: Sequence[int], as_of: int) -> list[int]:
        """What a receiver surely holds by now that held so much after step `as_of`."""
        if as_of >= self.step_id:
            return list(held)
        return list(self._change.apply(held)) if as_of == self.step_id - 1 else [0] * len(held)
