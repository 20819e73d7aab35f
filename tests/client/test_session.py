"""The session driver against scripted servers on real transports: what crosses the wire, and whom it blames."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
import torch

from swarm.client.config import SessionConfig
from swarm.client.session import RemoteSession
from swarm.codec import encode_tensor
from swarm.errors import (
    CheckpointMismatch,
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerTimeout,
    RouteNotFound,
)
from swarm.network import Node, NodeConfig
from swarm.protocol import (
    Forward,
    Message,
    OpenSession,
    Probe,
    ProbeResult,
    PushHello,
    SessionOpened,
    Step,
    StepResult,
    Waiting,
)
from swarm.transport import Transport
from swarm.types import BlockRange
from tests.client.fake_server import HIDDEN, NUM_BLOCKS, FakePeers, FakeServer, FakeSession, Script, run_blocks

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_NODES = 7
CHAIN = ("0:2", "2:4", "4:6")
PATIENT = 60.0
"""Longer than any test may take."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """Peers that know each other; the last is the client's."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        config = NodeConfig(host="127.0.0.1", initial_peers=first.addresses)
        others = await asyncio.gather(*(Node.start(config) for _ in range(NUM_NODES - 1)))
        for node in others:
            await stack.enter_async_context(node)
        yield [first, *others]


class CountingSession(RemoteSession):
    """Counts what its supervisor is told."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told: Counter[str] = Counter()
        self.heard = asyncio.Event()
        """Set at every message."""
        self._tell, self._supervisor.on_message = self._supervisor.on_message, self._count

    def _count(self, hop, message: Message, body: memoryview) -> None:
        self.told[type(message).__name__] += 1
        self.heard.set()
        self._tell(hop, message, body)


@dataclass
class Swarm:
    """Servers on the shared nodes, and a client that knows them in this order of preference."""

    servers: list[FakeServer]
    peers: FakePeers
    transport: Transport
    sessions: list[CountingSession] = field(default_factory=list)

    def session(self, batch_size: int = 1, **config) -> CountingSession:
        settings = SessionConfig(**{"max_wait_s": PATIENT, "late_s": PATIENT, "step_timeout_s": PATIENT, **config})
        session = CountingSession(
            self.peers, self.transport, batch_size=batch_size, max_length=1 << 20, config=settings
        )
        self.sessions.append(session)
        return session


@pytest_asyncio.fixture(loop_scope="module")
async def make_swarm(nodes: list[Node]) -> AsyncIterator[Callable]:
    """Swarms of one's own, with servers of the given spans."""
    async with AsyncExitStack() as stack:
        made: list[Swarm] = []

        async def make(*spans: str, **settings) -> Swarm:
            servers = [
                FakeServer(node, BlockRange.parse(span), **settings)
                for node, span in zip(nodes[:-1], spans, strict=False)
            ]
            assert len(servers) == len(spans)
            for server in servers:
                await stack.enter_async_context(server.transport)
            transport = await stack.enter_async_context(Transport(nodes[-1]))
            made.append(Swarm(servers, FakePeers(servers), transport))
            return made[-1]

        yield make
        for swarm in made:
            for session in swarm.sessions:
                await session.close()


class Text:
    """Rows of made-up hidden states, and what the blocks make of them."""

    def __init__(self, session: RemoteSession, rows: int = 1, seed: int = 0):
        self.session = session
        self.rows = [torch.zeros(0, HIDDEN) for _ in range(rows)]
        self._random = torch.Generator().manual_seed(seed)

    async def step(self, *num_tokens: int, keep: list[int] | None = None, order: list[int] | None = None) -> None:
        """Add tokens to the rows in one step of the session, and check its outputs."""
        before = self.rows if order is None else [self.rows[old] for old in order]
        positions = keep or [len(row) for row in before]
        new = [torch.randint(0, 100, (count, HIDDEN), generator=self._random).float() for count in num_tokens]
        rows = [torch.cat([row[:kept], more]) for row, kept, more in zip(before, positions, new, strict=True)]
        outputs = await self.session.step(torch.cat(new), positions=positions, num_tokens=num_tokens, order=order)
        self.rows = rows
        expected = [
            run_blocks(row, BlockRange(0, NUM_BLOCKS))[kept:] for row, kept in zip(rows, positions, strict=True)
        ]
        assert torch.equal(outputs, torch.cat(expected))

    async def decode(self, num_steps: int) -> None:
        for _ in range(num_steps):
            await self.step(*[1] * len(self.rows))


def at(kind: type[Message], action: Callable[[FakeSession], object], *, skip: int = 0) -> Script:
    """Do something when a message of this kind comes, once, after `skip` of them; then the message is handled."""
    left = [skip]

    async def script(session: FakeSession, message: Message) -> bool | None:
        if not isinstance(message, kind):
            return None
        left[0] -= 1
        if left[0] != -1:
            return None
        result = action(session)
        return await result if asyncio.iscoroutine(result) else None  # type: ignore[no-any-return]

    return script


def dying(session: FakeSession) -> None:
    session.server.kill()
    raise PeerDisconnected("dead")


def refusing(error: Exception) -> Callable[[FakeSession], None]:
    def action(session: FakeSession) -> None:
        raise error

    return action


async def stopped(session: FakeSession, message: Message) -> None:
    """Connected, but deaf and dumb."""
    await asyncio.Event().wait()


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


@pytest.mark.parametrize("index", range(3))
async def test_a_stopped_hop_is_found_by_asking(make_swarm, index):
    """Connected and silent: the step is late, the others answer, this one does not."""
    swarm = await make_swarm(*CHAIN, CHAIN[index])
    text = Text(swarm.session(late_s=0.2, probe_timeout_s=2.0))
    await text.step(5)
    await text.decode(2)
    swarm.servers[index].script = stopped
    await text.decode(2)
    assert swarm.peers.failures == [swarm.servers[index].peer_id]


async def test_a_hop_that_lives_but_does_nothing_is_replaced_later(make_swarm):
    """It answers, but swallows what it is given: after the step's deadline its work goes elsewhere."""

    async def idle(session: FakeSession, message: Message) -> bool:
        return isinstance(message, Step)

    swarm = await make_swarm("0:6", "0:6")
    session = swarm.session(late_s=0.05, probe_timeout_s=PATIENT, step_timeout_s=0.5)
    text = Text(session)
    swarm.servers[0].script = idle
    await text.step(5)
    assert swarm.peers.failures == [swarm.servers[0].peer_id] and session.told["ProbeResult"] >= 1


async def test_a_client_that_slept_past_all_deadlines_goes_on(make_swarm):
    """The only server is silent, and stuck, at the same moment: it is replaced once."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(Step, lambda session: stopped(session, None))
    session = swarm.session(late_s=0.05, probe_timeout_s=0.3, step_timeout_s=0.5)
    running = asyncio.create_task(Text(session).step(5))
    async with asyncio.timeout(20):
        while not any(hop.probe_sent_at for hop in session._hops):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    time.sleep(1.0)  # noqa: ASYNC251
    await running
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_a_way_between_two_hops_that_carries_nothing_is_given_up(make_swarm):
    """Pushed steps vanish though both servers answer: the client stands in between, and remembers."""
    swarm = await make_swarm("0:3", "3:6")
    first, second = swarm.servers

    async def swallow(session: FakeSession, message: Message) -> bool:
        return isinstance(message, Step) and not second.received["Step"]

    second.script = swallow
    session = swarm.session(late_s=0.05, probe_timeout_s=PATIENT, step_timeout_s=1.0)
    text = Text(session)
    await text.step(5)
    await text.decode(2)
    assert swarm.peers.failures == []
    assert swarm.peers.pairs_without_push == {(first.peer_id, second.peer_id)}


async def test_servers_that_cannot_reach_each_other_are_connected_by_the_client(make_swarm):
    """Outputs stay the same, nobody is blamed, the other pair still pushes, and the next session knows beforehand."""
    swarm = await make_swarm(*CHAIN)
    first, second, _ = swarm.servers
    first.unreachable = {second.peer_id}
    session = swarm.session()
    text = Text(session)
    await text.step(5)
    await text.decode(3)
    assert swarm.peers.failures == [] and session.machine.num_pushes == 1 and session.machine.num_replays == 0
    assert swarm.peers.pairs_without_push == {(first.peer_id, second.peer_id)}
    assert first.sessions[0].forwarded == [second.peer_id, ""]
    await session.close()
    later = swarm.session()
    await Text(later).step(4)
    assert first.sessions[-1].forwarded == [""] and later.told["LinkDown"] == 0


async def test_a_link_that_breaks_in_mid_session_falls_back_to_the_client(make_swarm):
    """Both servers live: what is missing comes from the first one's history."""
    swarm = await make_swarm(*CHAIN)
    text = Text(swarm.session())
    await text.step(5)
    await swarm.servers[1].sessions[0].lose_link()
    await text.decode(3)
    assert swarm.peers.failures == [] and len(swarm.peers.pairs_without_push) == 1


async def test_a_link_to_a_stopped_server_blames_the_server(make_swarm):
    """The one before says that it can't send: the next one is asked, and replaced when it is silent."""
    swarm = await make_swarm("0:3", "3:6", "3:6")
    first, second = swarm.servers[:2]
    text = Text(swarm.session(probe_timeout_s=0.5))
    await text.step(5)
    second.script = stopped
    await first.sessions[0].lose_link()
    await text.decode(2)
    assert swarm.peers.failures == [second.peer_id] and swarm.peers.pairs_without_push == frozenset()


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


# -- whom to blame ------------------------------------------------------------------------------------------------


async def test_a_refusal_of_the_step_itself_is_not_retried(make_swarm):
    """InvalidRequest for a step of ours is our own fault: it is raised at once, and no other server is asked."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(Step, refusing(InvalidRequest("bad")))
    text = Text(swarm.session())
    with pytest.raises(InvalidRequest, match="bad"):
        await text.step(2)
    assert swarm.peers.failures == [] and not swarm.servers[1].received
    await text.step(2)


async def test_a_refusal_to_open_leads_to_another_server(make_swarm):
    """A server that moved on refuses what its old record promised; the next one is asked."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(OpenSession, refusing(InvalidRequest("runs 0:2")))
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_when_everybody_refuses_to_open_the_reason_is_raised(make_swarm):
    """Not an endless search: the refusal itself, after a few attempts."""
    swarm = await make_swarm("0:6")

    async def refuse(session: FakeSession, message: Message) -> None:
        raise CheckpointMismatch("other")

    swarm.servers[0].script = refuse
    with pytest.raises(CheckpointMismatch, match="other"):
        await Text(swarm.session()).step(1)
    assert swarm.servers[0].received["OpenSession"] == 4


def result(
    step_id: int = 0, positions: int = 0, num_tokens: int = 2, rows: int = 1, width: int = HIDDEN, dtype=torch.float32
) -> tuple[Message, memoryview]:
    spec, payload = encode_tensor(torch.zeros(num_tokens, width, dtype=dtype))
    return (
        StepResult(
            step_id=step_id,
            positions=(positions,) * rows,
            num_tokens=(num_tokens,) + (0,) * (rows - 1),
            hidden_states=spec,
            trace=(),
        ),
        payload,
    )


MISBEHAVIOUR = {
    "too wide": result(width=HIDDEN + 1),
    "a step that was not begun": result(step_id=7),
    "another type": result(dtype=torch.float16),
    "another number of rows": result(rows=2),
    "beyond what was asked": result(num_tokens=3),
    "a gap": result(positions=1, num_tokens=1),
    "a body that is too short": (result()[0], memoryview(bytes(3))),
    "another message": (SessionOpened(max_step_tokens=1, can_rollback=True), memoryview(b"")),
}


@pytest.mark.parametrize("lie", MISBEHAVIOUR)
async def test_a_malformed_answer_blames_the_server(make_swarm, lie):
    """Results that can't be what was asked for, other messages: the server is replaced."""
    swarm = await make_swarm("0:6", "0:6")

    async def lying(session: FakeSession) -> bool:
        await session.stream.send(*MISBEHAVIOUR[lie])
        return True

    swarm.servers[0].script = at(Step, lying)
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_a_server_that_ends_the_session_is_replaced(make_swarm):
    """An orderly end of the stream is a failure, too."""
    swarm = await make_swarm("0:6", "0:6")

    async def end(session: FakeSession) -> bool:
        await session.stream.close()
        return True

    swarm.servers[0].script = at(Step, end)
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_the_same_result_again_and_again_is_no_progress(make_swarm):
    """A server that repeats part of the outputs for ever is found out like one that says nothing."""
    swarm = await make_swarm("0:6", "0:6")

    async def repeat(session: FakeSession) -> bool:
        while not session.stream.is_over:
            await session.stream.send(*result(num_tokens=1))
            await asyncio.sleep(0)
        return True

    swarm.servers[0].script = at(Step, repeat)
    session = swarm.session(late_s=0.05, probe_timeout_s=0.5)
    await session.step(torch.zeros(2, HIDDEN), positions=[0], num_tokens=[2])
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


# -- patience -----------------------------------------------------------------------------------------------------


async def test_patience_ends_with_the_last_error(make_swarm):
    """When every server keeps failing, the caller gets the reason after max_wait_s, not never."""
    swarm = await make_swarm("0:6")

    async def fail(session: FakeSession, message: Message) -> None:
        raise PeerDisconnected("gone")

    swarm.servers[0].script = fail
    with pytest.raises(PeerDisconnected, match="gone"):
        await Text(swarm.session(max_wait_s=0.3)).step(1)


async def test_catching_up_takes_as_long_as_it_takes(make_swarm):
    """A second failure, after a replay that took longer than max_wait_s and got ahead, does not end the step."""
    swarm = await make_swarm(*CHAIN, CHAIN[1], CHAIN[1], max_step_tokens=4)
    first, slow = swarm.servers[1], swarm.servers[3]
    session = swarm.session(max_wait_s=2.5, late_s=0.02, probe_timeout_s=PATIENT)
    text = Text(session)
    await text.step(60)

    async def crawl(session: FakeSession, message: Message) -> None:
        if isinstance(message, Step):
            await asyncio.sleep(0.25)
            if slow.received["push:Step"] > 12:
                dying(session)

    slow.script = crawl
    first.kill()
    await text.decode(2)
    assert {first.peer_id, slow.peer_id} == set(swarm.peers.failures) and slow.received["push:Step"] == 13


async def test_a_server_that_fails_at_the_same_token_every_time_is_given_up(make_swarm):
    """The outputs before that token come each time, but only the first time are they new."""
    swarm = await make_swarm("0:6", max_step_tokens=4)

    async def fail(session: FakeSession, message: Message) -> None:
        if isinstance(message, Step) and message.positions[0] >= 8:
            raise PeerBusy("full")

    swarm.servers[0].script = fail
    async with asyncio.timeout(20):
        with pytest.raises(PeerBusy, match="full"):
            await Text(swarm.session(max_wait_s=0.3)).step(16)


async def test_a_server_that_only_says_when_asked_that_it_waits_is_not_waited_for_without_end(make_swarm):
    """Its word holds off the search for who is stuck, but not the caller's limit."""
    swarm = await make_swarm("0:6")

    async def wait(session: FakeSession, message: Message) -> bool:
        if isinstance(message, Probe):
            await session.stream.send(
                ProbeResult(nonce=message.nonce, step_id=0, received=(2,), produced=(0,), is_waiting=True)
            )
        return isinstance(message, Probe | Step)

    swarm.servers[0].script = wait
    async with asyncio.timeout(20):
        with pytest.raises(PeerBusy, match="no room"):
            await Text(swarm.session(max_wait_s=0.3, late_s=0.02)).step(2)


async def test_a_session_outlives_the_last_replica(make_swarm):
    """Nobody left: the step waits up to the caller's limit, then fails; when a server is back, the session goes on."""
    swarm = await make_swarm("0:3", "3:6")
    lost = swarm.servers[1]
    text = Text(swarm.session(max_wait_s=0.3))
    await text.step(6)
    await text.decode(2)
    lost.kill()
    swarm.peers.servers.remove(lost)
    for _ in range(2):
        with pytest.raises(RouteNotFound, match="block 3"):
            await text.decode(1)
    lost.revive()
    swarm.peers.servers.append(lost)
    await text.decode(3)
    assert swarm.servers[0].num_tokens <= 6 + 5 + 2  # its part was not lost


async def test_missing_blocks_are_waited_for(make_swarm):
    """A server that appears in time is used."""
    swarm = await make_swarm("0:6")
    late = swarm.peers.servers.pop()
    asked = []

    def appear(blocks: BlockRange) -> None:
        asked.append(blocks)
        if len(asked) == 3:
            swarm.peers.servers.append(late)

    swarm.peers.on_route = appear
    await Text(swarm.session()).step(2)
    assert len(asked) == 3


async def test_a_lookup_that_fails_is_tried_again(make_swarm):
    """A DHT that does not answer costs a pause, not the session."""
    swarm = await make_swarm("0:6")
    failures = [PeerTimeout("DHT search did not end")]

    def fail_once(blocks: BlockRange) -> None:
        if failures:
            raise failures.pop()

    swarm.peers.on_route = fail_once
    await Text(swarm.session()).step(2)


async def test_a_server_without_room_is_waited_for_and_shown(make_swarm, caplog):
    """Waiting keeps a step alive beyond its deadline, is logged once a second at most, and shown while it lasts."""
    swarm = await make_swarm("0:6")
    seen = []

    async def wait(session: FakeSession) -> None:
        client.heard.clear()
        for _ in range(4):
            await session.stream.send(Waiting(step_id=0, expected_s=7.0))
        await client.heard.wait()
        seen.append((client.waiting.peer_id, client.waiting.expected_s, repr(client)))

    swarm.servers[0].script = at(Step, wait)
    client = swarm.session()
    with caplog.at_level(logging.INFO, "swarm.client.supervisor"):
        await Text(client).step(2)
    name = swarm.servers[0].peer_id[-8:]
    assert seen == [
        (swarm.servers[0].peer_id, 7.0, f"<RemoteSession 1 hops | position 2/1048576 | waits 7 s for {name}>")
    ]
    assert client.waiting is None and swarm.peers.failures == []
    assert sum("no room" in record.message for record in caplog.records) == 1


async def test_waiting_for_room_ends_with_the_callers_limit(make_swarm):
    """A server that says for ever that it has no room yet: PeerBusy, and the session can be tried again."""
    swarm = await make_swarm("0:6")

    async def wait(session: FakeSession) -> bool:
        while not session.stream.is_over:
            await session.stream.send(Waiting(step_id=0, expected_s=7.0))
            await asyncio.sleep(0)
        return True

    swarm.servers[0].script = at(Step, wait)
    text = Text(swarm.session(max_wait_s=0.2))
    with pytest.raises(PeerBusy, match="no room") as caught:
        await text.step(2)
    assert caught.value.retry_after_s == 7.0 and caught.value.peer_id == swarm.servers[0].peer_id


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


async def test_a_probe_is_not_needed_where_steps_are_on_time(make_swarm):
    """Asking costs nothing as long as nothing is late."""
    swarm = await make_swarm(*CHAIN)
    text = Text(swarm.session())
    await text.step(4)
    await text.decode(5)
    assert sum(server.received[Probe.__name__] for server in swarm.servers) == 0


async def test_a_server_that_cannot_roll_back_gets_the_rows_again(make_swarm):
    """A recurrent state can't be taken back: the session is opened anew and replayed."""
    swarm = await make_swarm("0:6", can_rollback=False)
    text = Text(swarm.session())
    await text.step(6)
    await text.step(1, keep=[3])
    assert swarm.servers[0].received["OpenSession"] == 2 and swarm.peers.failures == []
