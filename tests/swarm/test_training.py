"""Every micro-batch of a run counts once, whatever is lost on the way, and all hops work at the same time."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerMisbehaved
from swarm.training import Forget, Forward, MicroBatch, Pipeline, State


def make_micros(count, *, gradients=True):
    return [MicroBatch(num_tokens=(3,), version=-1, inputs=("in", i), wants_gradients=gradients) for i in range(count)]


class FakeChain:
    """Hops that answer in any order, keep what they like, and get lost with all that they hold."""

    def __init__(self, pipeline, num_hops, dice, *, p_unkept=0.0, p_expired=0.0):
        self.pipeline, self.num_hops, self.dice = pipeline, num_hops, dice
        self.p_unkept, self.p_expired = p_unkept, p_expired
        self.queues = [[] for _ in range(num_hops)]
        self.held = [set() for _ in range(num_hops)]
        self.runs = Counter()
        pipeline.chain_opened(num_hops)

    def pump(self):
        while (action := self.pipeline.next_action()) is not None:
            if isinstance(action, Forget):
                for held in self.held:
                    held.difference_update(action.numbers)
            else:
                self.queues[action.hop].append(action)

    @property
    def busy(self):
        return [hop for hop, queue in enumerate(self.queues) if queue]

    def answer(self):
        """One hop does the first thing in its queue."""
        hop = self.dice.choice(self.busy)
        action = self.queues[hop].pop(0)
        number = action.micro.number if action.micro.state is not State.RESTING else -2
        if number == -2:
            return  # dropped meanwhile; its number is not known here any more
        if isinstance(action, Forward):
            self.runs[hop] += 1
            keeps = action.micro.wants_gradients and self.dice.random() >= self.p_unkept
            if keeps:
                self.held[hop].add(number)
            self.pipeline.came_forth(hop, number, (*action.hidden_states, hop), is_kept=keeps)
        elif number not in self.held[hop] or self.dice.random() < self.p_expired:
            self.held[hop].discard(number)
            self.pipeline.lost_one(hop, number)
        else:
            self.held[hop].discard(number)
            self.pipeline.came_back(hop, number, (*action.gradients, hop), ("parameters", hop))


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
            chain = FakeChain(pipeline, dice.randint(1, 4), dice, p_unkept=chain.p_unkept, p_expired=chain.p_expired)
        else:
            chain.answer()
    raise AssertionError("no end")


def check(micros, num_hops=None):
    """Each has come all the way, through every hop of one chain in order."""
    for micro in micros:
        index = micro.inputs[1]
        forth = micro.outputs[2:]
        assert micro.outputs[:2] == ("in", index) and forth == tuple(range(len(forth)))
        back = micro.input_gradients[2:]
        assert micro.input_gradients[:2] == ("gradient", index) and back == tuple(reversed(range(len(back))))
        assert micro.parameter_gradients == [("parameters", hop) for hop in range(len(back))]
        assert num_hops is None or len(forth) == len(back) == num_hops


def forth_and_back(count, num_hops, seed, *, p_lost=0.0, p_unkept=0.0, p_expired=0.0):
    dice = random.Random(seed)
    pipeline, micros = Pipeline(), make_micros(count)
    chain = FakeChain(pipeline, num_hops, dice, p_unkept=p_unkept, p_expired=p_expired)
    pipeline.add(micros)
    chain = run(pipeline, chain, lambda: all(it.outputs is not None for it in micros), dice, p_lost=p_lost)
    for micro in micros:
        micro.output_gradients = ("gradient", micro.inputs[1])
    pipeline.go_back(micros)
    chain = run(pipeline, chain, lambda: all(it.input_gradients is not None for it in micros), dice, p_lost=p_lost)
    chain.pump()
    assert not pipeline.has_work and not pipeline._known
    return pipeline, chain, micros


@given(count=st.integers(1, 12), num_hops=st.integers(1, 4), seed=st.integers(0, 1 << 30))
def test_without_losses_every_hop_runs_every_micro_batch_once(count, num_hops, seed):
    """Whatever the order of the answers."""
    pipeline, chain, micros = forth_and_back(count, num_hops, seed)
    check(micros, num_hops)
    assert pipeline.num_restarts == 0 and all(chain.runs[hop] == count for hop in range(num_hops))


@given(
    count=st.integers(1, 12),
    num_hops=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
    losses=st.tuples(st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.3])),
)
def test_every_micro_batch_counts_once_whatever_is_lost(count, num_hops, seed, losses):
    """Chains that die, hops without room and hops that forget: the gradients are complete, of one chain, and once."""
    p_lost, p_unkept, p_expired = losses
    _, chain, micros = forth_and_back(count, num_hops, seed, p_lost=p_lost, p_unkept=p_unkept, p_expired=p_expired)
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
        action = chain.queues[0].pop(0)
        pipeline.came_forth(0, action.micro.number, "hidden", is_kept=True)
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
    pipeline.add(micros)
    chain = FakeChain(pipeline, 2, dice)
    run(pipeline, chain, lambda: all(it.outputs is not None for it in micros), dice)
    assert all(len(held) == 3 for held in chain.held)
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
    run(pipeline, chain, lambda: all(it.input_gradients is not None for it in micros), random.Random(1))
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
    ):
        with pytest.raises(PeerMisbehaved):
            wrong()
