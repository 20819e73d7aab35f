"""What was measured is set right by what batches take, each size for itself, and noise changes nothing."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.block_facts import BlockFacts
from swarm.server.speeds import MAX_FACTOR, MIN_BATCHES, RECOVERY, TOLERANCE, WINDOW_S, SpeedCheck, speed_factors

FACTS = BlockFacts(
    weight_bytes=1, page_bytes=1, decode_tps={1: 100.0, 8: 400.0, 32: 800.0}, prefill_tps=2000.0, num_blocks=4
)
MANY = 1000 * MIN_BATCHES
SLOWER = msgspec.structs.replace(
    FACTS, decode_tps={1: 25.0, 8: 400.0, 32: 700.0}, prefill_tps=1750.0, measured_tps=FACTS.decode_tps
)
"""What use has made of them."""


def batches(factor, num_rows=1, count=MIN_BATCHES):
    """So many batches of four blocks, which ran `factor` times as fast as the facts say."""
    return {(num_rows, 4): (count, count * 4 * num_rows / FACTS.decode_tps[num_rows] / factor)}


def all_sizes(factor, count=MIN_BATCHES):
    """The same, so many of each size."""
    return batches(factor, 1, count) | batches(factor, 8, count) | batches(factor, 32, count)


def after_a_window(plain, facts=FACTS):
    """What a server says after ten minutes in which these batches ran."""
    check = SpeedCheck()
    check.corrected(facts, {}, 0.0)
    return check.corrected(facts, plain, WINDOW_S)


@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_a_batch_of_a_measured_size_is_expected_to_take_what_was_measured(num_rows):
    """By its rows and its blocks; sizes between are interpolated, larger ones are not judged."""
    num_batches, factors = speed_factors(FACTS, batches(0.5, num_rows, MANY))
    assert num_batches == MANY and factors[num_rows] == pytest.approx(0.5, rel=1e-2)
    between_s = 1 / 100 + 3 / 7 * (8 / 400 - 1 / 100)
    assert speed_factors(FACTS, {(4, 2): (MANY, MANY * 2 * between_s)})[1] == pytest.approx({1: 1.0, 8: 1.0, 32: 1.0})
    assert speed_factors(FACTS, {(33, 4): (50, 1.0)}) == (0, {1: 1.0, 8: 1.0, 32: 1.0})


@given(st.sampled_from([1, 8, 32]), st.floats(1 / 6, 6), st.integers(1, MANY))
def test_a_size_that_was_not_seen_follows_the_others_by_their_part(num_rows, factor, count):
    """Between no change and theirs, at most by the third root: two of three sizes have nothing to say."""
    factors = speed_factors(FACTS, batches(factor, num_rows, count))[1]
    own = factors.pop(num_rows)
    for other in factors.values():
        low, high = sorted((1.0, factor ** (1 / 3)))
        assert low - 1e-9 <= other <= high + 1e-9
    assert abs(own - 1.0) <= abs(factor - 1.0) + 1e-9


@given(st.floats(1 / 6, 6), st.integers(MIN_BATCHES, MANY))
def test_what_all_sizes_have_in_common_is_found(factor, count):
    """A machine that has become slower altogether: all sizes say so, and the more they have seen the more exactly."""
    factors = speed_factors(FACTS, all_sizes(factor, count))[1]
    assert len({round(it, 9) for it in factors.values()}) == 1
    if count >= 100 * MIN_BATCHES:
        assert factors[1] == pytest.approx(factor, rel=0.02)


def test_batches_between_two_sizes_count_for_the_nearer_one_more():
    """Four rows are nearer to one than to eight, by their place among the sizes."""
    factors = speed_factors(FACTS, {(3, 4): (100, 100 * 4 * 2.0 * (1 / 100 + 2 / 7 * (8 / 400 - 1 / 100)))})[1]
    assert factors[1] < factors[8] < factors[32] < 1.0


def test_a_server_that_one_client_uses_alone_says_the_same_of_full_batches():
    """Half as fast in batches of one row, ten minutes long: large batches and prompts stay as measured."""
    facts = after_a_window(batches(0.5, 1, 10_000))
    assert facts.single_tps == pytest.approx(50.0, rel=0.02)
    assert (facts.decode_tps[8], facts.batch_tps, facts.prefill_tps) == (400.0, 800.0, 2000.0)
    assert facts.measured_tps == FACTS.decode_tps


def test_facts_follow_what_batches_take_after_ten_minutes():
    """Decoding and prompts alike; later windows judge only what came in them."""
    check = SpeedCheck()
    assert check.corrected(FACTS, all_sizes(1.0), 0.0) is FACTS
    slow = {
        key: (count + MANY, seconds + all_sizes(0.5, MANY)[key][1]) for key, (count, seconds) in all_sizes(1.0).items()
    }
    assert check.corrected(FACTS, slow, WINDOW_S - 1.0) is FACTS
    slower = check.corrected(FACTS, slow, WINDOW_S)
    assert slower.decode_tps == pytest.approx({1: 50.0, 8: 200.0, 32: 400.0}, rel=1e-2)
    assert slower.prefill_tps == pytest.approx(1000.0, rel=1e-2)
    as_said = {
        (size, 4): (count + 500, seconds + 500 * 4 * size / slower.decode_tps[size])
        for (size, _), (count, seconds) in slow.items()
    }
    assert check.corrected(slower, as_said, 2 * WINDOW_S) is slower


@given(st.floats(1 / TOLERANCE + 1e-6, TOLERANCE - 1e-6))
def test_small_differences_are_left_alone(factor):
    """A server's place does not depend on noise."""
    assert after_a_window(all_sizes(factor, MANY)) is FACTS


@given(st.floats(1e-6, 1e6))
def test_one_window_changes_a_speed_by_a_bounded_factor(factor):
    """Whatever the clock says."""
    found = after_a_window(all_sizes(factor, MANY))
    for size, tps in found.decode_tps.items():
        assert 1 / MAX_FACTOR <= tps / FACTS.decode_tps[size] <= MAX_FACTOR


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
    found = check.corrected(FACTS, batches(0.25, count=200 + MANY), 2 * WINDOW_S)
    assert found.single_tps == pytest.approx(25.0, rel=1e-2)


def test_a_correction_fades_while_nobody_uses_the_server():
    """Bit by bit, once a window, until all is as measured; and then nothing changes."""
    check = SpeedCheck()
    check.corrected(SLOWER, {}, 0.0)
    facts, seen = SLOWER, []
    for window in range(1, 20):
        assert check.corrected(facts, {}, window * WINDOW_S - 1.0) is facts
        facts = check.corrected(facts, {}, window * WINDOW_S)
        seen.append(facts.single_tps)
    assert seen[0] == pytest.approx(25.0 * RECOVERY) and seen == sorted(seen)
    assert facts.decode_tps == pytest.approx(FACTS.decode_tps) and facts.prefill_tps == pytest.approx(2000.0)
    assert check.corrected(facts, {}, 20 * WINDOW_S) is facts


@pytest.mark.parametrize("num_batches", [1, MIN_BATCHES])
def test_a_server_in_use_keeps_its_correction(num_batches):
    """Batches of every window bear it out; with next to none it fades."""
    check = SpeedCheck()
    check.corrected(SLOWER, {}, 0.0)
    found = check.corrected(SLOWER, {(1, 4): (num_batches, num_batches * 4 / 25.0)}, WINDOW_S)
    assert (found is SLOWER) == (num_batches == MIN_BATCHES)


def test_what_use_has_found_to_be_faster_than_measured_stays():
    """Whoever says too much is used, and learns it by that."""
    faster = msgspec.structs.replace(FACTS, measured_tps={1: 50.0, 8: 200.0, 32: 400.0})
    assert after_a_window({}, faster) is faster


def test_a_note_says_what_was_measured_beside_what_is_known():
    """After a restart corrections fade on; notes from before there were any can be read."""
    assert msgspec.json.decode(msgspec.json.encode(SLOWER), type=BlockFacts) == SLOWER
    old = msgspec.json.decode(msgspec.json.encode(FACTS))
    del old["measured_tps"]
    assert msgspec.json.decode(msgspec.json.encode(old), type=BlockFacts) == FACTS
