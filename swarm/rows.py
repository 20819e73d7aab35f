"""What a step does to a session's rows before its tokens come: which row goes on as which, and where each is cut.

    lengths ─ order (beam search) ─► permuted ─ base (rollback) ─► cut ─► + the step's tokens

Whoever counts tokens of rows, at either end of a link, translates the counts in this one way. Pure; knows no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class RowChange:
    """A permutation of rows and a rollback; `order` first."""

    order: tuple[int, ...] | None
    """For each row, which old row it continues; None where all stay what they are."""
    base: tuple[int, ...]
    """Tokens that each row keeps, at most."""

    def permute(self, lengths: Sequence[int]) -> Sequence[int]:
        """Tokens of each row before the rollback, of rows that had so many."""
        return lengths if self.order is None else [lengths[old] for old in self.order]

    def apply(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens that are left of each row, of rows that had so many."""
        return tuple(map(min, self.permute(lengths), self.base))

    def then(self, other: "RowChange") -> "RowChange":
        """One change that does what this one and the other do, one after the other."""
        order = self.order if other.order is None else tuple(other.permute(self.order or range(len(self.base))))
        return RowChange(order, other.apply(self.base))


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
