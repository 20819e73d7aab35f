"""Who sits a batch out for its adapter: by cost, never for long, never against fairness, and nobody without one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.adapter_limit import GUARD_S, AdapterLimit
from swarm.server.scheduler import Scheduler
from swarm.server.step_cost import NO_ADAPTERS, AdapterLoad, StepCost
from tests.server.engine import Engine
from tests.server.test_fairness import BOUND, Simulation, loads

RANKS = {"small": 16, "large": 640, **{f"s{i}": 16 for i in range(40)}, **{f"l{i}": 640 for i in range(40)}}


def adapter_seconds(load):
    """A machine on which a rank row costs as much as a tenth of a decode row."""
    return 0.0 if load == NO_ADAPTERS else 0.002 + 0.0001 * load.num_adapters + 0.00005 * load.num_ranks


def machine(**options):
    """An engine with adapters whose costs are known from some batches."""
    engine = Engine(ranks=RANKS, adapter_seconds=adapter_seconds, num_pages=2048, **options)
    for rows, load in [
        (rows, AdapterLoad(count, count * rank))
        for rows in (1, 8, 32)
        for count, rank in ((0, 0), (1, 16), (1, 640), (4, 16), (3, 300), (2, 640))
    ]:
        seconds = 0.01 + 0.0005 * rows + adapter_seconds(load)
        engine.scheduler.costs.observe(rows, 0, seconds, load)
    return engine


def decoding(engine, adapters, clients=None):
    """Sessions of these adapters with a decode step each."""
    sessions = []
    for number, adapter in enumerate(adapters):
        client = "a" if clients is None else clients[number]
        session = engine.open(client, adapters=() if adapter is None else (adapter,))
        engine.decode(session)
        sessions.append(session)
    return sessions


def in_batch(batch):
    return {row.session for row in batch.rows}


def test_adapters_that_cost_little_are_all_let_in():
    """The limit follows from costs: small adapters, one row each, share a batch."""
    engine = machine()
    sessions = decoding(engine, [f"s{i}" for i in range(30)])
    assert in_batch(engine.turn()) == set(sessions)


def test_single_rows_of_large_adapters_sit_out_a_large_batch():
    """They would double its time for a tenth of its rows; the batch serves more per second without them."""
    engine = machine()
    hot = decoding(engine, ["small"] * 20)
    cold = decoding(engine, ["l0", "l1"])
    assert in_batch(engine.turn()) == set(hot)
    assert in_batch(engine.turn()) == set(cold)  # nobody else is there: the server isn't idle


def test_rows_enough_pay_for_a_large_adapter():
    """What counts is the adapter's cost per row."""
    engine = machine()
    few = decoding(engine, ["small"] * 8)
    many = decoding(engine, ["large"] * 32)
    assert in_batch(engine.turn()) == {*few, *many}


def test_who_has_sat_out_for_the_guard_is_in_the_next_batch():
    """However much it costs."""
    engine = machine()
    hot = decoding(engine, ["small"] * 20)
    (cold,) = decoding(engine, ["large"])
    began = engine.now
    while cold not in in_batch(engine.turn()):
        assert engine.now - began < 2 * GUARD_S
        for session in hot:
            if not session.jobs:
                engine.decode(session)
    assert engine.now - began >= GUARD_S


def test_a_client_that_would_fall_behind_is_in_the_next_batch():
    """Costs don't outweigh fairness: lead is as far as others get ahead."""
    engine = machine(token_budget=64)
    decoding(engine, ["small"] * 20, ["hot"] * 20)
    (cold,) = decoding(engine, ["large"], ["cold"])
    engine.scheduler.counters.charge("hot", 64.0)
    assert cold in in_batch(engine.turn())


def test_a_session_of_several_adapters_is_in_or_out_as_a_whole():
    """Its rows make one step, which nobody gains from having half of."""
    engine = machine()
    hot = decoding(engine, ["small"] * 20)
    mixed = engine.open(rows=3, adapters=("small", None, "large"))
    engine.decode(mixed)
    assert in_batch(engine.turn()) == set(hot)
    assert [row.session for row in engine.turn().rows] == [mixed] * 3


def test_traffic_without_adapters_never_asks():
    """No adapter's ranks are looked up, and the cost model has the three terms that it has without adapters."""

    def never(adapter):
        raise AssertionError(f"{adapter} was looked up")

    engine = Engine()
    engine.scheduler = Scheduler(engine.memory, token_budget=64, num_ranks=never)
    prompt = engine.open()
    engine.prompt(prompt, 100)
    for _ in range(3):
        decoding(engine, [None] * 5)
        assert engine.turn().adapters == NO_ADAPTERS
    assert len(engine.scheduler.costs._solve()) == 3


def test_rows_without_adapters_never_sit_out():
    """They are in every batch, whatever adapters others bring."""
    engine = machine()
    plain = decoding(engine, [None] * 3)
    decoding(engine, ["large"] * 20 + [f"l{i}" for i in range(10)])
    assert set(plain) <= in_batch(engine.turn())


def test_an_adapter_that_a_prompt_brings_takes_its_part_of_the_tokens():
    """Decode rows are not prolonged by more than they are for prompts without adapters."""
    sizes = {}
    for adapter in (None, "small", "large"):
        engine = machine(token_budget=512)
        engine.scheduler.costs.observe(8, 16, 0.01 + 0.0005 * 8 + 0.0005 * 16)
        decoding(engine, ["small"] * 8)
        prompt = engine.open(adapters=() if adapter is None else (adapter,))
        engine.prompt(prompt, 400)
        batch = engine.turn()
        sizes[adapter] = batch.num_tokens - batch.num_decode
    assert sizes[None] == sizes["small"] > sizes["large"] > 0


adapters = st.sampled_from([None, None, "small", "s1", "s2", "large", "l1", "l2", "l3"])
loads_with_adapters = st.lists(adapters, min_size=60, max_size=60)


def simulate(loads, names, turns=150):
    """Clients in a closed loop on a machine that knows what adapters cost."""
    loads = [replace(load, adapter=name) for load, name in zip(loads, names, strict=False)]
    simulation = Simulation(loads, ranks=RANKS, adapter_seconds=adapter_seconds)
    simulation.engine.scheduler.costs = costs = machine().scheduler.costs
    simulation.engine.scheduler.adapter_limit = AdapterLimit(costs, RANKS.__getitem__)
    return simulation.run(turns)


@settings(max_examples=40, deadline=None)
@given(loads, loads_with_adapters)
def test_the_bound_of_fairness_holds_with_adapters(loads, names):
    """Sitting out leaves the difference of backlogged clients where it was."""
    assert simulate(loads, names).worst_difference() <= BOUND


sits = st.lists(
    st.tuples(st.sampled_from("abc"), adapters, st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(sits)
def test_no_row_waits_longer_than_the_guard_and_a_batch_and_the_server_is_never_idle(users):
    """Sessions that decode all the time, as many rows as fit into a batch: a batch is never empty; who has no adapter,
    or one that is in the batch, is in it; and everybody's next token comes within the guard and a batch."""
    engine = machine(token_budget=256)
    sessions = {}
    for turn in range(60):
        for number, (client, adapter, rows, arrives) in enumerate(users):
            if turn >= arrives and number not in sessions:
                names = () if adapter is None else (adapter,) * rows
                sessions[number] = engine.open(client, rows, adapters=names)
        for session in sessions.values():
            if not session.jobs:
                engine.decode(session, step=turn)
        ready = [session for session in sessions.values() if session.jobs]
        started = engine.now
        batch = engine.turn()
        ran = in_batch(batch)
        assert bool(ran) == bool(ready)
        here = {adapter for session in ran for adapter in session.adapters}
        for session in ready:
            if session not in ran:
                assert session.adapters and session.adapters[0] not in here
                assert started - session.job.ready_since < GUARD_S


def test_a_limit_serves_more_per_second_than_having_everybody_in():
    """Twenty users of a small adapter and six of large ones, one each, all decoding all the time."""
    rates = {}
    for guard_s in (GUARD_S, 0.0):  # 0: all are due at once, so that nobody ever sits out
        engine = machine()
        engine.scheduler.adapter_limit = AdapterLimit(engine.scheduler.costs, RANKS.__getitem__, guard_s=guard_s)
        sessions = decoding(engine, ["small"] * 20 + [f"l{i}" for i in range(6)])
        began, tokens = engine.now, 0
        while engine.now < began + 20.0:
            tokens += engine.turn().num_tokens
            for session in sessions:
                if not session.jobs:
                    engine.decode(session)
        rates[guard_s] = tokens / 20.0
    assert rates[GUARD_S] > 1.5 * rates[0.0]


def test_costs_are_asked_only_once_they_were_measured():
    """Before, nobody sits out."""
    engine = Engine(ranks=RANKS)
    sessions = decoding(engine, ["small"] * 20 + ["large"])
    assert in_batch(engine.turn()) == set(sessions)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_the_model_learns_what_adapters_cost(count):
    """From batches of various adapters, within a few percent."""
    costs: StepCost = machine().scheduler.costs
    load = AdapterLoad(count, 40 * count)
    assert costs.seconds(8, 0, load) == pytest.approx(0.01 + 0.0005 * 8 + adapter_seconds(load), rel=0.1)
