"""The steps of one session as the client counts them: what each row has, what is under way, what is certain.

    check ─► begin ─► Step: results of each row ─ take_outputs ─► commit          abandon: as if never begun
                        lengths: with the step           committed: without it, if that is the last that was done

Pure. Knows nothing of servers: who holds how much is `swarm.session_chain`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.history import RowHistory, join
from swarm.link import Link
from swarm.rows import RowChange, check_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The step under way."""

    step_id: int
    change: RowChange
    """Its base is exactly what each row keeps."""
    lengths: tuple[int, ...]
    """Tokens of each row when it is done."""
    outputs_from: tuple[int, ...]
    """What the servers are asked for: at least the last output of each row that has new tokens, so that the last result
    proves that every hop holds everything."""
    num_outputs: tuple[int, ...]
    """What the caller wants."""
    hidden_size: int
    results: tuple[RowHistory, ...]

    def begin_at(self, feed: Link) -> None:
        """Begin the step on a link of the client's."""
        feed.begin(self.step_id, order=self.change.order, base=self.change.base, outputs_from=self.outputs_from)

    @property
    def received(self) -> tuple[int, ...]:
        """Per row the position after the last result."""
        return tuple(row.length for row in self.results)

    def check_outputs(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        known: Sequence[int],
        peer_id: str | None,
    ) -> None:
        """Whether outputs may follow where `known` tokens of each row are there.

        Raises:
            PeerMisbehaved: nobody asked for them.
        """
        num_rows, shape, rows = len(self.lengths), tuple(hidden_states.shape), (len(positions), len(num_tokens))
        if rows != (num_rows, num_rows) or shape != (sum(num_tokens), self.hidden_size):
            raise PeerMisbehaved(f"outputs of shape {shape} for {rows[1]} rows", peer_id=peer_id)
        for row, (position, count, length) in enumerate(zip(positions, num_tokens, known, strict=True)):
            if count and (position > length or position + count > self.lengths[row]):
                raise PeerMisbehaved(
                    f"outputs of row {row} at {position}:{position + count}, expected {length}:{self.lengths[row]}",
                    peer_id=peer_id,
                )

    def take_outputs(self) -> torch.Tensor:
        """What the caller wants of the results, once all are here: [sum(num_outputs), hidden]."""
        pieces: list[torch.Tensor] = []
        for row, length, wanted in zip(self.results, self.lengths, self.num_outputs, strict=True):
            pieces += row.slice(length - wanted, length)
        return join(pieces)


class Steps:
    """See the module.

    Args:
        num_rows: rows of the session.
        max_length: most tokens in a row.
        adapter_of: which adapter each row uses; empty where none does.
    """

    def __init__(self, num_rows: int, *, max_length: int, adapter_of: Sequence[int] = ()):
        self.step_id = -1
        """The step under way, or the last one."""
        self.current: Step | None = None
        self.lengths = self.committed = (0,) * num_rows
        self.max_length, self._adapter_of = max_length, adapter_of

    @property
    def as_of(self) -> int:
        """The step after which the servers hold `committed`."""
        return self.step_id if self.current is None else self.step_id - 1

    def check(
        self, hidden_states: torch.Tensor, change: RowChange, num_tokens: Sequence[int], num_outputs: Sequence[int]
    ) -> None:
        """Whether `begin` will take this step.

        Raises:
            InvalidRequest: one is under way, or it does not fit the session.
        """
        check_order(change.order, self._adapter_of)
        lengths = change.permute(self.lengths)
        if self.current is not None:
            raise InvalidRequest("a step is under way")
        num_rows = len(self.lengths)
        rows = {num_rows, len(change.base), len(num_tokens), len(num_outputs), len(lengths)}
        if len(rows) != 1:
            raise InvalidRequest(f"the session has {num_rows} rows, the step speaks of {sorted(rows)}")
        if hidden_states.ndim != 2 or len(hidden_states) != sum(num_tokens) or not sum(num_outputs):
            shape = tuple(hidden_states.shape)
            raise InvalidRequest(f"need hidden states of {sum(num_tokens)} tokens and some output, got shape {shape}")
        for row, (position, count, wanted, length) in enumerate(
            zip(change.base, num_tokens, num_outputs, lengths, strict=True)
        ):
            if not 0 <= position <= length:
                raise InvalidRequest(f"row {row} holds {length} tokens, cannot continue at position {position}")
            if not 0 <= wanted <= count or position + count > self.max_length:
                raise InvalidRequest(
                    f"row {row}: {count} tokens ({wanted} outputs) at {position}, session limit {self.max_length}"
                )

    def rolls_back(self, change: RowChange) -> bool:
        """Whether a step that was checked forgets tokens."""
        return change.apply(self.lengths) != tuple(change.permute(self.lengths))

    def begin(
        self, change: RowChange, num_tokens: Sequence[int], num_outputs: Sequence[int], *, hidden_size: int
    ) -> Step:
        """Start a step that was checked."""
        self.step_id += 1
        self.lengths = tuple(position + count for position, count in zip(change.base, num_tokens, strict=True))
        asked = [max(wanted, min(count, 1)) for wanted, count in zip(num_outputs, num_tokens, strict=True)]
        self.current = step = Step(
            step_id=self.step_id,
            change=change,
            lengths=self.lengths,
            outputs_from=tuple(length - count for length, count in zip(self.lengths, asked, strict=True)),
            num_outputs=tuple(num_outputs),
            hidden_size=hidden_size,
            results=tuple(RowHistory() for _ in self.lengths),
        )
        for row, position in zip(step.results, step.outputs_from, strict=True):
            row.restart(position)
        return step

    def commit(self) -> None:
        """The step is done: every server holds all of it."""
        self.committed, self.current = self.lengths, None

    def abandon(self) -> tuple[int, ...] | None:
        """The step counts as never begun.

        Returns:
            What is left of each row, at most; None where no step is under way. A permutation can't be undone.
        """
        step, self.current = self.current, None
        if step is None:
            return None
        kept = step.change.base if step.change.order is None else (0,) * len(self.lengths)
        self.lengths = self.committed = tuple(map(min, self.committed, kept))
        return kept
