"""Batches wait for decode rows that are about to come, and only for those."""

import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.gathering import DECODING_S, PATIENCE, Gathering
from swarm.server.step_cost import StepCost

FIXED_S, ROW_S = 0.016, 0.001


def batch_s(num_rows: int) -> float:
    """What a batch takes."""
    return FIXED_S + ROW_S * num_rows


def measured() -> StepCost:
    """Costs that have seen batches of all sizes."""
    costs = StepCost()
    for num_rows in (1, 2, 4, 8, 16):
        costs.observe(num_rows, 0, batch_s(num_rows))
    return costs


def decoding(num_sessions: int, away_s: float) -> Gathering:
    """Sessions that were answered at 0, and are away for so long each time."""
    gathering = Gathering()
    for session in range(num_sessions):
        gathering.answered(session, 1, 0.0)
        gathering.returned(session, away_s)
        gathering.answered(session, 1, 0.0)
    return gathering


def test_a_batch_waits_for_the_row_that_is_about_to_come():
    """A second row within a millisecond is worth it; without it, the batch runs all the same."""
    until = decoding(2, 0.02).until(1, 0.019, 0.019, measured())
    assert until == pytest.approx(0.02, abs=2e-4)


def test_it_waits_for_as_many_as_are_worth_it():
    """Rows that come soon are waited for; the one that comes much later is not."""
    gathering = decoding(4, 0.02)
    gathering.answered("far", 1, 0.0)
    gathering.returned("far", 0.2)
    gathering.answered("far", 1, 0.0)
    assert gathering.until(1, 0.018, 0.018, measured()) == pytest.approx(0.02, abs=2e-4)


def test_a_session_alone_never_waits():
    """Nobody else can come."""
    gathering = decoding(1, 0.002)
    gathering.returned(0, 0.05)
    assert gathering.until(1, 0.05, 0.05, measured()) <= 0.05


def test_nobody_waits_for_rows_that_come_from_far_away():
    """Eight sessions that are away for half a second each: none is to be expected within a batch's time."""
    assert decoding(8, 0.5).until(1, 0.05, 0.05, measured()) <= 0.05


def test_a_large_batch_does_not_wait():
    """Twenty rows take longer than a batch costs to begin: waiting for one more costs them more than it saves."""
    assert decoding(40, 0.02).until(20, 0.0199, 0.0199, measured()) <= 0.0199


def test_a_row_that_is_late_is_waited_for_only_a_little():
    """While that is usual for it; then it may have stopped."""
    gathering = decoding(2, 0.02)
    assert gathering.until(1, 0.021, 0.021, measured()) > 0.021
    assert gathering.until(1, 0.2, 0.2, measured()) <= 0.2


def test_nothing_waits_before_anything_was_measured():
    """Costs are no seconds then, and nobody knows when a session will be back."""
    assert decoding(16, 0.02).until(1, 0.0199, 0.0199, StepCost()) <= 0.0199
    gathering = Gathering()
    gathering.answered(1, 1, 0.0)
    assert gathering.until(1, 0.001, 0.001, measured()) <= 0.001


def test_sessions_that_stopped_are_not_counted():
    """A session that was answered long ago, or has ended, is not about to come."""
    gathering = decoding(16, 0.02)
    for session in range(8):
        gathering.forget(session)
    assert gathering.num_rows(0.05) == 8
    assert gathering.num_rows(DECODING_S + 0.1) == 0


@given(
    num_sessions=st.integers(1, 64),
    num_ready=st.integers(1, 64),
    away_s=st.floats(1e-4, 0.9),
    since=st.floats(0, 0.5),
    fixed_s=st.floats(0, 1),
    row_s=st.floats(1e-6, 0.1),
)
def test_no_wait_is_longer_than_the_fixed_cost_of_a_batch(num_sessions, num_ready, away_s, since, fixed_s, row_s):
    """Whatever was measured."""
    costs = StepCost()
    for num_rows in (1, 4, 16):
        costs.observe(num_rows, 0, fixed_s + row_s * num_rows)
    until = decoding(num_sessions, away_s).until(num_ready, since, since, costs)
    assert until <= since + PATIENCE * costs.seconds(0, 0) + 1e-9


def rate(patience: float, *, num_sessions: int = 16, way_s: float = 0.0, client_s: float = 1e-5) -> float:
    """Tokens per second of sessions that decode at one server, and come back one after the other from one client."""
    gathering, costs = Gathering(patience), measured()
    coming = [(1e-4 * index, index) for index in range(num_sessions)]
    ready: dict[int, float] = {}
    now = idle_since = client_free = 0.0
    done = 0
    while done < 1000:
        until = math.inf
        if ready:
            until = gathering.until(len(ready), max(idle_since, min(ready.values())), now, costs)
        if coming and coming[0][0] <= max(now, until):
            moment, index = heapq.heappop(coming)
            ready[index] = moment
            gathering.returned(index, moment)
            now = max(now, moment)
            continue
        now = idle_since = max(now, until) + batch_s(len(ready))
        for index in ready:
            gathering.answered(index, 1, now)
            client_free = max(client_free, now + way_s) + client_s
            heapq.heappush(coming, (client_free, index))
        done += len(ready)
        ready.clear()
    return done / now


def test_sessions_that_circle_are_served_faster_for_waiting():
    """A server that runs whoever is back first makes its batches small for good; one that waits a little does not."""
    assert rate(PATIENCE) >= 1.3 * rate(0.0)


@pytest.mark.parametrize("num_sessions", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("way_s", [0.0, 0.004, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("client_s", [1e-5, 5e-4, 2e-3])
def test_waiting_never_costs_much(num_sessions, way_s, client_s):
    """Few or many sessions, near or far: at worst some percent are lost."""
    options = {"num_sessions": num_sessions, "way_s": way_s, "client_s": client_s}
    assert rate(PATIENCE, **options) >= 0.95 * rate(0.0, **options)
