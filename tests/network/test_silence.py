"""Peers that do not answer: left out until they do, asked again ever more seldom, and forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.network import silence
from swarm.network.silence import CHECK_S, MAX_SILENT, NUM_CHECKS, Silent


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_silent_peer_is_left_out_until_it_answers():
    """Calls that were made at the same time count once."""
    clock = Clock()
    silent = Silent(clock)
    for _ in range(3):
        silent.register_failure("a")
    assert "a" in silent and silent.doubtful == ["a"]
    assert silent.due(8) == []
    clock.now = CHECK_S
    assert silent.due(8) == ["a"] and silent.due(8) == []
    assert "a" in silent and silent.doubtful == []
    silent.register_success("a")
    assert "a" not in silent and len(silent) == 0


def test_it_is_asked_ever_more_seldom_and_then_forgotten():
    """Twice as long each time."""
    clock = Clock()
    silent = Silent(clock)
    silent.register_failure("a")
    asked = []
    while "a" in silent:
        clock.now += CHECK_S
        asked += [clock.now for _ in silent.due(8)]
    pauses = [after - before for before, after in zip([0.0, *asked], asked, strict=False)]
    assert pauses == [CHECK_S * 2**index for index in range(NUM_CHECKS)]


def test_a_sign_of_life_brings_the_next_question_forward():
    """But not at once: who can send to us, and we not to it, would be asked all the time."""
    clock = Clock()
    silent = Silent(clock)
    silent.register_failure("a")
    for clock.now in (CHECK_S, 3 * CHECK_S):
        assert silent.due(8) == ["a"]
    clock.now += 1.0
    silent.heard("a")
    assert silent.due(8) == [] and "a" in silent
    clock.now += CHECK_S
    assert silent.due(8) == ["a"]
    silent.heard("nobody")


def test_who_refused_at_once_is_in_no_doubt():
    """It need not be slow."""
    silent = Silent(Clock())
    silent.register_failure("a")
    silent.is_gone("a")
    silent.is_gone("b")
    assert "a" in silent and "b" not in silent and silent.doubtful == []


@given(st.integers(0, 40), st.integers(1, 8))
def test_no_more_are_asked_at_once_than_allowed_and_all_in_time(count: int, limit: int):
    """Those that fell silent first come first."""
    clock = Clock()
    silent = Silent(clock)
    for peer in range(count):
        silent.register_failure(peer)
    clock.now = CHECK_S
    asked: list[int] = []
    while chosen := silent.due(limit):
        assert len(chosen) <= limit
        asked += chosen
    assert asked == list(range(count))


def test_strangers_can_not_fill_the_memory(monkeypatch):
    """Answers may name any number of peers that are not there."""
    monkeypatch.setattr(silence, "MAX_SILENT", 10)
    assert MAX_SILENT > 10
    silent = Silent(Clock())
    for peer in range(100):
        silent.register_failure(peer)
    assert len(silent) == 10 and 99 in silent
    silent.clear()
    assert len(silent) == 0
