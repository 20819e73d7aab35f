"""Service of clients who compete: bounded difference whatever the arrivals, nothing lost when nobody competes."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.fairness import W_DECODE, W_PROMPT, VirtualCounters
from swarm.server.sequences import CachedSession
from tests.server.engine import Engine

BUDGET = 32
BOUND = 2 * max(W_PROMPT * BUDGET, W_DECODE * BUDGET)
"""2 max(w_p L_in, w_q M): most prompt tokens, and most decode rows, of one batch."""


class FirstComeFirstServed(VirtualCounters):
    """What the tests must tell from fairness."""

    def of(self, client):
        return 0.0


def test_a_newcomer_is_lifted_to_the_least_of_those_who_wait():
    """Who was away has no credit to spend."""
    counters = VirtualCounters()
    for client, service in (("a", 100), ("b", 70)):
        counters.arrive(client)
        counters.charge(client, service)
    counters.settle("ab")
    counters.arrive("c")
    assert counters.of("c") == 70


def test_where_nobody_waits_a_newcomer_is_lifted_to_the_last_who_did():
    """The branch of the paper for empty queues: else the newcomer could use up all that others had before."""
    counters = VirtualCounters()
    counters.arrive("a")
    counters.charge("a", 100)
    counters.settle(())
    counters.arrive("b")
    assert counters.of("b") == 100


def test_lifting_never_lowers_a_counter():
    """Who got more than others and pauses still has had more when it is back."""
    counters = VirtualCounters()
    for client in "ab":
        counters.arrive(client)
    counters.charge("a", 100)
    counters.settle("b")
    counters.arrive("a")
    assert counters.of("a") == 100 and counters.of("b") == 0


def test_counters_of_the_idle_are_dropped_once_they_say_nothing():
    """The state is as large as the number of clients who wait, or are ahead of those."""
    counters = VirtualCounters()
    for number in range(1000):
        counters.arrive(str(number))
        counters.charge(str(number), number % 7)
        counters.settle(())
    assert len(counters) == 0
    for client in "ab":
        counters.arrive(client)
    counters.charge("a", 10)
    counters.settle("b")
    assert len(counters) == 2
    counters.charge("b", 10)
    counters.settle("b")
    assert len(counters) == 1


@dataclass
class Load:
    """A session that asks for the next as soon as it has its answer, for ever: prompt, then some tokens."""

    client: str
    arrives: int
    prompt: int
    decodes: int
    pause: int = 0
    """Turns before each request."""
    adapter: str | None = None


class Simulation:
    """Sessions in a closed loop on an engine, with the service that each client gets in each turn."""

    def __init__(self, loads: list[Load], *, fair: bool = True, **options):
        self.engine = Engine(**{"token_budget": BUDGET, "num_pages": 4096, **options})
        if not fair:
            self.engine.scheduler.counters = FirstComeFirstServed()
        self.loads = loads
        self.sessions: dict[int, CachedSession] = {}
        self.steps = Counter()
        self.due = {number: load.arrives for number, load in enumerate(loads)}
        self.service: list[Counter] = []
        self.left_out: list[set[str]] = []

    def run(self, turns: int) -> "Simulation":
        for turn in range(turns):
            for number, load in enumerate(self.loads):
                self._ask(number, load, turn)
            batch = self.engine.turn()
            got = Counter()
            for row in batch.rows:
                price = W_DECODE if row.job.is_decode else W_PROMPT
                got[row.session.client] += price * row.chunk.num_tokens
            self.service.append(got)
            self.left_out.append(self.engine.left_out)
        return self

    def _ask(self, number: int, load: Load, turn: int) -> None:
        session = self.sessions.get(number)
        if session is not None and session.jobs:
            return
        if self.due[number] is None:  # it has just got its answer
            self.due[number] = turn + load.pause
        if turn < self.due[number]:
            return
        self.due[number] = None
        step = self.steps[number] % (1 + load.decodes)
        self.steps[number] += 1
        if step == 0:
            if session is not None:
                self.engine.close(session)
            session = self.sessions[number] = self.engine.open(
                load.client, adapters=() if load.adapter is None else (load.adapter,)
            )
            first = 1000.0 * number + self.steps[number]
            self.engine.prompt(session, load.prompt, first=first)
            self.engine.prompt(session, 1 + load.prompt // 3, first=first + load.prompt)  # its second message
        else:
            self.engine.decode(session, step=step)

    def worst_difference(self) -> float:
        """The greatest difference of service of two clients in an interval in which both were backlogged."""
        worst = 0.0
        for first, second in combinations({load.client for load in self.loads}, 2):
            difference = low = high = 0.0
            was_backlogged = False
            for got, left_out in zip(self.service, self.left_out, strict=True):
                is_backlogged = first in left_out and second in left_out
                if is_backlogged and was_backlogged:
                    difference += got[first] - got[second]
                else:
                    difference = low = high = 0.0
                low, high, was_backlogged = min(low, difference), max(high, difference), is_backlogged
                worst = max(worst, high - low)
        return worst

    def total(self) -> Counter:
        return sum(self.service, Counter())


loads = st.lists(
    st.builds(
        Load,
        client=st.sampled_from("abcd"),
        arrives=st.integers(0, 60),
        prompt=st.integers(1, 150),
        decodes=st.integers(0, 20),
        pause=st.sampled_from([0, 0, 1, 7]),
    ),
    min_size=2,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(loads)
def test_service_of_backlogged_clients_differs_by_a_bounded_amount(loads):
    """Whatever arrives when, for any interval in which two clients always have ready work left out."""
    assert Simulation(loads).run(150).worst_difference() <= BOUND


HOG = [Load("hog", arrives=0, prompt=40, decodes=30) for _ in range(32)]


def test_first_come_first_served_breaks_the_bound():
    """The bound means something: the order of arrival does not keep it."""
    loads = [*HOG, Load("modest", arrives=5, prompt=3000, decodes=0)]
    assert Simulation(loads).run(300).worst_difference() <= BOUND
    assert Simulation(loads, fair=False).run(300).worst_difference() > 3 * BOUND


@pytest.mark.parametrize(
    ("many", "one"),
    [
        (Load("many", arrives=0, prompt=200, decodes=0), Load("one", arrives=0, prompt=3000, decodes=0)),
        (Load("many", arrives=0, prompt=4, decodes=200), Load("one", arrives=0, prompt=3000, decodes=0)),
        (Load("many", arrives=0, prompt=40, decodes=30), Load("one", arrives=0, prompt=3000, decodes=2)),
    ],
    ids=["prompts", "decodes", "mixed"],
)
def test_thirty_two_sessions_get_no_more_than_one(many, one):
    """The share of a client does not grow with its sessions, as long as another one always has work."""
    total = Simulation([many] * 32 + [one]).run(400).total()
    assert total["many"] <= 1.2 * total["one"]
    unfair = Simulation([many] * 32 + [one], fair=False).run(400).total()
    assert unfair["many"] > 1.2 * unfair["one"]


def test_a_client_alone_gets_everything():
    """Batches of one client are full as long as it has that much work."""
    simulation = Simulation([Load("alone", arrives=0, prompt=3000, decodes=0) for _ in range(3)]).run(50)
    assert all(got["alone"] == BUDGET for got in simulation.service)


def test_what_one_client_does_not_use_goes_to_others():
    """Work-conserving: a client with little to do leaves the rest to the one with much."""
    little = Load("little", arrives=0, prompt=1, decodes=1000)
    much = Load("much", arrives=0, prompt=3000, decodes=0)
    simulation = Simulation([little, much], seconds=lambda num_decode, num_prompt: 1.0).run(100)
    assert simulation.total()["little"] >= 190
    assert simulation.total()["much"] >= 0.9 * 100 * (BUDGET - 1)


def test_weights_divide_the_service():
    """A client with weight 3 gets three times as much."""
    loads = [Load(client, arrives=0, prompt=500, decodes=0) for client in "aabb"]
    total = Simulation(loads, weights={"a": 3.0}).run(300).total()
    assert total["a"] == pytest.approx(3 * total["b"], rel=0.1)


@settings(max_examples=25, deadline=None)
@given(loads)
def test_nobody_starves(loads):
    """Each piece of work is done in a time that does not depend on how much the others ask for."""
    simulation = Simulation(loads)
    num_clients = len({load.client for load in loads})
    worst = 0
    for _ in range(150):
        simulation.run(1)
        for session in simulation.engine.scheduler._ready:
            worst = max(worst, simulation.engine.now - session.job.ready_since)
    own = max(sum(2 * load.prompt + BUDGET for load in loads if load.client == client) for client in "abcd")
    seconds_per_service = 0.02 / 4  # a batch with a few tokens next to decode rows, in the engine's own cost model
    assert worst <= num_clients * (own + BOUND) * seconds_per_service


def test_pages_go_by_turns_as_well():
    """Two clients whose sessions don't fit together: each gets half, though one has eight times the sessions."""
    many = [Load("many", arrives=0, prompt=64, decodes=100) for _ in range(8)]
    one = [Load("one", arrives=3, prompt=64, decodes=100)]
    simulation = Simulation(many + one, num_pages=12).run(3000)
    total = simulation.total()
    assert simulation.engine.num_swaps > 0
    assert not any(told.failed for told in simulation.engine.told.values())
    # the one alone can't have more than one row per batch; it is not to get less than each of the many
    assert total["one"] >= 0.9 * total["many"] / 8
