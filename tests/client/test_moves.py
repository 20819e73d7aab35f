"""Sessions that move to another server in the middle: between handlers and a real client, on made-up devices."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from types import SimpleNamespace

import pytest
import pytest_asyncio
import torch

from swarm.client import moves
from swarm.client import supervisor as client_supervisor
from swarm.client.alarm import Alarm
from swarm.client.config import SessionConfig
from swarm.client.moves import MAX_ASKED
from swarm.client.session import RemoteSession
from swarm.errors import PeerMisbehaved
from swarm.network import Node, NodeConfig
from swarm.server import handler, session_moves
from swarm.server.relief import RETRY_S
from swarm.server.session_moves import SessionMoves
from swarm.types import BlockRange
from tests.client.fake_server import FakePeers
from tests.server.conftest import chain_of
from tests.server.fakes import MODEL, Chain, eventually, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPANS = (BlockRange(0, 2), BlockRange(2, 4), BlockRange(4, 6))
DRAIN_S = 20.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """A client and six servers."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        config = NodeConfig(host="127.0.0.1", initial_peers=first.addresses)
        others = await asyncio.gather(*(Node.start(config) for _ in range(6)))
        for node in others:
            await stack.enter_async_context(node)
        yield [first, *others]


class Swarm:
    """Two servers for each of three spans, and sessions over them; the first three are used first."""

    def __init__(self, chain: Chain):
        self.chain = chain
        for index in range(3):
            chain.executors[index + 3].constant = chain.executors[index].constant
        servers = [SimpleNamespace(peer_id=chain.peer_id(index), blocks=SPANS[index % 3]) for index in range(6)]
        self.peers = FakePeers(servers)  # type: ignore[arg-type]
        self.peers.model = MODEL

    def session(self, rows: int = 1, **config) -> RemoteSession:
        settings = SessionConfig(**{"max_wait_s": 60.0, "late_s": 60.0, **config})
        return RemoteSession(self.peers, self.chain.client, batch_size=rows, max_length=512, config=settings)  # type: ignore[arg-type]

    def on(self, session: RemoteSession) -> list[int]:
        """Which servers a session uses."""
        return [[self.chain.peer_id(index) for index in range(6)].index(hop.peer_id) for hop in session.route]

    async def drain(self, index: int) -> None:
        """As a server does that was told to stop; all its sessions are gone then."""
        await self.chain.handlers[index].drain(DRAIN_S)
        assert not self.chain.handlers[index].num_sessions

    def num_run(self) -> list[int]:
        return [executor.num_tokens_run for executor in self.chain.executors]


def expected(row: torch.Tensor) -> torch.Tensor:
    for constant in (10, 20, 30):
        row = run_blocks(row, constant)
    return row


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
async def test_an_idle_session_moves_and_goes_on(nodes, push, which):
    """Every hop, neighbours, all: the next step goes to the new server, and nobody computes anything again."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session(2, push=push)
        rows = [tokens(40, 1), tokens(25, 2)]
        await session.step(torch.cat(rows), positions=[0, 0], num_tokens=[40, 25], num_outputs=[1, 1])
        await asyncio.gather(*(swarm.drain(index) for index in which))
        assert swarm.on(session) == [index + 3 if index in which else index for index in range(3)]
        for seed in range(3):
            new = tokens(2, seed)
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, new, strict=True)]
            outputs = await session.step(new, positions=[len(row) - 1 for row in rows], num_tokens=[1, 1])
            assert torch.equal(outputs, torch.cat([expected(row)[-1:] for row in rows]))
        before, after = swarm.num_run()[:3], swarm.num_run()[3:]
        assert [a + b for a, b in zip(before, after, strict=True)] == [71, 71, 71]
        assert session.machine.num_replays == 0 and session.moves.num_moves == len(which)
        assert swarm.peers.failures == []
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
@pytest.mark.parametrize("index", range(3))
async def test_a_session_moves_in_the_middle_of_a_prompt(nodes, index, push):
    """The old server finishes what it has taken, the rest of the chunks goes to the new one."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session(push=push, chunk_tokens=16)
        row = tokens(8)
        await session.step(row, positions=[0], num_tokens=[8])
        chain.executors[index].hold()
        new = tokens(90, 1)
        running = asyncio.create_task(session.step(new, positions=[8], num_tokens=[90], num_outputs=[1]))
        await eventually(lambda: bool(chain.executors[index].sessions[0].queue), "work")
        draining = asyncio.create_task(swarm.drain(index))
        await eventually(lambda: any(chain.executors[index + 3].sessions), "an heir")
        chain.executors[index].release()
        row = torch.cat([row, new])
        assert torch.equal(await running, expected(row)[-1:])
        await draining
        assert swarm.on(session)[index] == index + 3 and session.machine.num_replays == 0
        run = swarm.num_run()
        assert [a + b for a, b in zip(run[:3], run[3:], strict=True)] == [98, 98, 98]
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
async def test_beams_and_rollbacks_around_moves(nodes, push):
    """Permuted and cut rows come out right before and after a move, whichever server has moved."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session(2, push=push)
        rows = [tokens(40, 1), tokens(25, 2)]
        await session.step(torch.cat(rows), positions=[0, 0], num_tokens=[40, 25], num_outputs=[1, 1])
        steps = [((1, 0), (25, 40)), ((0, 0), (26, 20)), ((1, 1), (21, 21)), (None, (22, 15))]
        for number, (order, keep) in enumerate(steps):
            if number:
                await swarm.drain(number - 1)
            rows = [rows[old][:length] for old, length in zip(order or (0, 1), keep, strict=True)]
            new = tokens(2, 3 + number)
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, new, strict=True)]
            outputs = await session.step(new, positions=keep, num_tokens=[1, 1], order=order)
            assert torch.equal(outputs, torch.cat([expected(row)[-1:] for row in rows]))
        assert swarm.on(session) == [3, 4, 5]
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


async def test_who_has_moved_is_replaced_like_any_server(nodes):
    """After a move the history lies at the new server, which feeds a replacement of the next one with it."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        await swarm.drain(0)
        await chain.transports[1].close()
        for seed in range(2):
            new = tokens(1, seed)
            row = torch.cat([row, new])
            outputs = await session.step(new, positions=[len(row) - 1], num_tokens=[1])
            assert torch.equal(outputs, expected(row)[-1:])
        assert swarm.on(session) == [3, 4, 2] and session.machine.num_replays == 1
        assert chain.executors[3].num_tokens_run == 2 and chain.executors[4].num_tokens_run == 32
        await session.close()


async def test_where_one_has_no_room_the_next_is_asked(nodes):
    """A replica that is full refuses before a byte has come, and another takes the session."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        other = SimpleNamespace(peer_id=chain.peer_id(3), blocks=SPANS[1])  # another replica of the second span
        swarm.peers.servers.insert(2, other)  # type: ignore[arg-type]
        chain.executors[3].num_pages = 2
        session = swarm.session()
        row = tokens(40)
        await session.step(row, positions=[0], num_tokens=[40], num_outputs=[1])
        await swarm.drain(1)
        assert swarm.on(session) == [0, 4, 2] and swarm.peers.failures == []
        assert not chain.handlers[3].num_sessions and not chain.executors[3].pages
        assert chain.handlers[1].meter.given_bytes == chain.handlers[4].meter.taken_bytes > 0
        await session.close()


async def test_with_nobody_to_go_to_a_session_stays_until_the_end(nodes, monkeypatch):
    """It goes on; a server that leaves does not wait for it once it is quiet; then it is replayed as ever."""
    monkeypatch.setattr(handler, "QUIET_S", 0.05)
    monkeypatch.setattr(handler, "QUIET_SHARE", 0.05)
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        hidden, swarm.peers.servers = swarm.peers.servers, swarm.peers.servers[:3]
        session = swarm.session()
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        await chain.handlers[1].drain(DRAIN_S)  # returns when the session is quiet
        assert chain.handlers[1].num_sessions == 1 and swarm.on(session) == [0, 1, 2]
        swarm.peers.servers = hidden
        await chain.transports[1].close()
        new = tokens(1, 1)
        row = torch.cat([row, new])
        assert torch.equal(await session.step(new, positions=[30], num_tokens=[1]), expected(row)[-1:])
        assert session.machine.num_replays == 1
        await session.close()


@pytest.mark.parametrize("who", ["old", "new"])
async def test_a_server_that_dies_while_a_session_travels_costs_a_replay_at_most(nodes, monkeypatch, who):
    """Half of the state is there: neither that nor the other half is used."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        dying = asyncio.Event()

        async def stop(cache):
            dying.set()
            await asyncio.sleep(3600)

        monkeypatch.setattr(chain.executors[1 if who == "old" else 4], "layout", stop)
        draining = asyncio.create_task(chain.handlers[1].drain(DRAIN_S))
        await dying.wait()
        await chain.transports[1 if who == "old" else 4].close()
        new = tokens(1, 1)
        row = torch.cat([row, new])
        assert torch.equal(await session.step(new, positions=[30], num_tokens=[1]), expected(row)[-1:])
        draining.cancel()
        await session.close()
        await eventually(lambda: not chain.executors[1].pages and not chain.executors[4].pages, "freed pages")


class Frozen:
    """A session whose second server has frozen it, and a step that waits for it; `go` lets it travel."""

    def __init__(self, swarm: Swarm, monkeypatch: pytest.MonkeyPatch, **config):
        self.swarm, self.session, self.row = swarm, swarm.session(**config), tokens(30)
        self.frozen, self.go = asyncio.Event(), asyncio.Event()
        executor = swarm.chain.executors[1]
        self._layout = executor.layout
        monkeypatch.setattr(executor, "layout", self._wait)

    async def __aenter__(self) -> "Frozen":
        await self.session.step(self.row, positions=[0], num_tokens=[30], num_outputs=[1])
        self.draining = asyncio.create_task(self.swarm.chain.handlers[1].drain(DRAIN_S))
        await self.frozen.wait()
        new = tokens(1, 1)
        self.row = torch.cat([self.row, new])
        self.step = asyncio.create_task(self.session.step(new, positions=[30], num_tokens=[1]))
        await eventually(lambda: self.swarm.chain.executors[0].num_tokens_run == 31, "the first server's part")
        self.session._hops.probe(time.monotonic())
        await eventually(lambda: not any(hop.probe_sent_at for hop in self.session._hops), "answers")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.draining.cancel()
        await self.session.close()

    def is_stuck(self, now: float) -> None:
        """The step has stood still for too long."""
        supervisor = self.session._supervisor
        supervisor._lose_stuck(supervisor.step, now)
        supervisor.alarm.ring()

    async def _wait(self, blocks: BlockRange):
        self.frozen.set()
        await self.go.wait()
        return await self._layout(blocks)


async def test_a_step_waits_for_a_session_that_travels(nodes, monkeypatch):
    """Nobody runs it then, which is no sign that its server is stuck."""
    async with chain_of(nodes, 6) as chain, Frozen(Swarm(chain), monkeypatch) as it:
        for _ in range(3):
            it.is_stuck(time.monotonic())
        it.go.set()
        assert torch.equal(await it.step, expected(it.row)[-1:])
        assert it.session.moves.num_moves == 1 and it.session.machine.num_replays == 0
        assert it.swarm.peers.failures == []


async def test_a_server_that_freezes_a_session_and_goes_no_further_is_replaced(nodes, monkeypatch):
    """However often it asks for moves: one step waits so long for them, and no longer."""
    monkeypatch.setattr(client_supervisor, "MOVE_TIMEOUT_S", 5.0)
    async with chain_of(nodes, 6) as chain, Frozen(Swarm(chain), monkeypatch) as it:
        now = time.monotonic()
        it.is_stuck(now)
        it.is_stuck(now + 4.9)
        assert it.swarm.peers.failures == []
        it.is_stuck(now + 5.1)  # perhaps it is the way from the first to it
        assert it.swarm.peers.failures == []
        await eventually(lambda: it.session.machine.fed[1] == (31,), "what the first has for it")
        it.is_stuck(now + 5.2)
        assert torch.equal(await it.step, expected(it.row)[-1:])
        assert it.swarm.peers.failures == [chain.peer_id(1)] and it.session.machine.num_replays == 1


async def test_another_server_is_no_less_watched_while_a_session_travels(nodes, monkeypatch):
    """All are asked how far they are as ever, and waiting does not keep the loop busy."""
    waits, wait = list[float](), Alarm.wait

    async def noted(alarm, timeout_s):
        waits.append(timeout_s)
        await wait(alarm, timeout_s)

    async with chain_of(nodes, 6) as chain:
        monkeypatch.setattr(Alarm, "wait", noted)
        async with Frozen(Swarm(chain), monkeypatch, late_s=0.05, probe_timeout_s=30.0) as it:
            num_probes = it.session._hops._num_probes
            await eventually(lambda: it.session._hops._num_probes > num_probes + 2, "questions")
            assert not any(before <= 0 and after <= 0 for before, after in pairwise(waits))
            it.go.set()
            await it.step


async def test_a_closed_session_takes_its_move_along(nodes):
    """Nothing is left at either server when the client leaves in the middle of a move."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        await session.step(tokens(30), positions=[0], num_tokens=[30], num_outputs=[1])
        chain.executors[1].hold()
        running = asyncio.create_task(session.step(tokens(1), positions=[30], num_tokens=[1]))
        await eventually(lambda: bool(chain.executors[1].sessions[0].queue), "work")
        draining = asyncio.create_task(swarm.drain(1))
        await eventually(lambda: any(chain.executors[4].sessions), "an heir")
        await session.close()
        await asyncio.gather(running, return_exceptions=True)
        await draining
        await eventually(lambda: not any(executor.sessions for executor in chain.executors), "no sessions")


async def test_a_server_that_asks_again_and_again_is_replaced(nodes):
    """It could have us open sessions everywhere; and what it says of others is not believed."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        (served,) = chain.handlers[1]._sessions
        hand_over = served.moves.hand_over

        def refuse(message, group):
            if message.peer_id:
                served.moves._answer(message, "not yet")
            else:
                hand_over(message, group)

        served.moves.hand_over = refuse
        for _ in range(MAX_ASKED):
            served.moves.ask(60.0)
            await eventually(lambda: served.moves.has_nowhere, "the end of an attempt")
        served.moves.ask(60.0)
        await eventually(lambda: not chain.handlers[1].num_sessions, "the end of its session")
        assert swarm.peers.failures == [chain.peer_id(1)]
        new = tokens(1, 1)
        row = torch.cat([row, new])
        assert torch.equal(await session.step(new, positions=[30], num_tokens=[1]), expected(row)[-1:])
        await session.close()


async def test_who_found_nobody_is_asked_again_soon(nodes, monkeypatch):
    """A server is short of cache, and the client knows no other; half a minute later it does: no more is needed."""
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(handler, "time", clock)
    monkeypatch.setattr(session_moves, "time", clock)
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        hidden, swarm.peers.servers = swarm.peers.servers, swarm.peers.servers[:3]
        session = swarm.session()
        row = tokens(40)
        await session.step(row, positions=[0], num_tokens=[40], num_outputs=[1])
        short, replica = chain.handlers[1], SimpleNamespace(kv_free_tokens=1000, adapters=())
        (served,) = short._sessions
        chain.executors[1].num_pages = 2
        chain.executors[1].meter.num_swapped_out += 3
        short.relieve([replica])
        await eventually(lambda: served.moves.has_nowhere, "the client's answer")
        swarm.peers.servers = hidden
        now += RETRY_S - 1.0
        short.relieve([replica])
        assert served.moves.has_nowhere  # it was not asked
        now += 1.0
        short.relieve([replica])
        await eventually(lambda: swarm.on(session) == [0, 4, 2], "a move")
        assert session.moves.num_moves == 1 and session.machine.num_replays == 0
        await session.close()


async def test_a_server_may_ask_every_half_minute(nodes, monkeypatch):
    """A cache may be short for long; that alone costs it no session."""
    now = 1000.0
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        swarm.peers.servers = swarm.peers.servers[:3]
        session = swarm.session()
        await session.step(tokens(40), positions=[0], num_tokens=[40], num_outputs=[1])
        hop = session._hops[list(session.machine.hops)[1]]
        monkeypatch.setattr(moves, "time", SimpleNamespace(monotonic=lambda: now))
        for _ in range(3 * MAX_ASKED):
            session.moves.start(hop)
            now += RETRY_S
        for _ in range(MAX_ASKED):
            session.moves.start(hop)
        with pytest.raises(PeerMisbehaved, match="asked 8 times"):
            session.moves.start(hop)
        await session.close()


async def test_where_nobody_says_that_the_session_has_come_it_is_replayed(nodes, monkeypatch):
    """The old server has done its part: its word is not enough."""

    async def take_in_silence(own, stream):
        await own._desk.take(own._session, stream, own._client)

    monkeypatch.setattr(SessionMoves, "receive", take_in_silence)
    monkeypatch.setattr(moves, "TAKEN_TIMEOUT_S", 0.05)
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        await swarm.drain(1)
        new = tokens(1, 1)
        row = torch.cat([row, new])
        assert torch.equal(await session.step(new, positions=[30], num_tokens=[1]), expected(row)[-1:])
        assert session.machine.num_replays == 1 and session.moves.num_moves == 0
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")
