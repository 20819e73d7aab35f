"""What a hop cost: shares of the time that passed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.timings import attribute
from swarm.protocol import HopTrace
from swarm.types import BlockRange, Hop

TRACES = st.lists(
    st.builds(
        HopTrace,
        st.integers(0, 1 << 62),
        st.integers(0, 1 << 62),
        st.integers(0, 100),
        st.integers(0, 1 << 62),
    ),
    min_size=1,
    max_size=5,
)


def hops(count: int) -> list[Hop]:
    return [Hop(peer_id=f"p{index}", blocks=BlockRange(index, index + 1)) for index in range(count)]


def test_ways_that_servers_know_are_theirs_and_the_rest_is_shared():
    """100 ms: 30 of work, 10 and 20 on the ways after the hops; 40 are left."""
    trace = [HopTrace(5000, 15000, 1, 10000), HopTrace(0, 10000, 1, 20000)]
    first, second = attribute(hops(2), trace, total_s=0.1, num_tokens=1)
    assert (first.compute_s, first.queue_s, first.overhead_s) == pytest.approx((0.015, 0.005, 0.03))
    assert (second.compute_s, second.queue_s, second.overhead_s) == pytest.approx((0.01, 0.0, 0.04))


@given(TRACES, st.floats(0.0, 1000.0))
def test_shares_add_up_to_the_time_that_passed_whatever_servers_say(trace, total_s):
    """No hop has a negative part, nor all together more than the clock."""
    timings = attribute(hops(len(trace)), trace, total_s=total_s, num_tokens=1)
    assert sum(timing.round_trip_s for timing in timings) == pytest.approx(total_s, abs=1e-6)
    for timing in timings:
        assert min(timing.compute_s, timing.queue_s) >= 0 and timing.overhead_s >= -1e-6


def test_a_trace_of_other_hops_says_nothing():
    """A server that pretends to be two."""
    assert attribute(hops(1), [HopTrace(0, 0, 1, 0)] * 2, total_s=1.0, num_tokens=1) == ()
