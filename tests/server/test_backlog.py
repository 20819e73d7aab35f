"""Work of one session that is not finished: counted, begun in order, and taken back only where it is void."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.protocol import DType, TensorSpec
from swarm.server.backlog import Backlog, StepStart
from swarm.server.work import Work

SPEC = TensorSpec(DType.FLOAT32, (1, 4))


def start_of(step_id: int) -> StepStart:
    return StepStart(step_id=step_id, order=None, base=(0,), outputs_from=(0,), spec=SPEC)


def work_of(step_id: int, *counts: int, base=None, order=None) -> Work:
    return Work(
        step_id=step_id,
        order=order,
        base=base,
        num_tokens=counts,
        outputs_from=(0,) * len(counts),
        hidden_states=torch.zeros(sum(counts), 4),
    )


def test_steps_begin_with_their_first_outputs():
    """A step that came in while an older one still runs begins for the receiver only after it."""
    backlog = Backlog()
    backlog.add(work_of(0, 5, base=(0,)), (0,), start_of(0))
    backlog.add(work_of(0, 3), (5,), None)
    backlog.add(work_of(1, 1, base=(8,)), (8,), start_of(1))
    assert backlog.num_tokens == 9
    assert [start.step_id for start in backlog.done(0, 4)] == [0]
    assert backlog.done(0, 4) == [] and backlog.num_tokens == 1
    assert [start.step_id for start in backlog.done(1, 1)] == [1]
    assert backlog.num_tokens == 0


def test_work_that_the_next_step_keeps_nothing_of_is_taken_back():
    """The rollback of the forgotten step counts on, and its late outputs do not."""
    backlog = Backlog()
    backlog.add(work_of(3, 4, 0, base=(6, 2)), (6, 2), start_of(3))
    assert backlog.take_back(4, None, (6, 9)) == (6, 2)
    assert backlog.num_tokens == 0 and backlog.is_void(3) and not backlog.is_void(4)
    assert backlog.take_back(5, None, (0, 0)) is None  # nothing is left


def test_work_that_is_kept_or_reordered_is_not_taken_back():
    """One row that keeps one token is enough, and so is any permutation."""
    backlog = Backlog()
    backlog.add(work_of(3, 4, 1, base=(6, 2)), (6, 2), start_of(3))
    assert backlog.take_back(4, None, (6, 3)) is None
    assert backlog.take_back(4, (1, 0), (6, 2)) is None
    assert backlog.num_tokens == 5 and not backlog.is_void(3)
    reordering = Backlog()
    reordering.add(work_of(3, 4, base=(6,), order=(0,)), (6,), start_of(3))
    assert reordering.take_back(4, None, (6,)) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_tokens_are_counted_whatever_the_batches(counts, data):
    """Batches may cut works and span them; every step begins once, in order."""
    backlog, steps, position = Backlog(), [], 0
    for step, count in enumerate(counts):
        backlog.add(work_of(step, count, base=(position,)), (position,), start_of(step))
        steps += [step] * count
        position += count
    begun = []
    while steps:
        run = data.draw(st.integers(1, steps.count(steps[0])))
        begun += [start.step_id for start in backlog.done(steps[0], run)]
        del steps[:run]
        assert backlog.num_tokens == len(steps)
    assert begun == list(range(len(counts)))
