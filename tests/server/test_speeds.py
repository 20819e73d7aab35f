"""What was measured is set right by what batches take, and noise changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.block_facts import BlockFacts
from swarm.server.speeds import MAX_FACTOR, MIN_BATCHES, TOLERANCE, WINDOW_S, SpeedCheck, speed_factor

FACTS = BlockFacts(
    weight_bytes=1, page_bytes=1, decode_tps={1: 100.0, 8: 400.0, 32: 800.0}, prefill_tps=2000.0, num_blocks=4
)


def batches(factor, num_rows=1, count=MIN_BATCHES):
    """So many batches of four blocks, which ran `factor` times as fast as the facts say."""
    return {(num_rows, 4): (count, count * 4 * num_rows / FACTS.decode_tps[num_rows] / factor)}


@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_a_batch_of_a_measured_size_is_expected_to_take_what_was_measured(num_rows):
    """By its rows and its blocks; sizes between are interpolated, larger ones are not judged."""
    assert speed_factor(FACTS, batches(0.5, num_rows)) == (MIN_BATCHES, pytest.approx(0.5))
    between_s = 1 / 100 + 3 / 7 * (8 / 400 - 1 / 100)
    assert speed_factor(FACTS, {(4, 2): (1, 2 * between_s)})[1] == pytest.approx(1.0)
    assert speed_factor(FACTS, {(33, 4): (50, 1.0)}) == (0, 1.0)


def test_facts_follow_what_batches_take_after_ten_minutes():
    """Decoding and prompts alike; later windows judge only what came in them."""
    check = SpeedCheck()
    assert check.corrected(FACTS, batches(1.0), 0.0) is FACTS
    slow = {(1, 4): (1100, batches(1.0)[1, 4][1] + batches(0.5, count=1000)[1, 4][1])}
    assert check.corrected(FACTS, slow, WINDOW_S - 1.0) is FACTS
    slower = check.corrected(FACTS, slow, WINDOW_S)
    assert slower.decode_tps == pytest.approx({1: 50.0, 8: 200.0, 32: 400.0}) and slower.prefill_tps == 1000.0
    assert check.corrected(slower, slow, 2 * WINDOW_S) is slower


@given(st.floats(1 / TOLERANCE + 1e-6, TOLERANCE - 1e-6))
def test_small_differences_are_left_alone(factor):
    """A server's place does not depend on noise."""
    check = SpeedCheck()
    check.corrected(FACTS, {}, 0.0)
    assert check.corrected(FACTS, batches(factor), WINDOW_S) is FACTS


@given(st.floats(1e-6, 1e6))
def test_one_window_changes_a_speed_by_a_bounded_factor(factor):
    """Whatever the clock says."""
    check = SpeedCheck()
    check.corrected(FACTS, {}, 0.0)
    found = check.corrected(FACTS, batches(factor), WINDOW_S)
    assert 1 / MAX_FACTOR <= found.single_tps / FACTS.single_tps <= MAX_FACTOR


def test_few_batches_say_nothing_until_there_are_more():
    """The window goes on."""
    check = SpeedCheck()
    check.corrected(FACTS, {}, 0.0)
    assert check.corrected(FACTS, batches(0.25, count=MIN_BATCHES - 1), WINDOW_S) is FACTS
    assert check.corrected(FACTS, batches(0.25), WINDOW_S + 1.0) is not FACTS


def test_an_executor_that_is_new_begins_a_new_window():
    """Its counts start from nothing, after a move."""
    check = SpeedCheck()
    check.corrected(FACTS, batches(1.0, count=5000), 0.0)
    assert check.corrected(FACTS, batches(0.25, count=200), WINDOW_S) is FACTS
    assert check.corrected(FACTS, batches(0.25, count=400), 2 * WINDOW_S).single_tps == pytest.approx(25.0)
