"""How quickly servers train, against what they announce and each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.pace import HALF_LIFE_S, PRIOR_S, TOLERANCE, Pace, parts, typical_part

RATIOS = st.floats(0.02, 3.0)


def paced(ratio: float, *, took_s: float = 100.0, weight: float = 1.0, now: float = 0.0) -> Pace:
    """A server that gave this part of what it had announced."""
    pace = Pace()
    pace.worked(now, due_s=ratio * took_s, took_s=took_s, weight=weight)
    return pace


def test_who_gives_a_tenth_of_what_it_announced_is_taken_to_have_little_more():
    """And others keep what they announce."""
    found = parts({"liar": paced(0.1, weight=0.1), "a": paced(1.0), "b": paced(0.9)}, 0.0)
    assert found.keys() == {"liar"} and 0.1 < found["liar"] < 0.15


@given(st.lists(st.floats(0.9, 1.1), min_size=3, max_size=9), st.floats(0.01, 1.0))
def test_what_all_servers_have_in_common_is_held_against_none(noise, common):
    """A crowd that trains, too, a slow line, small batches: all servers give a part of what they announce."""
    found = parts({f"p{index}": paced(common * it) for index, it in enumerate(noise)}, 0.0)
    assert not found


@given(st.lists(st.floats(0.8, 1.2), min_size=4, max_size=9), st.floats(0.1, 1.0), st.integers(1, 4))
def test_liars_lose_in_a_crowd_though_half_of_all_routes_lead_over_them(noise, common, num_liars):
    """As many as there are honest servers: who announces ten times as much is ten times as often in a route."""
    num_liars = min(num_liars, len(noise))
    paces = {f"p{index}": paced(common * it) for index, it in enumerate(noise)}
    paces |= {f"liar{index}": paced(common / 10, weight=0.1) for index in range(num_liars)}
    found = parts(paces, 0.0)
    assert found.keys() == {f"liar{index}" for index in range(num_liars)}
    assert max(found.values()) < 0.2


@given(st.lists(st.tuples(RATIOS, st.floats(0.0, 1000.0), st.floats(0.01, 1.0))), st.floats(0.0, 1000.0))
def test_nobody_has_more_than_it_announces_or_nothing(seen, later_s):
    """Whatever was measured."""
    found = parts({str(index): paced(*it[:1], took_s=it[1], weight=it[2]) for index, it in enumerate(seen)}, later_s)
    assert all(0.0 < part < 1 / TOLERANCE for part in found.values())


@given(st.floats(0.01, 0.6), st.floats(1.0, 200.0), st.floats(0.0, 300.0))
def test_a_server_that_is_not_used_comes_back(ratio, took_s, wait_s):
    """It is believed more and more, and all that it announces at last."""
    pace = paced(ratio, took_s=took_s)
    assert pace.part(wait_s, 1.0) <= pace.part(wait_s + 10.0, 1.0)
    assert pace.part(12 * HALF_LIFE_S, 1.0) == 1.0


def test_a_moment_counts_little():
    """A server that paused once, for less than a few seconds, is as it was."""
    assert paced(0.1, took_s=0.5 * PRIOR_S).part(0.0, 1.0) == 1.0


def test_being_quick_makes_up_for_little_later_on():
    """A server that announced next to nothing for a while can't live on that when it announces much."""
    pace = paced(1e9, took_s=10.0)
    for _ in range(60):
        pace.worked(0.0, due_s=0.1, took_s=1.0, weight=1.0)
    assert pace.part(0.0, 1.0) < 1 / TOLERANCE


def test_the_only_server_that_was_measured_is_compared_with_what_it_announced():
    """Until there is another one."""
    assert parts({"only": paced(0.1)}, 0.0)["only"] < 0.2
    assert typical_part([], 0.0) == 1.0


def test_work_that_waits_for_other_work_of_ours_is_not_charged_and_the_way_only_where_nothing_waits():
    """The way passes while the server works on something else."""
    pace = Pace()
    assert pace.took(10.0, since=5.0, way_s=1.0) == 4.0
    assert pace.took(12.0, since=6.0, way_s=1.0) == 2.0
    assert pace.took(14.0, since=11.5, way_s=1.0) == 1.5
    assert pace.took(20.0, since=15.0, way_s=9.0) == 0.0


def test_what_was_seen_fades():
    """Both sums, so that their quotient stays."""
    due_s, took_s = paced(0.5, took_s=8.0).seen(HALF_LIFE_S)
    assert (due_s, took_s) == pytest.approx((2.0, 4.0))
