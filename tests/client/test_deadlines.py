"""When a step is late or stuck, and when patience ends: pure arithmetic over times that are made up."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.client.deadlines import MAX_BACKOFF_S, MAX_REFUSALS, MIN_STUCK_S, Pace, Patience, Watch
from swarm.errors import InvalidRequest, PeerDisconnected, RouteNotFound

GONE = PeerDisconnected("gone")
SECONDS = st.floats(0.001, 100.0)


def test_a_pace_without_steps_expects_nothing():
    """Nobody knows how long the first step takes."""
    assert Pace().expected_s(7) is None


@given(st.lists(SECONDS, min_size=1))
def test_expectation_lies_between_what_was_measured(times):
    """A moving average of steps of one size."""
    pace = Pace()
    for seconds in times:
        pace.measured(1, seconds)
    assert min(times) * 0.999 <= pace.expected_s(1) <= max(times) * 1.001


def test_unknown_sizes_follow_from_known_ones():
    """A longer step is expected in proportion to the next shorter one; a shorter one like the shortest known."""
    pace = Pace()
    pace.measured(4, 1.0)
    assert pace.expected_s(64) == 16.0 and pace.expected_s(1) == 1.0
    pace.measured(64, 2.0)
    assert pace.expected_s(64) == 2.0 and pace.expected_s(128) == 4.0


def make(expected_s=None, now=100.0) -> Watch:
    return Watch(now, expected_s=expected_s, late_s=0.5, stuck_s=120.0)


def test_a_step_is_late_after_four_times_its_time_but_not_at_once():
    """Fast steps have half a second; without an expectation there is more."""
    assert not make(0.01).is_late(100.49) and make(0.01).is_late(100.5)
    assert not make(1.0).is_late(103.9) and make(1.0).is_late(104.0)
    assert not make().is_late(101.9) and make().is_late(102.0)


def test_what_is_heard_starts_the_clocks_anew():
    """Outputs, or a reason to wait."""
    watch = make(0.01)
    watch.heard(100.4)
    assert not watch.is_late(100.8) and watch.is_late(100.9)
    assert not watch.is_stuck(100.4 + MIN_STUCK_S - 0.1) and watch.is_stuck(100.4 + MIN_STUCK_S)


def test_progress_delays_giving_up_but_not_the_next_question():
    """A server that does something is not stuck, and is asked again."""
    watch = make(0.01)
    watch.asked(100.5)
    watch.advanced(100.6)
    assert watch.is_late(101.0) and not watch.is_stuck(110.5) and watch.is_stuck(110.6)


@given(st.one_of(st.none(), SECONDS), SECONDS)
def test_the_next_check_is_when_something_is_due(expected_s, asked_after):
    """Whoever sleeps until then misses nothing, and wakes for a reason."""
    watch = make(expected_s)
    watch.asked(100.0 + asked_after)
    due = watch.next_check
    assert watch.is_late(due) or watch.is_stuck(due)
    assert not watch.is_late(due - 0.01) and not watch.is_stuck(due - 0.01)


def test_one_failure_is_no_reason_to_pause_but_more_are():
    """Another server may be ready; missing blocks need time; pauses grow up to a bound."""
    patience = Patience(1000.0)
    assert patience.failed(0.0, GONE) is None and patience.pause_s(GONE) == 0.0
    pauses = []
    for _ in range(20):
        assert patience.failed(0.0, GONE) is None
        pauses.append(patience.pause_s(GONE))
    assert pauses == sorted(pauses) and pauses[0] > 0 and pauses[-1] == MAX_BACKOFF_S
    missing = RouteNotFound("nobody")
    other = Patience(1000.0)
    other.failed(0.0, missing)
    assert other.pause_s(missing) > 0


def test_patience_counts_from_the_first_trouble_since_the_last_progress():
    """Long work is no trouble; outputs forgive what was before."""
    patience = Patience(10.0)
    assert not patience.is_over(1e9)
    patience.waits(50.0)
    assert not patience.is_over(60.0) and patience.is_over(60.1)
    assert patience.failed(61.0, GONE) is GONE
    patience.progressed()
    assert not patience.is_over(1e9) and patience.failed(1e9, GONE) is None


def test_time_stands_still_for_patience_while_a_server_catches_up():
    """But not from a failure to the next word of progress, and not while a server waits for room."""
    patience = Patience(10.0)
    patience.advanced(0.0)
    assert patience.failed(100.0, GONE) is None
    for now in range(103, 200):
        patience.advanced(float(now))
    assert patience.failed(200.0, GONE) is None  # 3 s, and 1 s
    patience.advanced(203.0)
    patience.waits(204.0)
    patience.advanced(205.9)
    assert not patience.is_over(205.9) and patience.failed(206.1, GONE) is GONE


@given(st.lists(st.floats(0.1, 5.0), min_size=40, max_size=40))
def test_a_server_that_gets_as_far_again_and_again_is_given_up(times):
    """However far it gets each time."""
    patience, now = Patience(1.0), 0.0
    for seconds in times:
        if patience.failed(now, GONE) is GONE:
            return
        patience.advanced(now + 0.1)
        patience.advanced(now + 0.1 + seconds)
        now += 0.1 + seconds
    raise AssertionError("patient for ever")


def test_refusals_that_blame_the_request_are_believed_in_the_end():
    """A stale record explains one or two of them."""
    patience, refusal = Patience(1000.0), InvalidRequest("no")
    assert [patience.failed(0.0, refusal) for _ in range(MAX_REFUSALS)] == [None] * MAX_REFUSALS
    assert patience.failed(0.0, refusal) is refusal


def test_waiting_for_what_comes_nearer_is_no_trouble():
    """The time begins anew with each piece of it; a failure is still one more than before."""
    patience = Patience(10.0)
    for now in range(100, 200, 8):
        patience.waits(float(now))
        assert not patience.is_over(now + 9.0)
        patience.nears()
    assert not patience.is_over(1000.0)
    patience.failed(1000.0, GONE)
    patience.nears()
    patience.failed(1001.0, GONE)
    assert patience.pause_s(GONE) > 0
