"""What is remembered of a server: penalties that fade, speeds that are believed for a while."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.behaviour import (
    EXCESS_HALF_LIFE_S,
    MAX_HINDERED_S,
    MAX_PENALTIES,
    MEASURED_S,
    PENALTY_HALF_LIFE_S,
    PENALTY_S,
    Behaviour,
)


def test_a_penalty_halves_with_time_and_grows_with_failures():
    """Two failures in a row cost twice as much as one; after some minutes nothing is left."""
    seen = Behaviour()
    assert seen.penalty_s(0.0) == 0.0
    seen.failed(100.0)
    assert seen.penalty_s(100.0) == PENALTY_S
    assert seen.penalty_s(100.0 + PENALTY_HALF_LIFE_S) == pytest.approx(PENALTY_S / 2)
    seen.failed(100.0)
    assert seen.penalty_s(100.0) == 2 * PENALTY_S
    assert seen.penalty_s(1000.0) < 0.01 * PENALTY_S


def test_what_hinders_us_is_no_fault_and_leaves_nothing_behind():
    """However often that is; a failure meanwhile counts as much as ever. A relay's word has a limit."""
    seen = Behaviour()
    for _ in range(9):
        seen.hindered(100.0, 7.0)
    assert seen.penalty_s(106.9) == PENALTY_S and seen.penalty_s(107.0) == 0.0 and seen.has_faded(107.0)
    seen.hindered(200.0, 1e9)
    assert not seen.has_faded(200.0)
    seen.failed(200.0)
    assert seen.penalty_s(200.0) == 2 * PENALTY_S
    assert seen.penalty_s(200.0 + MAX_HINDERED_S) < PENALTY_S


@given(st.lists(st.floats(0.0, 1e4), max_size=100).map(sorted))
def test_penalties_are_bounded_however_often_a_server_fails(times):
    """A server that fails all day is still used a quarter of an hour after its last failure."""
    seen = Behaviour()
    for now in times:
        seen.failed(now)
    last = times[-1] if times else 0.0
    assert seen.penalty_s(last) <= MAX_PENALTIES * PENALTY_S
    assert seen.penalty_s(last + 900.0) < 0.01


def test_measured_speed_is_believed_for_a_while():
    """Then what the server announces counts again."""
    seen = Behaviour()
    assert seen.block_s(0.0) is None
    seen.measured(10.0, block_s=0.01, surprise_s=0.0)
    assert seen.block_s(10.0 + MEASURED_S) == 0.01
    assert seen.block_s(11.0 + MEASURED_S) is None


def test_excess_fades_and_is_never_negative():
    """A server that was quicker than expected once is not believed to be so."""
    seen = Behaviour()
    seen.measured(0.0, block_s=0.01, surprise_s=-5.0)
    assert seen.excess_s(0.0) == 0.0
    seen.measured(0.0, block_s=0.01, surprise_s=1.0)
    first = seen.excess_s(0.0)
    assert 0.0 < first < 1.0
    assert seen.excess_s(EXCESS_HALF_LIFE_S) == pytest.approx(first / 2)


def test_what_was_seen_fades_until_nothing_counts():
    """Then the server may be forgotten: it is as if it had never been met."""
    seen = Behaviour()
    assert seen.has_faded(0.0)
    seen.failed(0.0)
    seen.measured(0.0, block_s=0.01, surprise_s=1.0)
    assert not seen.has_faded(61.0)
    assert seen.has_faded(3600.0)
    seen.pace.worked(3600.0, due_s=1.0, took_s=100.0, weight=1.0)
    assert not seen.has_faded(3700.0)
    assert seen.has_faded(10800.0)
