"""Both ends of one link of a chain: what the sender still owes, and what the receiver has already.

    begin(step) ─► Link.history ── next_chunk() ─► Step ~~~~► Intake.accept() ─► Work (only what is new)
    append(...) ──────┘   held: what the receiver has          lengths: what it has

A link whose receiver is behind sends: a new token, a prompt in chunks and a replay to a replacement are one case. The
receiver applies a step's order and rollback once and skips tokens that it holds, so anything may be sent again. Client
and servers use the same two classes; both are pure: no I/O, no clock. See docs/protocol.md for the fields of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.errors import InvalidRequest, SwarmError
from swarm.history import RowHistory, join
from swarm.protocol import HopTrace, Step, StepResult, TensorSpec


class HistoryLost(SwarmError):
    """The receiver lacks tokens that this link keeps no longer."""


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
        ordered = lengths if self.order is None else [lengths[old] for old in self.order]
        return tuple(map(min, ordered, self.base))


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
        self._order: tuple[int, ...] | None = None
        self._base: tuple[int, ...] = (0,) * num_rows
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
        self.step_id, self._order, self._base, self._outputs_from = step_id, order, base, outputs_from
        if order is not None:
            self._history = [self._history[old].fork() for old in order]
        for row, position in zip(self._history, base, strict=True):
            if row.length > position:
                row.truncate(position)
        if step_id > self._as_of:
            self._held = self._translate(self._held)
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
            order=self._order,
            base=self._base,
            outputs_from=self._outputs_from,
            starts=tuple(row.start for row in self._history),
            kept=tuple(tuple(row.slice(row.start, row.length)) for row in self._history),
        )

    def resume(self, state: LinkState) -> None:
        """Go on, before anything else was done, where another link was. Whoever it led to holds nothing, as far as
        known; only the client has had all that it was to get."""
        self.step_id, self._order, self._base = state.step_id, state.order, state.base
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
            order=self._order,
            base=self._base,
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
        return self._translate(held) if as_of == self.step_id - 1 else [0] * len(held)

    def _translate(self, held: Sequence[int]) -> list[int]:
        """What the receiver holds after this step's order and rollback."""
        ordered = held if self._order is None else [held[old] for old in self._order]
        return [min(count, base) for count, base in zip(ordered, self._base, strict=True)]


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
        self._begun: tuple[tuple[int, ...] | None, tuple[int, ...]] | None = None
        """Order and base of the step, until its first new tokens are handed out with them."""
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
            self._begun = _then(self._begun, chunk)
        if not any(num_tokens):
            return None
        hidden_states = chunk.hidden_states
        if any(skipped):
            parts = hidden_states.split(list(chunk.num_tokens))
            hidden_states = join([part[skip:] for part, skip in zip(parts, skipped, strict=True)])
        order, base = self._begun or (None, None)
        self._begun = None
        self.lengths = [held + count for held, count in zip(lengths, num_tokens, strict=True)]
        return Accepted(
            step_id=chunk.step_id,
            order=order,
            base=base,
            num_tokens=num_tokens,
            outputs_from=self._outputs_from,
            hidden_states=hidden_states,
        )

    def save(self) -> IntakeState:
        """What another intake needs to go on in place of this one."""
        order, base = self._begun or (None, None)
        return IntakeState(
            step_id=self.step_id,
            lengths=tuple(self.lengths),
            outputs_from=self._outputs_from,
            order=order,
            base=base,
        )

    def resume(self, state: IntakeState) -> None:
        """Go on, before anything came in, where another intake was."""
        self.step_id, self.lengths, self._outputs_from = state.step_id, list(state.lengths), state.outputs_from
        self._begun = None if state.base is None else (state.order, state.base)

    def rolls_back(self, chunk: StepChunk) -> bool:
        """Whether this chunk begins a step that forgets tokens."""
        if chunk.step_id <= self.step_id:
            return False
        ordered = self.lengths if chunk.order is None else [self.lengths[old] for old in chunk.order]
        return any(held > base for held, base in zip(ordered, chunk.base, strict=True))

    def _lengths_in(self, chunk: StepChunk) -> list[int]:
        """Lengths of the rows once the chunk's step has begun."""
        if chunk.step_id <= self.step_id:
            return self.lengths
        ordered = self.lengths if chunk.order is None else [self.lengths[old] for old in chunk.order]
        return [min(held, base) for held, base in zip(ordered, chunk.base, strict=True)]


def check_order(order: Sequence[int] | None, adapter_of: Sequence[int]) -> None:
    """Whether rows are permuted only among those with the same adapter: what a row holds was computed with its own.

    Raises:
        InvalidRequest: a row would go on with another's tokens and its own adapter.
    """
    if order is None or not adapter_of:
        return
    for row, old in enumerate(order):
        if adapter_of[row] != adapter_of[old]:
            raise InvalidRequest(
                f"row {row} with adapter {adapter_of[row]} can't continue row {old} with adapter {adapter_of[old]}"
            )


def _then(
    begun: tuple[tuple[int, ...] | None, tuple[int, ...]] | None, chunk: StepChunk
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """One order and base for a step that was begun without new tokens, and the step after it."""
    if begun is None:
        return chunk.order, chunk.base
    first_order, first_base = begun
    if chunk.order is None:
        return first_order, tuple(map(min, first_base, chunk.base))
    order = chunk.order if first_order is None else tuple(first_order[old] for old in chunk.order)
    return order, tuple(min(first_base[old], base) for old, base in zip(chunk.order, chunk.base, strict=True))
