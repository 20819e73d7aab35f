"""Every micro-batch of a run counts once, whatever is lost on the way, and all hops work at the same time."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerMisbehaved
from swarm.training import Forget, Forward, MicroBatch, Pipeline


def make_micros(count, *, gradients=True):
    return [MicroBatch(num_tokens=(3,), version=-1, inputs=("in", i), wants_gradients=gradients) for i in range(count)]


class FakeChain:
    """Hops that work and answer in any order, keep what they like, and get lost with all that they hold.

    Linked ones send on by themselves, while their answers are on the way to the client.
    """

    def __init__(self, pipeline, num_hops, dice, *, p_unkept=0.0, p_expired=0.0, p_linked=0.0):
        self.pipeline, self.num_hops, self.dice = pipeline, num_hops, dice
        self.chances = {"p_unkept": p_unkept, "p_expired": p_expired, "p_linked": p_linked}
        self.links = {hop for hop in range(num_hops - 1) if dice.random() < p_linked}
        self.queues = [[] for _ in range(num_hops)]
        self.mail = [[] for _ in range(num_hops)]
        self.held = [set() for _ in range(num_hops)]
        self.runs = Counter()
        pipeline.chain_opened(num_hops, self.links)

    def pump(self):
        """Micro-batches go to their hops under the numbers that they have now."""
        while (action := self.pipeline.next_action()) is not None:
            if isinstance(action, Forget):
                for held in self.held:
                    held.difference_update(action.numbers)
                for queue in self.queues:
                    queue[:] = [work for work in queue if work[1] not in action.numbers]
            elif isinstance(action, Forward):
                work = (True, action.micro.number, action.hidden_states, action.micro.is_kept)
                self.queues[action.hop].append(work)
            else:
                work = (False, action.micro.number, action.gradients, action.wants_inputs)
                self.queues[action.hop].append(work)

    @property
    def busy(self):
        """What can happen."""
        return [(what, hop) for what in (self.queues, self.mail) for hop in range(self.num_hops) if what[hop]]

    def answer(self):
        """One hop does the first thing in its queue, or one of its answers arrives."""
        what, hop = self.dice.choice(self.busy)
        first = what[hop].pop(0)
        if what is self.mail:
            first()
        elif first[0]:
            self.forth(hop, *first[1:])
        else:
            self.back(hop, *first[1:])

    def forth(self, hop, number, hidden_states, keep):
        self.runs[hop] += 1
        outputs = (*hidden_states, hop)
        keeps = keep and self.dice.random() >= self.chances["p_unkept"]
        if keeps:
            self.held[hop].add(number)
        told = None if hop in self.links else outputs
        if hop in self.links:
            self.queues[hop + 1].append((True, number, outputs, keeps))
        self.mail[hop].append(lambda: self.pipeline.came_forth(hop, number, told, is_kept=keeps))

    def back(self, hop, number, gradients, wants_inputs):
        has = number in self.held[hop] and self.dice.random() >= self.chances["p_expired"]
        self.held[hop].discard(number)
        if not has:
            self.mail[hop].append(lambda: self.pipeline.lost_one(hop, number))
            return
        found = (*gradients, hop)
        goes_on = hop - 1 in self.links
        if goes_on:
            self.queues[hop - 1].append((False, number, found, wants_inputs))
        told = found if wants_inputs and not goes_on else None
        self.mail[hop].append(lambda: self.pipeline.came_back(hop, number, told, ("parameters", hop)))


def run(pipeline, chain, done, dice, *, p_lost=0.0):
    """Until `done`; the chain is lost now and then and replaced by one of another length."""
    for _ in range(10_000):
        chain.pump()
        if done():
            return chain
        assert chain.busy, "nothing is under way, and nothing is to be sent"
        if dice.random() < p_lost:
            pipeline.chain_lost()
            assert pipeline.next_action() is None
            chain = FakeChain(pipeline, dice.randint(1, 4), dice, **chain.chances)
        else:
            chain.answer()
    raise AssertionError("no end")


def check(micros, num_hops=None):
    """Each has come all the way, through every hop of one chain in order."""
    for micro in micros:
        index = micro.inputs[1]
        forth = micro.outputs[2:]
        assert micro.outputs[:2] == ("in", index) and forth == tuple(range(len(forth)))
        hops = range(len(micro.parameter_gradients))
        assert micro.parameter_gradients == {hop: ("parameters", hop) for hop in hops}
        assert num_hops is None or len(forth) == len(hops) == num_hops
        if micro.wants_inputs:
            assert micro.input_gradients == ("gradient", index, *reversed(hops))
        else:
            assert micro.input_gradients is None


def forth_and_back(count, num_hops, seed, *, p_lost=0.0, wants_inputs=True, **chances):
    dice = random.Random(seed)
    pipeline, micros = Pipeline(), make_micros(count)
    chain = FakeChain(pipeline, num_hops, dice, **chances)
    pipeline.add(micros)
    chain = run(pipeline, chain, lambda: all(it.outputs is not None for it in micros), dice, p_lost=p_lost)
    for micro in micros:
        micro.output_gradients, micro.wants_inputs = ("gradient", micro.inputs[1]), wants_inputs
    pipeline.go_back(micros)
    chain = run(pipeline, chain, lambda: all(it.is_back for it in micros), dice, p_lost=p_lost)
    chain.pump()
    assert not pipeline.has_work and not pipeline._known
    return pipeline, chain, micros


@given(
    count=st.integers(1, 12),
    num_hops=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
    p_linked=st.sampled_from([0.0, 0.5, 1.0]),
    wants_inputs=st.booleans(),
)
def test_without_losses_every_hop_runs_every_micro_batch_once(count, num_hops, seed, p_linked, wants_inputs):
    """Whatever the order of the answers, and whoever sends on."""
    given = {"p_linked": p_linked, "wants_inputs": wants_inputs}
    pipeline, chain, micros = forth_and_back(count, num_hops, seed, **given)
    check(micros, num_hops)
    assert pipeline.num_restarts == 0 and all(chain.runs[hop] == count for hop in range(num_hops))


@given(
    count=st.integers(1, 12),
    num_hops=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
    losses=st.fixed_dictionaries(
        {
            "p_lost": st.sampled_from([0.0, 0.02, 0.1]),
            "p_unkept": st.sampled_from([0.0, 0.3]),
            "p_expired": st.sampled_from([0.0, 0.3]),
            "p_linked": st.sampled_from([0.0, 0.5, 1.0]),
        }
    ),
)
def test_every_micro_batch_counts_once_whatever_is_lost(count, num_hops, seed, losses):
    """Chains that die, hops without room and hops that forget: the gradients are complete, of one chain, and once."""
    _, chain, micros = forth_and_back(count, num_hops, seed, **losses)
    check(micros)
    assert not any(chain.held), "something is kept that will never go back"


def test_all_hops_work_at_the_same_time():
    """The second micro-batch is sent before the first has come back, and both hops have some."""
    pipeline = Pipeline()
    pipeline.add(make_micros(8))
    chain = FakeChain(pipeline, 2, random.Random(0))
    chain.pump()
    assert len(chain.queues[0]) == 6 and not chain.queues[1]  # no more: they would only wait there
    for _ in range(3):
        _, number, *_ = chain.queues[0].pop(0)
        pipeline.came_forth(0, number, "hidden", is_kept=True)
    chain.pump()
    assert pipeline.hops_at_work == {0, 1}


def test_evaluation_leaves_nothing_behind():
    """Micro-batches without gradients rest when they have come forth, and nothing has to be forgotten."""
    pipeline, micros, dice = Pipeline(), make_micros(3, gradients=False), random.Random(0)
    pipeline.add(micros)
    chain = FakeChain(pipeline, 2, dice)
    run(pipeline, chain, lambda: all(it.outputs is not None for it in micros), dice)
    assert not pipeline.has_work and not any(chain.held)


def test_dropped_micro_batches_are_forgotten_by_the_chain():
    """A graph that nobody goes back through holds no server's memory."""
    pipeline, micros, dice = Pipeline(), make_micros(3), random.Random(0)
    assert pipeline.is_empty
    pipeline.add(micros)
    assert not pipeline.is_empty
    chain = FakeChain(pipeline, 2, dice)
    run(pipeline, chain, lambda: all(it.outputs is not None for it in micros), dice)
    assert all(len(held) == 3 for held in chain.held) and not pipeline.is_empty
    pipeline.drop(micros[:2])
    chain.pump()
    assert all(len(held) == 1 for held in chain.held)


def test_answers_for_numbers_of_before_are_ignored():
    """What a slow server says after it was given up counts for nothing."""
    pipeline, (micro,) = Pipeline(), make_micros(1)
    pipeline.add([micro])
    pipeline.chain_opened(1)
    first = pipeline.next_action()
    number = first.micro.number
    pipeline.chain_lost()
    pipeline.chain_opened(1)
    assert pipeline.next_action().micro.number != number
    pipeline.came_forth(0, number, "late", is_kept=True)
    assert micro.outputs is None


def test_gradients_may_be_asked_for_twice():
    """As autograd allows with retain_graph: the second time it goes forth again."""
    pipeline, chain, micros = forth_and_back(2, 2, 0)
    pipeline.go_back(micros)
    run(pipeline, chain, lambda: all(it.is_back for it in micros), random.Random(1))
    check(micros, 2)


def test_a_server_that_was_not_asked_is_blamed():
    """Answers out of turn, or for numbers that were never sent."""
    pipeline = Pipeline()
    pipeline.add(make_micros(1))
    pipeline.chain_opened(2)
    number = pipeline.next_action().micro.number
    for wrong in (
        lambda: pipeline.came_forth(1, number, "x", is_kept=True),
        lambda: pipeline.came_back(0, number, "x", "y"),
        lambda: pipeline.lost_one(0, number),
        lambda: pipeline.came_forth(0, number + 1, "x", is_kept=True),
        lambda: pipeline.came_forth(0, number, None, is_kept=True),
    ):
        with pytest.raises(PeerMisbehaved):
            wrong()


def held_by(links):
    """One micro-batch that a chain of two hops holds for the way back, and is asked for."""
    pipeline, (micro,) = Pipeline(), make_micros(1)
    micro.output_gradients = "gradient"
    pipeline.add([micro])
    pipeline.chain_opened(2, links)
    number = pipeline.next_action().micro.number
    pipeline.came_forth(0, number, None if links else "hidden", is_kept=True)
    pipeline.came_forth(1, number, "outputs", is_kept=True)
    return pipeline, number


def test_a_linked_server_that_was_not_asked_is_blamed():
    """Gradients of a hop that none were sent to, twice, or of inputs that are somebody else's."""
    pipeline, number = held_by(links=())
    with pytest.raises(PeerMisbehaved):
        pipeline.came_back(0, number, "x", "y")
    pipeline, number = held_by(links={0})
    for wrong in (
        lambda: pipeline.came_forth(0, number, "hidden", is_kept=True),
        lambda: pipeline.came_back(1, number, "x", "y"),
        lambda: pipeline.came_back(0, number, None, "y"),
    ):
        with pytest.raises(PeerMisbehaved):
            wrong()
    pipeline.came_back(1, number, None, "y")
    with pytest.raises(PeerMisbehaved):
        pipeline.came_back(1, number, None, "y")


def test_whom_to_wait_for_is_known_of_linked_hops():
    """A hop that has sent on has done its part, and the last one without gradients has them."""
    pipeline, micros = Pipeline(), make_micros(1)
    pipeline.add(micros)
    pipeline.chain_opened(3, {0, 1})
    number = pipeline.next_action().micro.number
    assert pipeline.hops_at_work == {0}
    pipeline.came_forth(1, number, None, is_kept=True)  # and overtakes the word of the first
    assert pipeline.hops_at_work == {2}
    pipeline.came_forth(0, number, None, is_kept=True)
    assert pipeline.hops_at_work == {2}
    pipeline.came_forth(2, number, "outputs", is_kept=True)
    micros[0].output_gradients = "gradient"
    pipeline.go_back(micros)
    assert pipeline.hops_at_work == {2}
    pipeline.came_back(2, number, None, "y")
    assert pipeline.hops_at_work == {1}
