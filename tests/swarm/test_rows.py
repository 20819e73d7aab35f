"""Counts of tokens are translated through a step's permutation and rollback, at every place in the same way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.rows import RowChange, check_order

NUM_ROWS = 3
counts = st.tuples(*[st.integers(0, 9)] * NUM_ROWS)
changes = st.builds(RowChange, st.none() | st.tuples(*[st.integers(0, NUM_ROWS - 1)] * NUM_ROWS), counts)


def test_rows_are_permuted_before_they_are_cut() -> None:
    """The base speaks of the rows as they are named after the permutation."""
    change = RowChange((1, 1, 0), (4, 9, 2))
    assert list(change.permute((3, 8, 5))) == [8, 8, 3]
    assert change.apply((3, 8, 5)) == (4, 8, 2)
    assert RowChange(None, (4, 9, 2)).apply((3, 8, 5)) == (3, 8, 2)


@given(changes, changes, counts)
def test_one_change_can_stand_for_two(first: RowChange, second: RowChange, lengths: tuple[int, ...]) -> None:
    """Nothing is lost where the rows of a step that brought no tokens are changed together with those of the next."""
    assert first.then(second).apply(lengths) == second.apply(first.apply(lengths))


def test_a_row_goes_on_only_as_one_with_the_same_adapter() -> None:
    """What a row holds was computed with its own adapter; without adapters any order will do."""
    check_order((1, 0, 2), (0, 0, 1))
    check_order((2, 1, 0), ())
    check_order(None, (0, 0, 1))
    with pytest.raises(InvalidRequest, match="row 1 with adapter 0 can't continue row 2 with adapter 1"):
        check_order((0, 2, 2), (0, 0, 1))
