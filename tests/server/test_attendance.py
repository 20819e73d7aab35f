"""Who is there: by records as of when they were read, by answers, and not by what is only announced."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.directory import Seen
from swarm.registry import LATE_S, TTL_PERIODS, ServerRecord
from swarm.server.attendance import FORGET_S, HEARD_S, NEW_AGAIN_S, NEWS_S, PROMISE_S, Attendance, Standing
from swarm.types import ServerState
from tests.swarm.test_directory import record

UNIX = time.time()


def seen(peer_id="a", *, age_s=0.0, state=ServerState.ONLINE) -> Seen:
    """A record that was that old when it was read."""
    written = record(peer_id, state=state, period_s=20.0, expires_at=UNIX - age_s + TTL_PERIODS * 20.0)
    return Seen(written, UNIX)


def names(*peer_ids) -> list[ServerRecord]:
    return [record(peer_id) for peer_id in peer_ids]


@given(st.floats(0.0, 59.0), st.floats(0.0, 1e6))
def test_a_record_is_late_by_when_it_was_read_whatever_the_time_is_now(age_s, now):
    """In a large swarm that was minutes ago."""
    is_late = age_s > 20.0 + LATE_S + 1e-6
    if abs(age_s - 20.0 - LATE_S) > 1e-3:
        assert Attendance().of(seen(age_s=age_s), now) is (Standing.LATE if is_late else Standing.EXPECTED)


@given(st.lists(st.tuples(st.floats(0.1, 60.0), st.booleans(), st.floats(0.0, 59.0)), max_size=30))
def test_what_a_server_announces_never_outweighs_that_it_does_not_answer(events):
    """Asked at any times: it is there exactly if it answered the last time, or was never asked."""
    attendance, now = Attendance(), 0.0
    for pause_s, answers, age_s in events:
        now += pause_s
        attendance.announced(names("a"), now)
        attendance.asked(names("a"), () if answers else ("a",), now)
        assert attendance.of(seen(age_s=age_s), now).is_there == answers
        assert ("a" in attendance.silent) == (not answers)
    assert attendance.of(seen("other"), now) is Standing.EXPECTED


@pytest.mark.parametrize("every", [1, 2])
def test_silence_is_news_for_a_while_and_not_again_soon(every):
    """Whether it never answers, or only every other time."""
    attendance, doubts = Attendance(), []
    for index in range(120):
        now = 10.0 * index
        attendance.announced(names("a"), now)
        attendance.asked(names("a"), ("a",) if index % every == 0 else (), now)
        doubts += [now] if attendance.of(seen(), now) is Standing.SILENT else []
    assert [at for at in doubts if at < NEW_AGAIN_S] == [10.0 * index for index in range(0, 10, every)]
    if every == 1:
        assert doubts[-1] == NEWS_S


def test_an_answer_outweighs_a_late_record_for_some_seconds():
    """A server that is slow to announce itself is there; when it was heard long ago, the record counts again."""
    attendance = Attendance()
    attendance.asked(names("a"), (), 100.0)
    assert attendance.of(seen(age_s=40.0), 100.0 + HEARD_S) is Standing.HEARD
    assert attendance.of(seen(age_s=40.0), 101.0 + HEARD_S) is Standing.LATE


@pytest.mark.parametrize("is_announced", [False, True])
def test_silence_is_remembered_while_it_is_announced_and_for_an_hour(is_announced):
    """Else a record that expires here and is read again would absolve its server."""
    attendance = Attendance()
    attendance.asked(names("a"), ("a",), 0.0)
    attendance.announced([], FORGET_S)
    assert attendance.of(seen(), FORGET_S) is Standing.GONE
    attendance.announced(names("a") if is_announced else [], FORGET_S + 1.0)
    assert attendance.of(seen(), FORGET_S + 1.0) is (Standing.GONE if is_announced else Standing.EXPECTED)


def test_who_says_for_too_long_that_it_loads_holds_nothing_until_it_says_that_it_serves():
    """From when it was first seen to say so; a move later on has its own time."""
    attendance, loads = Attendance(), record("a", state=ServerState.JOINING)
    for now in (0.0, PROMISE_S, PROMISE_S + 1.0):
        attendance.announced([loads], now)
        attendance.asked([loads], (), now)
        assert attendance.of(seen(state=ServerState.JOINING), now).is_there == (now <= PROMISE_S)
    attendance.announced([], PROMISE_S + 2.0)
    attendance.announced([loads], PROMISE_S + 3.0)
    assert attendance.of(seen(state=ServerState.JOINING), PROMISE_S + 3.0) is Standing.GONE
    assert attendance.of(seen(), PROMISE_S + 3.0).is_there
    attendance.announced(names("a"), 2000.0)
    attendance.announced([loads], 3000.0)
    assert attendance.of(seen(state=ServerState.JOINING), 3000.0).is_there
