"""What a server believes of its own place in the network, whatever it is told; pure."""

from itertools import pairwise
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from swarm.transport.standing import (
    CONFIRM_S,
    HOLD_S,
    JITTER,
    MAX_HOLD_S,
    MAX_UNASKED_S,
    NUM_FOUND,
    NUM_LOST,
    PERIOD_S,
    Standing,
    Verdict,
)

OUTSIDE, ELSEWHERE, STRANGER, NEIGHBOUR = "8.8.8.8", "8.8.4.4", "1.1.1.1", "192.168.1.7"
LONGEST = 1.0 + JITTER


def verdict(is_reachable: bool, host: str = OUTSIDE) -> Verdict:
    return Verdict(is_reachable=is_reachable, host=host, num_answers=3)


verdicts = st.sampled_from(
    [None, *(verdict(yes, host) for yes in (True, False) for host in (OUTSIDE, ELSEWHERE, NEIGHBOUR))]
)


def standing(first: Verdict | None, seed: int = 0) -> Standing:
    return Standing(first, Random(seed), 0.0)


def state(known: Standing) -> tuple[bool, str]:
    """What others would be told."""
    return known.is_reachable, known.host if known.is_reachable else ""


def asked(known: Standing, answer: Verdict | None) -> float:
    """Ask when it is due; when that was."""
    now = known.due_at
    known.heard(answer, now)
    return now


@given(verdicts, verdicts, st.integers(0, 9))
def test_what_is_so_is_believed_in_the_end_and_soon(first: Verdict | None, truth: Verdict | None, seed: int):
    """A router that has changed for good is noticed after one period and a few questions; then there is peace."""
    known, now = standing(first, seed), 0.0
    narrow = known.host not in ("", NEIGHBOUR) and truth is not None and truth.host == NEIGHBOUR
    if truth is not None and not narrow:
        for _ in range(NUM_FOUND):
            if state(known) != (right := (truth.is_reachable, truth.host if truth.is_reachable else "")):
                now = asked(known, truth)
        assert state(known) == right and now <= LONGEST * (PERIOD_S + (NUM_FOUND - 1) * CONFIRM_S)
    before = state(known)
    for _ in range(5):
        gap = known.due_at - now
        assert gap >= (1 - JITTER) * PERIOD_S
        now = asked(known, truth)
    assert state(known) == before


@given(verdicts, verdicts, st.integers(1, 20))
def test_a_word_against_what_is_known_changes_nothing_when_the_next_one_takes_it_back(
    first: Verdict | None, wrong: Verdict | None, num: int
):
    """One who lies among those who are asked may decide one round."""
    known = standing(first)
    right = Verdict(is_reachable=known.is_reachable, host=known.host or OUTSIDE, num_answers=3)
    if not known.host:
        for _ in range(NUM_LOST):
            asked(known, right)
    before = state(known)
    for _ in range(num):
        asked(known, wrong)
        asked(known, right)
        assert state(known) == before


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "hint", "came", "wait"]), verdicts, st.floats(0, 300)), max_size=400),
    st.integers(0, 9),
)
def test_whatever_happens_changes_are_few_and_questions_rare(
    events: list[tuple[str, Verdict | None, float]], seed: int
):
    """Seven changes in any hour, one question per CONFIRM_S, and the time of the next one is always known."""
    known, now, changes, questions = standing(verdict(True), seed), 0.0, list[float](), list[float]()
    for kind, said, seconds in events:
        now += seconds
        before = state(known)
        if kind == "hint":
            known.hint(now)
        elif kind == "came":
            known.came(STRANGER, now)
        if kind in ("ask", "hint") and now >= known.due_at:
            known.heard(said, now)
            questions.append(now)
        if state(known) != before:
            changes.append(now)
        assert known.due_at <= now + LONGEST * max(PERIOD_S, MAX_HOLD_S + CONFIRM_S)
    assert all(sum(at <= later < at + 3600.0 for later in changes) <= 7 for at in changes)
    assert all(b - a >= (1 - JITTER) * CONFIRM_S for a, b in pairwise(questions))


def test_a_router_that_comes_and_goes_is_waited_for_ever_longer():
    """Being lost is told at once; to be found again takes two minutes, then eight, then half an hour."""
    known, pauses, found_at = standing(verdict(True)), list[float](), 0.0
    for _ in range(3):
        while known.is_reachable:
            known.hint(found_at)
            lost_at = asked(known, verdict(False))
        while not known.is_reachable:
            found_at = asked(known, verdict(True))
        pauses.append(found_at - lost_at)
    assert [pause >= HOLD_S * 4**n for n, pause in enumerate(pauses)] == [True] * 3


def test_who_connects_from_outside_proves_that_we_can_be_reached():
    """Nobody need be asked then; neighbours and our own router prove nothing."""
    known = standing(verdict(True))
    before = known.due_at
    for host in (NEIGHBOUR, OUTSIDE, "127.0.0.1"):
        known.came(host, before)
        assert known.due_at == before
    known.came(STRANGER, before)
    assert known.due_at >= before + (1 - JITTER) * PERIOD_S


def test_one_of_two_ports_that_closes_is_noticed_however_many_come_through_the_other():
    """What was said against us is asked for again soon, whoever connects meanwhile."""
    known, now = standing(verdict(True)), 0.0
    while known.is_reachable:
        now += 15.0
        known.came(STRANGER, now)
        if now >= known.due_at:
            known.heard(verdict(False), now)
        assert now <= MAX_UNASKED_S + 2 * LONGEST * CONFIRM_S


def test_what_speaks_for_a_change_is_asked_for_until_somebody_can_tell():
    """Soon at first, then ever more seldom; a verdict that was half confirmed waits for no quarter of an hour."""
    known = standing(verdict(True))
    known.heard(verdict(False), 200.0)
    asked(known, None)
    assert known.due_at <= 200.0 + 2 * LONGEST * CONFIRM_S
    pauses = [b - a for a, b in pairwise(asked(known, None) for _ in range(12))]
    assert pauses[0] <= 3 * CONFIRM_S and (1 - JITTER) * PERIOD_S <= pauses[-1] <= LONGEST * PERIOD_S
    asked(known, verdict(False))
    assert not known.is_reachable


def test_a_hint_that_comes_while_others_are_asked_has_them_asked_again():
    """What they say may be of before; and nobody who could tell is no answer to it."""
    known = standing(verdict(True))
    known.hint(100.0)
    known.heard(None, 120.0, asked_at=110.0)
    assert known.due_at <= 120.0 + LONGEST * CONFIRM_S
    known.hint(150.0)
    known.heard(verdict(True), 155.0, asked_at=145.0)
    assert known.due_at <= 155.0 + LONGEST * CONFIRM_S
    known.heard(verdict(True), 180.0, asked_at=175.0)
    assert known.due_at >= 180.0 + (1 - JITTER) * PERIOD_S


def test_others_are_asked_every_hour_however_many_connect():
    """Who connects to one of our two ports says nothing of the other."""
    known = standing(verdict(True))
    for now in range(0, 7200, 60):
        known.came(STRANGER, float(now))
        assert known.due_at <= MAX_UNASKED_S
    assert known.due_at == MAX_UNASKED_S


def test_in_a_private_network_neighbours_are_the_world():
    """Nobody has an address that all the world knows; then a connection from any other machine counts."""
    known = standing(verdict(True, "10.0.0.3"))
    before = known.due_at
    known.came("127.0.0.1", 10.0)
    assert known.due_at == before
    known.came("10.0.0.9", before)
    assert known.due_at > before


def test_nothing_is_known_until_somebody_says_or_shows_it():
    """The first server of a swarm takes itself for reachable, but has nobody try in vain before."""
    silent, shown = standing(None), standing(None)
    assert silent.is_reachable and not silent.is_known
    assert not silent.heard(None, 1.0) and not silent.is_known
    assert not shown.came(NEIGHBOUR, 1.0)
    assert shown.came(STRANGER, 1.0) and shown.is_known
    assert not shown.came(STRANGER, 2.0)


def test_a_hint_has_us_ask_soon_but_not_at_once_again():
    """One that comes right after an answer waits; while a hidden server is held, it waits for that."""
    known = standing(verdict(True))
    known.hint(1.0)
    assert known.due_at == CONFIRM_S
    known.hint(500.0)
    assert known.due_at == CONFIRM_S  # it is overdue
    for now in (600.0, 700.0):
        known.heard(verdict(False), now)
    assert not known.is_reachable
    known.came(STRANGER, 710.0)
    assert known.due_at == 700.0 + HOLD_S
