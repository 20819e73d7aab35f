"""The past in a file: what goes in comes out, twice is once, nothing grows without bound."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.errors import ConfigError
from swarm.health.compose import compose_model
from swarm.health.history import HOUR_S, KEPT_S, MAX_PEERS, MINUTE_S, WINDOWS, History
from swarm.health.state import Model
from tests.health.fakes import DIGEST, NOW, make_answer, make_entry, make_record, make_state, peer_ids

HOUR, DAY, WEEK = WINDOWS
A, B = peer_ids(2)


@pytest.fixture
def history() -> Iterator[History]:
    history = History(":memory:")
    yield history
    history.close()


def model_with(*, at: float = NOW, servers: tuple[str, ...] = (A, B), **info) -> Model:
    """Servers of all six blocks, with these counters."""
    records = [make_record(peer, "0:6", public_name=f"name-{peer[-4:]}") for peer in servers]
    answers = {record.peer_id: make_answer(record, **info) for record in records}
    return compose_model(make_entry(6), records, answers, canary=None, before=None, now=at)


def record(history: History, minute: int, **info) -> None:
    """Record that many minutes after NOW."""
    at = NOW + minute * MINUTE_S
    history.record(make_state(model_with(at=at, **info), now=at))


def test_each_minute_is_a_point_and_the_others_are_gaps(history: History):
    """Newest last; counters become what was gained since the minute before."""
    record(history, 0, num_opened=50, num_failed=0, tokens_per_s=10.0)
    record(history, 1, num_opened=57, num_failed=1, tokens_per_s=30.0)
    points = history.trend(DIGEST, HOUR, NOW + MINUTE_S)
    assert len(points) == HOUR.num_points and points[:-2] == (None,) * 58
    first, second = points[-2:]
    assert first is not None and second is not None
    assert (first.opened, first.failed, first.tokens_per_s) == (0, 0, 20.0)
    assert (second.opened, second.failed, second.tokens_per_s) == (14, 2, 60.0)
    assert second.coverage == 1.0 and second.usable == 1.0 and second.first_ms is None


def test_longer_windows_sum_and_average(history: History):
    """A quarter of an hour is one point of the day."""
    start = 15 - int(NOW % (15 * MINUTE_S)) // MINUTE_S
    for minute in range(15):
        record(history, start + minute, num_opened=50 + minute, tokens_per_s=float(minute))
    last = NOW + (start + 14) * MINUTE_S
    [point] = [it for it in history.trend(DIGEST, DAY, last) if it is not None]
    assert point.opened == 28 and point.tokens_per_s == pytest.approx(14.0)
    assert sum(it is not None for it in history.trend(DIGEST, WEEK, last)) == 1
    assert history.trend("ff" * 32, DAY, last) == (None,) * DAY.num_points


def test_a_server_that_began_anew_does_not_count_backwards(history: History):
    """After a restart its counters are small again: all of it is new."""
    record(history, 0, num_opened=1000)
    record(history, 1, num_opened=3)
    assert history.trend(DIGEST, HOUR, NOW + MINUTE_S)[-1].opened == 6


def test_a_minute_recorded_twice_is_recorded_once(tmp_path: Path):
    """Two pages on one file, or a restart within a minute, change nothing."""
    one, two = History(tmp_path / "history"), History(tmp_path / "history")
    for minute in range(3):
        for page in (one, two):
            record(page, minute, num_tokens=1000 * (minute + 1))
    points = [it for it in two.trend(DIGEST, HOUR, NOW + 2 * MINUTE_S) if it is not None]
    assert len(points) == 3
    first, second = one.contributors(NOW + 3 * MINUTE_S)
    assert first.block_hours == second.block_hours == pytest.approx(3 * 6 / 60)
    assert first.num_tokens == 2000
    one.close()
    two.close()


def test_contributors_are_ranked_by_what_was_seen_not_by_what_they_say(history: History):
    """Blocks times minutes; an absurd claim of tokens moves nobody up, and breaks no sum."""
    for minute in range(2):
        record(history, minute, servers=(A,))
    for minute in range(2, 4):
        record(history, minute, servers=(A, B), num_tokens=1 << 62 if minute == 3 else 0)
    first, second = history.contributors(NOW + 4 * MINUTE_S)
    assert first.name == f"name-{A[-4:]}" and first.block_hours == pytest.approx(4 * 6 / 60)
    assert second.block_hours == pytest.approx(2 * 6 / 60)
    assert len(history.contributors(NOW, limit=1)) == 1


def test_what_is_old_is_deleted(history: History):
    """Eight days later nothing is left of the first minute."""
    record(history, 0)
    late = int(KEPT_S / MINUTE_S) + 61
    record(history, late)
    assert history.trend(DIGEST, HOUR, NOW)[-1] is None
    rows = history._file.execute("SELECT count(*), min(hour) FROM seen").fetchone()
    assert rows == (2, int(NOW + late * MINUTE_S) // HOUR_S)


def test_addresses_are_remembered_for_the_same_initial_peers_only(history: History):
    """Else a page with two swarms in one file would join them together."""
    history.remember(["a", "b"], [f"addr-{number}" for number in range(MAX_PEERS + 10)], NOW)
    assert set(history.recall(["b", "a"], limit=100)) == {f"addr-{number}" for number in range(MAX_PEERS)}
    assert history.recall(["a"]) == ()
    history.remember(["a", "b"], ["fresh"], NOW + 60)
    assert history.recall(["a", "b"], limit=1) == ("fresh",)
    history.remember(["a", "b"], ["later"], NOW + KEPT_S + 120)
    assert history.recall(["a", "b"]) == ("later",)


def test_a_file_that_is_no_history_is_refused_in_one_line(tmp_path: Path):
    """Something else, a later format, or a place where nothing can be written."""
    (tmp_path / "text").write_text("hello" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        History(tmp_path / "text")
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(ConfigError, match="format 99"):
        History(tmp_path / "later")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="history file"):
        History(tmp_path / "file" / "below")


def test_it_goes_on_where_it_ended(tmp_path: Path):
    """Closed and opened again, the file has what it had."""
    one = History(tmp_path / "sub" / "history")
    record(one, 0, tokens_per_s=7.0)
    one.close()
    again = History(tmp_path / "sub" / "history")
    assert again.trend(DIGEST, HOUR, NOW)[-1].tokens_per_s == 14.0
    again.close()


def test_an_empty_model_is_recorded_too(history: History):
    """Nobody serves anything: coverage 0, and no contributor."""
    history.record(make_state(compose_model(make_entry(6), [], {}, canary=None, before=None, now=NOW)))
    assert history.trend(DIGEST, HOUR, NOW)[-1].coverage == 0.0
    assert history.contributors(NOW) == ()
