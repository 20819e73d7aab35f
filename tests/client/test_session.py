"""The session driver against scripted servers on real transports: what crosses the wire, and whom it blames."""

import asyncio
import random

import pytest
import torch

from swarm.errors import InvalidRequest
from swarm.protocol import Forward, Message, OpenSession, PushHello, Step
from swarm.types import BlockRange
from tests.client.fake_server import HIDDEN, NUM_BLOCKS, FakeSession, run_blocks
from tests.client.scripted_swarm import CHAIN, Swarm, Text, at, dying, stopped

pytestmark = pytest.mark.asyncio(loop_scope="module")


# -- the chain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("push", "per_step"), [(True, 1), (False, 3)], ids=["push", "star"])
async def test_one_activation_goes_up_and_one_comes_down_per_step(make_swarm, push, per_step):
    """With three hops that push, the client sends one Step and gets one StepResult per token; without, three each."""
    swarm = await make_swarm(*CHAIN)
    session = swarm.session(push=push)
    text = Text(session)
    await text.step(5)
    sent, told = sum(server.received["Step"] for server in swarm.servers), session.told["StepResult"]
    await text.decode(4)
    assert sum(server.received["Step"] for server in swarm.servers) - sent == 4 * per_step
    assert session.told["StepResult"] - told == 4 * per_step
    assert session.machine.num_replays == 0 and session.machine.num_pushes == (2 if push else 0)
    assert set(swarm.peers.overheads) == {server.peer_id for server in swarm.servers}
    assert {timing.peer_id for timing in session.timings} == set(swarm.peers.overheads)


@pytest.mark.parametrize("push", [True, False])
async def test_a_long_prompt_is_sent_in_chunks_without_waiting_for_results(make_swarm, push):
    """The last hop starts only when the first has got everything: a client that waited for results would hang."""
    swarm = await make_swarm(*CHAIN, max_step_tokens=10)
    first, last = swarm.servers[0], swarm.servers[2]
    has_all = asyncio.Event()

    async def first_script(session: FakeSession, message: Message) -> None:
        if first.received["Step"] == 5:
            has_all.set()

    async def last_script(session: FakeSession, message: Message) -> None:
        if isinstance(message, Step):
            await has_all.wait()

    first.script, last.script = first_script, last_script
    text = Text(swarm.session(push=push))
    await text.step(50)
    await text.decode(1)


async def test_chunks_are_no_larger_than_the_client_wishes(make_swarm):
    """chunk_tokens cuts what a server would take whole."""
    swarm = await make_swarm("0:6")
    text = Text(swarm.session(chunk_tokens=7))
    await text.step(21)
    assert swarm.servers[0].received["Step"] == 3


async def test_rows_rollback_and_order_pass_through_the_chain(make_swarm):
    """Several rows of different lengths, beams that swap, tokens that are taken back."""
    swarm = await make_swarm(*CHAIN, max_step_tokens=3)
    text = Text(swarm.session(3), rows=3)
    await text.step(4, 1, 2)
    await text.step(1, 1, 1, order=[2, 0, 0])
    await text.step(2, 0, 1, keep=[1, 5, 3])
    await text.step(1, 1, 1, order=[1, 1, 2])


# -- failures -----------------------------------------------------------------------------------------------------

PHASES = {
    "opening": (OpenSession, 0),
    "connecting": (Forward, 0),
    "accepting": (PushHello, 0),
    "prompt": (Step, 0),
    "rest of the prompt": (Step, 1),
    "decode": (Step, 4),
}


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("index", range(3))
async def test_a_hop_that_dies_is_replaced_whatever_it_is_doing(make_swarm, index, phase, push):
    """A killed server costs no token, and nobody else is blamed."""
    kind, skip = PHASES[phase]
    swarm = await make_swarm(*CHAIN, CHAIN[index], max_step_tokens=4)
    victim = swarm.servers[index]
    victim.script = at(kind, dying, skip=skip)
    session = swarm.session(push=push)
    text = Text(session)
    await text.step(8)
    await text.decode(4)
    died = victim.received[kind.__name__] + victim.received[f"push:{kind.__name__}"] > skip
    assert died or kind in (Forward, PushHello)
    assert swarm.peers.failures == ([victim.peer_id] if died else [])
    assert session.machine.num_pushes == (2 if push else 0)


@pytest.mark.parametrize("lost", [(0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
async def test_hops_that_die_at_once_are_replaced(make_swarm, lost):
    """Between two steps, neighbours or all."""
    swarm = await make_swarm(*CHAIN, *(CHAIN[index] for index in lost))
    text = Text(swarm.session(2), rows=2)
    await text.step(6, 3)
    await text.decode(2)
    for index in lost:
        swarm.servers[index].kill()
    await text.decode(3)
    assert set(swarm.peers.failures) == {swarm.servers[index].peer_id for index in lost}


async def test_a_replacement_that_dies_while_it_catches_up_is_replaced(make_swarm):
    """Failure during a replay."""
    swarm = await make_swarm(*CHAIN, "2:4", "2:4", max_step_tokens=4)
    first, second = swarm.servers[1], swarm.servers[3]
    text = Text(swarm.session())
    await text.step(20)
    first.script = at(Step, dying)
    second.script = at(Step, dying, skip=2)
    await text.decode(3)
    assert swarm.peers.failures == [first.peer_id, second.peer_id]


async def test_a_replay_comes_from_the_hop_before(make_swarm):
    """What the client sends after the loss of a middle hop is the step under way, no history."""
    swarm = await make_swarm(*CHAIN, "2:4")
    text = Text(swarm.session())
    await text.step(40)
    tokens = swarm.servers[0].num_tokens
    swarm.servers[1].kill()
    await text.decode(1)
    assert swarm.servers[0].num_tokens == tokens + 1
    assert swarm.servers[3].received["Step"] == 0 and swarm.servers[3].num_tokens == 41


@pytest.mark.parametrize("index", range(3))
async def test_a_failure_while_beams_swap_gives_the_right_rows(make_swarm, index):
    """The order is applied once, whoever is replaced in the middle of the step."""
    swarm = await make_swarm(*CHAIN, CHAIN[index])
    text = Text(swarm.session(3), rows=3)
    await text.step(4, 5, 3)
    await text.step(1, 1, 1, order=[1, 0, 1])
    swarm.servers[index].script = at(Step, dying)
    await text.step(1, 1, 1, order=[2, 2, 0])
    await text.step(1, 1, 1, order=[0, 2, 1])
    assert swarm.peers.failures == [swarm.servers[index].peer_id]


async def test_lost_history_is_replayed_from_further_up(make_swarm):
    """The hop before a lost one has dropped its history: it is fed again, too, from the client's."""
    swarm = await make_swarm(*CHAIN, "2:4")
    session = swarm.session()
    text = Text(session)
    await text.step(20)
    await text.decode(2)
    swarm.servers[0].sessions[0].link.drop_history()
    swarm.servers[1].kill()
    await text.decode(3)
    assert 22 + 25 <= swarm.servers[0].num_tokens <= 23 + 25 and session.told["LinkDown"] >= 1


class Chaos:
    """A script for all servers: at random messages, random things go wrong."""

    def __init__(self, swarm: Swarm, seed: int, *, probability: float):
        self.swarm, self.random, self.probability = swarm, random.Random(seed), probability
        self.num_messages = self.num_faults = 0
        for server in swarm.servers:
            server.script = self

    async def __call__(self, session: FakeSession, message: Message) -> None:
        server, dice = session.server, self.random
        alive = [other for other in self.swarm.servers if other.script is self and other.blocks == server.blocks]
        self.num_messages += 1
        if dice.random() > self.probability and self.num_messages != 20:
            return
        self.num_faults += 1
        match dice.randrange(4):
            case 0 if len(alive) > 1:
                dying(session)
            case 1:
                session.link.drop_history()
            case 2 if session.forwarded:
                await session.lose_link()
            case 3:
                server.unreachable = {dice.choice(self.swarm.servers).peer_id}

    def mend(self) -> None:
        """Those that died are back, without any memory."""
        for server in self.swarm.servers:
            server.script = self


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_goes_wrong_the_outputs_are_right(make_swarm, seed):
    """Deaths, lost history, broken ways and cancellations at random messages, under beam search and rollback."""
    swarm = await make_swarm(*CHAIN, *CHAIN, max_step_tokens=3 + seed % 4)
    chaos = Chaos(swarm, seed, probability=0.06)
    dice, rows = random.Random(seed), 1 + seed % 3
    text = Text(swarm.session(rows, push=seed % 4 != 0), rows=rows, seed=seed)
    await text.step(*[9] * rows)
    for index in range(12):
        order = [dice.randrange(rows) for _ in range(rows)] if dice.random() < 0.3 else None
        before = [len(text.rows[old]) for old in order] if order else [len(row) for row in text.rows]
        keep = [max(1, length - dice.choice([0, 0, 0, 3])) for length in before]
        tokens = [dice.choice([1, 1, 1, 5]) for _ in range(rows)]
        if order is None and index % 4 == 3:
            running = asyncio.create_task(text.step(*tokens, keep=keep))
            for _ in range(dice.randrange(12)):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            text.rows = [row[:length] for row, length in zip(text.rows, text.session.machine.lengths, strict=True)]
        await text.step(*tokens, keep=[min(*pair) for pair in zip(keep, before, strict=True)], order=order)
        chaos.mend()
    assert chaos.num_faults


# -- cancellation, flow control, the end --------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
async def test_a_cancelled_step_leaves_a_session_that_can_go_on(make_swarm, index):
    """Cancelled while a hop works on it: the same step again gives the right outputs, and nobody is blamed."""
    swarm = await make_swarm(*CHAIN)
    text = Text(swarm.session())
    await text.step(4)
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hold(session: FakeSession) -> None:
        reached.set()
        await go_on.wait()

    swarm.servers[index].script = at(Step, hold)
    running = asyncio.create_task(text.step(1))
    await reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go_on.set()
    await text.decode(3)
    assert swarm.peers.failures == []


async def test_a_cancelled_opening_is_not_mistaken_for_an_open_session(make_swarm):
    """After Ctrl-C while a session opens, the next step opens it anew."""
    swarm = await make_swarm("0:6")
    reached = asyncio.Event()

    async def hold(session: FakeSession) -> None:
        reached.set()
        await asyncio.Event().wait()

    swarm.servers[0].script = at(OpenSession, hold)
    text = Text(swarm.session())
    running = asyncio.create_task(text.step(1))
    await reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await text.step(1)
    assert swarm.peers.failures == [] and swarm.servers[0].received["OpenSession"] == 2


async def test_a_hop_that_reads_nothing_does_not_keep_the_others_waiting(make_swarm):
    """While the first hop takes no more of a long prompt, the loss of the last one is made good."""
    swarm = await make_swarm("0:3", "3:6", "3:6")
    first, second, spare = swarm.servers
    replaced = asyncio.Event()

    async def hold(session: FakeSession) -> None:
        second.kill()
        await replaced.wait()

    async def tell(session: FakeSession, message: Message) -> None:
        replaced.set()

    first.script, spare.script = at(Step, hold), tell
    session = swarm.session(chunk_tokens=1 << 15)
    first.max_step_tokens = second.max_step_tokens = spare.max_step_tokens = 1 << 15
    num_tokens = 12 << 15  # 6 MB, more than the window of a stream
    hidden_states = torch.ones(num_tokens, HIDDEN)
    async with asyncio.timeout(60):
        outputs = await session.step(hidden_states, positions=[0], num_tokens=[num_tokens], num_outputs=[1])
    assert torch.equal(outputs, run_blocks(hidden_states, BlockRange(0, NUM_BLOCKS))[-1:])
    assert swarm.peers.failures == [second.peer_id]


async def test_a_long_replay_leaves_the_loop_to_others_while_it_is_queued(make_swarm):
    """Heartbeats and other sessions get their turns between the chunks that a server is too slow to take."""
    swarm = await make_swarm("0:6", max_step_tokens=1 << 14)
    swarm.servers[0].script = at(Step, lambda session: stopped(session, None))
    session = swarm.session(chunk_tokens=1 << 14)
    running = asyncio.create_task(session.step(torch.zeros(1 << 20, HIDDEN), positions=[0], num_tokens=[1 << 20]))
    seen: list[int] = []
    async with asyncio.timeout(20):
        while not seen or session.machine._chain.first_feed.is_behind:
            seen.append(sum(len(hop._outbox) for hop in session._hops))
            await asyncio.sleep(0)
    assert len(set(seen)) > 10
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_closing_does_not_wait_for_a_stopped_server(make_swarm):
    """Every server forgets the session as soon as it reads again; the client does not wait for that."""
    swarm = await make_swarm("0:3", "3:6")
    session = swarm.session()
    text = Text(session)
    await text.step(4)
    swarm.servers[1].script = stopped
    reached = asyncio.Event()
    swarm.servers[0].script = at(Step, lambda _: reached.set())
    running = asyncio.create_task(text.step(1))
    await reached.wait()
    async with asyncio.timeout(5):
        await session.close()
        with pytest.raises(InvalidRequest, match="closed"):
            await running
    with pytest.raises(InvalidRequest, match="closed"):
        await text.step(1)
    assert swarm.peers.failures == []


async def test_a_server_that_cannot_roll_back_gets_the_rows_again(make_swarm):
    """A recurrent state can't be taken back: the session is opened anew and replayed."""
    swarm = await make_swarm("0:6", can_rollback=False)
    text = Text(swarm.session())
    await text.step(6)
    await text.step(1, keep=[3])
    assert swarm.servers[0].received["OpenSession"] == 2 and swarm.peers.failures == []
