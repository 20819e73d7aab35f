"""Who holds a step up: what servers say of it, and what follows."""

import pytest

from swarm.client.progress import Progress, StepShape, find_stuck, progress_of
from swarm.errors import PeerMisbehaved
from swarm.protocol import ProbeResult

STEP = StepShape(step_id=5, order=(1, 0), base=(10, 4), num_tokens=(3, 0))


def say(received, produced=None, step_id=5) -> ProbeResult:
    return ProbeResult(nonce=1, step_id=step_id, received=received, produced=produced or received, is_waiting=False)


def test_only_rows_with_new_tokens_count():
    """Nobody waits for the others."""
    assert STEP.expected == 13
    assert progress_of(say((12, 0), (11, 0)), STEP) == Progress(received=12, produced=11)


def test_more_than_there_can_be_is_not_believed():
    """A server can't claim progress for ever."""
    assert progress_of(say((99, 99)), STEP) == Progress(received=13, produced=13)


def test_a_server_that_has_not_begun_is_judged_by_the_old_rows():
    """Row 0 continues what was row 1, and keeps 10 tokens of it."""
    assert progress_of(say((3, 12), step_id=4), STEP) == Progress(received=10, produced=10)
    assert progress_of(say((3, 7), step_id=4), STEP) == Progress(received=7, produced=7)


def test_another_number_of_rows_is_misbehaviour():
    """Not an IndexError."""
    with pytest.raises(PeerMisbehaved, match="3 rows"):
        progress_of(say((1, 2, 3)), STEP)


@pytest.mark.parametrize(
    ("hops", "culprit"),
    [
        ([(10, 10), (10, 4), (4, 4)], (1, True)),
        ([(8, 4), (4, 4), (4, 4)], (0, True)),
        ([(10, 10), (7, 7), (7, 7)], (0, False)),
        ([(10, 10), (10, 10), (9, 9)], (1, False)),
        ([(9, 9), (9, 9), (9, 9)], (0, True)),
        ([(10, 10), (10, 10), (10, 10)], (2, True)),
        ([(7, 7), (7, 2), (0, 0)], (1, True)),
    ],
)
def test_the_first_that_has_work_is_slow_else_the_way_that_carries_nothing(hops, culprit):
    """Of 10 tokens; a hop behind which work piles up holds up those before it, too."""
    assert find_stuck(progress(hops), 10, [10, None, None]) == culprit


@pytest.mark.parametrize(
    ("hops", "fed", "culprit"),
    [
        ([(10, 10), (7, 7), (7, 7)], [10, 10, None], 1),
        ([(10, 10), (7, 7), (7, 7)], [10, 8, None], 1),
        ([(10, 10), (7, 7), (7, 7)], [10, 7, None], 0),
        ([(10, 10), (10, 10), (7, 7)], [10, None, 10], 2),
        ([(10, 10), (10, 10), (7, 7)], [10, 10, 7], 1),
    ],
)
def test_where_the_client_stands_between_two_it_knows_which_of_them_it_is(hops, fed, culprit):
    """Who does not take what is there for it, else who has not sent it."""
    assert find_stuck(progress(hops), 10, fed) == (culprit, True)


def progress(hops) -> list[Progress]:
    return [Progress(received=received, produced=produced) for received, produced in hops]
