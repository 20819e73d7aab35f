"""The receiving end of a link takes nothing twice, applies a step once, and refuses what does not fit its rows."""

from collections.abc import Sequence

import pytest
import torch

from swarm.errors import InvalidRequest
from swarm.intake import Accepted, Intake
from swarm.step_chunk import StepChunk


def chunk(
    step_id: int,
    base: tuple[int, ...],
    positions: tuple[int, ...],
    *rows: Sequence[float],
    order: tuple[int, ...] | None = None,
    outputs_from: tuple[int, ...] | None = None,
) -> StepChunk:
    return StepChunk(
        step_id=step_id,
        order=order,
        base=base,
        positions=positions,
        num_tokens=tuple(len(row) for row in rows),
        outputs_from=base if outputs_from is None else outputs_from,
        hidden_states=torch.tensor([value for row in rows for value in row], dtype=torch.float64).view(-1, 1),
    )


def taken(accepted: Accepted | None) -> tuple[tuple[int, ...], list[float], bool]:
    assert accepted is not None
    return accepted.num_tokens, accepted.hidden_states.flatten().tolist(), accepted.is_new_step


def test_a_step_is_applied_once_and_tokens_are_taken_once() -> None:
    """Order and rollback come with the first new tokens; overlaps are cut, old steps ignored."""
    intake = Intake(2, max_length=10)
    assert taken(intake.accept(chunk(0, (0, 0), (0, 0), [1, 2, 3], [7]))) == ((3, 1), [1, 2, 3, 7], True)
    second = chunk(1, (1, 2), (1, 2), [8], [9, 10], order=(1, 0))
    assert intake.rolls_back(second)
    accepted = intake.accept(second)
    assert taken(accepted) == ((1, 2), [8, 9, 10], True)
    assert accepted is not None and (accepted.order, accepted.base) == ((1, 0), (1, 2))
    assert intake.lengths == [2, 4]
    assert intake.accept(second) is None and not intake.rolls_back(second)
    assert taken(intake.accept(chunk(1, (1, 2), (0, 3), [7, 8, 11], [10], order=(1, 0)))) == ((1, 0), [11], False)
    assert intake.accept(chunk(0, (0, 0), (3, 1), [4], [])) is None
    assert intake.lengths == [3, 4]


def test_a_step_that_brings_nothing_new_at_first_is_applied_with_its_first_new_tokens() -> None:
    """A replay may begin with tokens that are there already, also twice in a row."""
    intake = Intake(2, max_length=10)
    intake.accept(chunk(0, (0, 0), (0, 0), [1, 2, 3], [7, 8]))
    assert intake.accept(chunk(1, (2, 2), (0, 0), [7, 8], [], order=(1, 0))) is None
    assert intake.lengths == [2, 2]
    assert intake.accept(chunk(2, (2, 1), (0, 0), [7], [])) is None
    accepted = intake.accept(chunk(3, (1, 2), (1, 2), [5], [6], order=(1, 0)))
    assert accepted is not None and accepted.order == (0, 1) and accepted.base == (1, 2)


def test_what_a_step_wants_is_settled_by_its_first_message() -> None:
    """Or there could be a gap between outputs, which a link can't send."""
    intake = Intake(1, max_length=10)
    intake.accept(chunk(0, (0,), (0,), [1, 2], outputs_from=(1,)))
    accepted = intake.accept(chunk(0, (0,), (2,), [3, 4, 5], outputs_from=(4,)))
    assert accepted is not None and accepted.outputs_from == (1,)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (chunk(1, (2, 2), (3, 2), [1], []), "row 0 holds 2 tokens, cannot continue at position 3"),
        (chunk(0, (0, 0), (2, 3), [], [1]), "row 1 holds 2 tokens, cannot continue at position 3"),
        (chunk(1, (2, 2), (2, 2), [1] * 9, []), "row 0: 9 tokens at 2, session limit 10"),
        (chunk(1, (2,), (2,), [1]), "has 2 rows"),
        (chunk(1, (2, 2), (2, 2), [1], [1], order=(0,)), "has 2 rows"),
        (chunk(1, (2, 2), (2, 2), [1], [1], order=(0, 2)), "order names row 2 of 2"),
        (chunk(1, (2, 2), (2, 2), [], []), "0 hidden states for 0 tokens"),
        (chunk(1, (2, 2), (2, 2), [1], [], outputs_from=(2, 1)), "outputs wanted"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(message: StepChunk, words: str) -> None:
    """Gaps, rows, orders and lengths of a hostile sender are refused before anything is applied."""
    intake = Intake(2, max_length=10)
    intake.accept(chunk(0, (0, 0), (0, 0), [1, 2], [3, 4]))
    for attempt in (intake.check, intake.accept):
        with pytest.raises(InvalidRequest, match=words):
            attempt(message)
    assert intake.step_id == 0 and intake.lengths == [2, 2]
    assert taken(intake.accept(chunk(1, (2, 2), (2, 2), [5], []))) == ((1, 0), [5], True)


def test_an_intake_knows_what_is_still_to_be_done_of_a_step_without_tokens() -> None:
    """Order and rollback of a step that has begun are applied to what another cache has."""
    intake = Intake(2, max_length=10)
    intake.accept(chunk(0, (0, 0), (0, 0), [1, 2], [3, 4]))
    assert intake.save().lengths_after((2, 2)) == (2, 2)
    intake.accept(chunk(1, (2, 1), (2, 1), [], [4], order=(1, 1)))  # row 1 holds that already
    state = intake.save()
    assert state.lengths_after((2, 2)) == state.lengths == (2, 2)
