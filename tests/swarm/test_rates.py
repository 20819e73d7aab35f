"""Token buckets: nobody does more than the rate allows, and a bounded number of keys is remembered."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.rates import Rate, Rates

RATE = Rate(burst=5, per_s=2)


@given(st.lists(st.floats(0, 3), max_size=60))
def test_no_key_ever_does_more_than_its_burst_and_rate(pauses: list[float]):
    """In any stretch of time, however the attempts are spread."""
    rates, now, taken = Rates(RATE), 0.0, list[float]()
    for pause in pauses:
        now += pause
        if rates.charge("key", now):
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= RATE.burst + (taken[last] - taken[first]) * RATE.per_s + 1e-6


@given(st.lists(st.floats(0, 3), max_size=30))
def test_the_pause_that_is_named_is_long_enough(pauses: list[float]):
    """Who waits for it is served; who was refused is charged nothing."""
    rates, now = Rates(RATE), 0.0
    for pause in pauses:
        now += pause
        if not rates.charge("key", now):
            wait_s = rates.retry_after_s("key", now)
            assert wait_s > 0
            now += wait_s + 1e-6
            assert rates.charge("key", now)


def test_keys_do_not_share():
    """One that is used up takes nothing from another."""
    rates = Rates(RATE)
    while rates.charge("a", 0.0):
        pass
    assert rates.charge("b", 0.0) and rates.retry_after_s("b", 0.0) == 0


def test_only_so_many_keys_are_remembered():
    """The least recently charged is forgotten."""
    rates = Rates(RATE, max_keys=2)
    for key in ("a", "b", "a", "c"):
        rates.charge(key, 0.0, cost=2)
    assert len(rates) == 2
    assert not rates.charge("a", 0.0, cost=2) and rates.charge("b", 0.0, cost=5)


def test_a_cost_above_the_burst_is_never_allowed():
    """Whatever the time."""
    assert not Rates(RATE).charge("a", 1e9, cost=6)
