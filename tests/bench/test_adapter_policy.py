"""The traces are as published, the policies do what they say; the benchmark itself needs a quiet machine."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))

from adapter_simulation import AlwaysMerged, Everybody, Limited, StepTimes, Switching, simulate
from adapter_traces import dlora, punica, slora
from merging import HORIZON_S, MARGIN, MEMORY_S, Merging

TIMES = StepTimes(
    rows=(1, 32), base=(0.04, 0.12), per_prompt_token=0.002, alone=(0.005, 0.0002), mixed=(0.005, 0.0004, 0.0015),
    build_s=0.4,
)  # fmt: skip
AT = {"rate": 20.0, "duration": 100.0}


@pytest.mark.parametrize(("n", "alpha", "share"), [(5, 0.1, 0.85), (2, 0.1, 0.93), (2, 1.0, 0.5), (1, 1.0, 1.0)])
def test_slora_traces_have_the_published_skew(n, alpha, share):
    """P(top adapter) = n ** -alpha."""
    counts = Counter(request.adapter for request in slora(n, alpha, 1, **AT))
    assert counts[0] / counts.total() == pytest.approx(share, abs=0.05) and max(counts) < n


@pytest.mark.parametrize("trace", [slora(8, 1, 4, **AT), dlora(8, **AT), punica("skewed", 8, **AT)])
def test_requests_come_in_order_and_ask_for_something(trace):
    """Times ascend, at about the rate that was asked for; no length is zero."""
    times = [request.arrives for request in trace]
    assert times == sorted(times) and len(trace) == pytest.approx(2000, rel=0.15)
    assert all(request.prompt >= 1 and request.answer >= 1 for request in trace)


def test_punica_popularities_use_as_many_adapters_as_they_say():
    """One, the square root, all."""
    used = {kind: len({it.adapter for it in punica(kind, 16, **AT)}) for kind in ("identical", "uniform", "distinct")}
    assert used == {"identical": 1, "uniform": 4, "distinct": 16}


def test_a_copy_is_built_once_it_will_be_paid_back():
    """Not at the first batch of an adapter, and only once while nothing changes."""
    policy = Merging(build_s=0.4)
    built = [policy.step(0, 0.005, step * 0.05) for step in range(1000)]
    assert sum(built) == policy.num_builds == 1 and not built[0] and policy.merged == 0


def test_two_adapters_in_turn_do_not_make_copies_in_turn():
    """Hysteresis: whoever saves as much as the other does not take its place."""
    policy = Merging(build_s=0.4)
    for step in range(4000):
        policy.step(step // 100 % 2, 0.005, step * 0.05)
    assert policy.num_builds <= 2


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.floats(0, 0.02), st.floats(0.01, 1.0)), max_size=200))
def test_a_copy_is_never_built_for_less_than_it_costs(steps):
    """Whatever comes: at each build, what the adapter saved lately promises MARGIN times its cost."""
    policy, now, saved = Merging(build_s=0.2), 0.0, Counter()
    for adapter, saves_s, gap in steps:
        now += gap
        saved.update({adapter: saves_s} if adapter is not None else {})
        if policy.step(adapter, saves_s, now):
            assert saved[adapter] / MEMORY_S * HORIZON_S > MARGIN * policy.build_s


def test_switching_gains_with_one_adapter_and_never_loses():
    """Merged all the time, the server changes copies instead of serving."""
    for n, gains in ((1, True), (5, False)):
        trace, ranks = slora(n, 1, 1, rate=12.0, duration=40.0), [16] * n
        rates = {
            policy.name: simulate(trace, TIMES, policy, ranks, 210, 40.0)["tokens_per_s"]
            for policy in (Everybody(), Switching(TIMES.build_s), AlwaysMerged(TIMES.build_s))
        }
        assert rates["switching"] >= 0.99 * rates["unmerged"]
        assert (rates["switching"] > 1.05 * rates["unmerged"]) == gains
        assert (rates["always merged"] > rates["unmerged"]) == gains


def test_the_servers_limit_loses_nothing_on_skewed_traces():
    """The simulation that decided how much of its service a batch may lose."""
    trace, ranks = slora(32, 0.1, 1, rate=12.0, duration=60.0), [8] + [128] * 31
    everybody = simulate(trace, TIMES, Everybody(), ranks, 210, 60.0)
    limited = simulate(trace, TIMES, Limited(ranks, 210), ranks, 210, 60.0)
    assert limited["tokens_per_s"] >= 0.98 * everybody["tokens_per_s"]
    assert limited["adapters_per_step"] < everybody["adapters_per_step"]
