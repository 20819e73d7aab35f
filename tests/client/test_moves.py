"""Sessions that move to another server in the middle: between handlers and a real client, on made-up devices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest
import pytest_asyncio
import torch

from swarm.client.session import RemoteSession, SessionConfig
from swarm.network import Node, NodeConfig
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
