"""Who brings ever new adapters pays for the time that it takes, with turns and with waiting; others hardly notice."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.adapter_debts import AROUND_S, GUARD_S, AdapterDebts
from swarm.server.admission import MAX_ATTACHES
from swarm.server.scheduler import Scheduler
from tests.server.engine import Engine
from tests.server.fake_span import FakeDelta

ATTACH_S = 0.04
BATCH_S = 0.01


def test_a_debt_is_repaid_by_ones_part_of_the_batches():
    """With two clients around, half of the time of batches counts for each."""
    debts = AdapterDebts()
    for client in "ab":
        debts.seen(client, 0.0)
    debts.worked("a", 0.3, 0.0)
    debts.ran(0.4, 0.4)
    assert debts.owed_s("a") == pytest.approx(0.1) and not debts.may_load("a", 0.4)
    assert debts.may_load("b", 0.4)
    debts.ran(0.4, 0.8)
    assert debts.may_load("a", 0.8) and not len(debts)


def test_who_is_alone_owes_nobody():
    """Others count for a moment after they had work."""
    debts = AdapterDebts()
    debts.seen("a", 0.0)
    debts.worked("a", 5.0, 0.0)
    assert debts.may_load("a", 0.0)
    debts.seen("b", 0.5)
    assert not debts.may_load("a", 1.0)
    assert debts.free_at("a", 1.0) == 0.5 + AROUND_S and debts.may_load("a", 0.5 + AROUND_S)


def test_however_large_a_debt_is_something_may_be_loaded_now_and_then():
    """Nobody waits for longer than the guard says."""
    debts = AdapterDebts()
    debts.worked("a", 100.0, 1.0)
    for now in (1.0, 2.0, 1.0 + GUARD_S - 0.01):
        debts.seen("b", now)
        assert not debts.may_load("a", now)
    debts.seen("b", 1.0 + GUARD_S)
    assert debts.may_load("a", 1.0 + GUARD_S)


def test_the_absent_are_forgotten():
    """As many clients are kept as were there lately, however many come."""
    debts = AdapterDebts()
    for number in range(5000):
        debts.seen(str(number), number / 100)
    assert len(debts._seen_at) < 2000
    debts.worked("x", 1.0, 50.0)
    debts.ran(0.01, 50.0)
    assert len(debts._seen_at) <= 101


@dataclass
class Newcomers:
    """A client that keeps some sessions waiting, each with an adapter that nobody has seen before."""

    client: str
    waiting: int = 4
    opened: int = 0
    sessions: list = field(default_factory=list)

    def ask(self, engine: Engine) -> None:
        for session in [it for it in self.sessions if not it.jobs]:
            engine.close(session)
            self.sessions.remove(session)
        while len(self.sessions) < self.waiting:
            name = f"{self.client} {self.opened}"
            self.opened += 1
            engine.memory.adapters.add(name, {0: FakeDelta(1.0, 1)}, client=self.client)
            session = engine.open(self.client, adapters=(name,))
            engine.prompt(session, 2, first=1000.0 * self.opened)
            self.sessions.append(session)


class Decoding:
    """A client with one session that asks for a token as soon as it has the last one."""

    def __init__(self, client: str):
        self.client, self.session, self.steps = client, None, 0

    def ask(self, engine: Engine) -> None:
        if self.session is None:
            self.session = engine.open(self.client)
        if not self.session.jobs:
            engine.decode(self.session, step=self.steps)
            self.steps += 1


class NoDebts(AdapterDebts):
    """As if loading cost nobody anything."""

    def worked(self, client, seconds, now):
        pass


def simulate(clients, seconds: float, *, charged: bool = True) -> tuple[Engine, Counter]:
    """So many seconds of these, on the real scheduler; how much time loading took for each client."""
    engine = Engine(4096, attach_s=ATTACH_S, seconds=lambda num_decode, num_prompt: BATCH_S)
    if not charged:
        engine.scheduler.debts = NoDebts()
    brought, end = Counter(), engine.now + seconds
    while engine.now < end:
        for client in clients:
            client.ask(engine)
        batch = engine.turn()
        for client in batch.brought:
            brought[client] += ATTACH_S
        if not batch.rows and not engine.scheduler.can_progress:
            engine.now = min(engine.scheduler.next_deadline(), end)
    return engine, brought


@pytest.mark.parametrize("num_others", [1, 3])
def test_ever_new_adapters_of_one_client_hardly_slow_the_others(num_others):
    """Others' batches come later by one nth, whatever that client opens; without debts, by a multiple."""
    others = [Decoding(str(number)) for number in range(num_others)]
    simulate([Newcomers("hog", waiting=16), *others], 20.0)
    alone = 20.0 / BATCH_S
    part = 1 / (num_others + 1)
    assert all(other.steps >= 0.95 * alone / (1 + part) for other in others)
    unfair = [Decoding(str(number)) for number in range(num_others)]
    simulate([Newcomers("hog", waiting=16), *unfair], 20.0, charged=False)
    assert all(other.steps <= 0.25 * alone for other in unfair)


def test_a_client_alone_loads_as_fast_as_it_can():
    """A debt binds for the sake of others only."""
    hog = Newcomers("hog", waiting=16)
    _, brought = simulate([hog], 20.0)
    free = Newcomers("hog", waiting=16)
    _, unlimited = simulate([free], 20.0, charged=False)
    assert brought["hog"] >= 0.99 * unlimited["hog"] and hog.opened >= 0.99 * free.opened


def test_a_newcomer_with_one_adapter_is_not_kept_behind_the_one_with_many():
    """Who has brought nothing yet goes first, however many sessions of the other wait."""
    engine = Engine(4096, attach_s=ATTACH_S, seconds=lambda num_decode, num_prompt: BATCH_S)
    hog, modest = Newcomers("hog", waiting=64), Newcomers("modest", waiting=1)
    for _ in range(100):
        hog.ask(engine)
        engine.turn()
    started = engine.now
    modest.ask(engine)
    (session,) = modest.sessions
    while session.jobs:
        hog.ask(engine)
        engine.turn()
    assert engine.now - started <= 2 * (MAX_ATTACHES * ATTACH_S + BATCH_S)


def test_time_of_loading_counts_as_service():
    """A client that brought adapters comes after one that has had as many tokens and brought none."""
    engine = Engine(4096, attach_s=ATTACH_S, token_budget=32)
    prompts = {client: engine.open(client) for client in "ab"}
    for session in prompts.values():
        engine.prompt(session, 2000)
    engine.turn()
    before = {client: engine.scheduler.counters.of(client) for client in "ab"}
    engine.scheduler.worked("a", 10 * ATTACH_S, engine.now)
    assert engine.scheduler.counters.of("a") > before["a"] and engine.scheduler.counters.of("b") == before["b"]
    had = Counter()
    for _ in range(5):
        for row in engine.turn().rows:
            had[row.session.client] += row.chunk.num_tokens
    assert had["b"] > 2 * had["a"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_loading_takes_no_more_than_its_client_is_due(waiting, num_others):
    """Of the time of batches, each client's part; and all are served in the end."""
    hogs = [Newcomers(f"hog {number}", waiting=count) for number, count in enumerate(waiting)]
    others = [Decoding(str(number)) for number in range(num_others)]
    engine, brought = simulate([*hogs, *others], 4.0)
    batches = 4.0 - sum(brought.values())
    part = 1 / (len(hogs) + num_others)
    for hog in hogs:
        spare = 4.0 / GUARD_S + MAX_ATTACHES + 1
        assert brought[hog.client] <= part * batches + spare * ATTACH_S
        assert hog.opened > hog.waiting
    engine.check()


def test_a_session_that_debts_hold_back_goes_on_when_nobody_else_is_there():
    """Nothing wakes the device thread but its own deadline; meanwhile it is told that it waits, once a second."""
    engine = Engine(4096, attach_s=ATTACH_S)
    scheduler: Scheduler = engine.scheduler
    other = Decoding("other")
    other.ask(engine)
    engine.run()
    scheduler.worked("hog", 5.0, engine.now)
    hog = Newcomers("hog", waiting=1)
    engine.memory.adapters._soon.clear()
    hog.ask(engine)
    engine.turn()
    assert hog.sessions[0].jobs and engine.now < scheduler.next_deadline() <= engine.now + AROUND_S
    engine.turn()
    (told,) = engine.told[hog.sessions[0]].waits
    assert 0 < told.expected_s <= AROUND_S
    engine.run()
    assert not hog.sessions[0].jobs
