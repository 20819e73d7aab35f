"""The session driver against the real face of servers, with made-up devices behind it: both ends speak one protocol."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest
import pytest_asyncio
import torch

from swarm.client.config import SessionConfig
from swarm.client.session import RemoteSession
from swarm.errors import InvalidRequest
from swarm.network import Node, NodeConfig
from swarm.types import BlockRange
from tests.client.fake_server import FakePeers
from tests.server.conftest import chain_of
from tests.server.fakes import HIDDEN, MODEL, Chain, eventually, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPANS = (BlockRange(0, 2), BlockRange(2, 4), BlockRange(4, 6), BlockRange(2, 4))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """A client and four servers."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        config = NodeConfig(host="127.0.0.1", initial_peers=first.addresses)
        others = await asyncio.gather(*(Node.start(config) for _ in range(4)))
        for node in others:
            await stack.enter_async_context(node)
        yield [first, *others]


def session_on(chain: Chain, rows: int = 1, **config) -> tuple[RemoteSession, FakePeers]:
    """A session over the first three servers; the fourth can stand in for the second."""
    chain.executors[3].constant = chain.executors[1].constant
    servers = [SimpleNamespace(peer_id=chain.peer_id(index), blocks=span) for index, span in enumerate(SPANS)]
    peers = FakePeers(servers)  # type: ignore[arg-type]
    peers.model = MODEL
    settings = SessionConfig(**{"max_wait_s": 60.0, "late_s": 60.0, **config})
    return RemoteSession(peers, chain.client, batch_size=rows, max_length=512, config=settings), peers  # type: ignore[arg-type]


def expected(row: torch.Tensor) -> torch.Tensor:
    for constant in (10, 20, 30):
        row = run_blocks(row, constant)
    return row


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
async def test_prompt_decode_beams_and_rollback(nodes, push):
    """Every output is right, each server computes each token once, and everything is freed at the end."""
    async with chain_of(nodes, 4) as chain:
        session, peers = session_on(chain, 2, push=push, chunk_tokens=16)
        rows = [tokens(40, 1), tokens(25, 2)]
        outputs = await session.step(torch.cat(rows), positions=[0, 0], num_tokens=[40, 25], num_outputs=[1, 1])
        assert torch.equal(outputs, torch.cat([expected(row)[-1:] for row in rows]))
        for index, (order, keep) in enumerate([(None, (40, 25)), ((1, 0), (26, 41)), ((0, 0), (27, 20))]):
            rows = [rows[old][:length] for old, length in zip(order or (0, 1), keep, strict=True)]
            new = tokens(2, 3 + index)
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, new, strict=True)]
            outputs = await session.step(new, positions=keep, num_tokens=[1, 1], order=order)
            assert torch.equal(outputs, torch.cat([expected(row)[-1:] for row in rows]))
        assert [executor.num_tokens_run for executor in chain.executors] == [71, 71, 71, 0]
        assert peers.failures == [] and session.machine.num_pushes == (2 if push else 0)
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


@pytest.mark.parametrize("how", ["connections cut", "polite"])
async def test_a_server_that_goes_is_replaced_from_the_history_of_the_one_before(nodes, how):
    """The first server computes nothing again."""
    async with chain_of(nodes, 4) as chain:
        session, peers = session_on(chain)
        row = tokens(30)
        await session.step(row, positions=[0], num_tokens=[30], num_outputs=[1])
        if how == "polite":
            await chain.transports[1].close()
        else:
            for connection in list(chain.transports[1]._connections):
                connection.transport.abort()
            peers.servers.pop(1)
        for seed in range(3):
            new = tokens(1, seed)
            row = torch.cat([row, new])
            outputs = await session.step(new, positions=[len(row) - 1], num_tokens=[1])
            assert torch.equal(outputs, expected(row)[-1:])
        assert session.machine.num_replays == 1 and chain.executors[0].num_tokens_run == 33
        assert chain.executors[3].num_tokens_run == 33
        await session.close()


async def test_a_cancelled_prompt_is_forgotten_everywhere(nodes):
    """The next step gives the right outputs though servers were in the middle of the other one."""
    async with chain_of(nodes, 4) as chain:
        session, peers = session_on(chain)
        chain.executors[1].hold()
        running = asyncio.create_task(session.step(tokens(60), positions=[0], num_tokens=[60]))
        await eventually(lambda: bool(chain.executors[1].sessions and chain.executors[1].sessions[0].queue), "work")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        chain.executors[1].release()
        row = tokens(7, 3)
        assert torch.equal(await session.step(row, positions=[0], num_tokens=[7]), expected(row))
        assert peers.failures == []
        await session.close()


async def test_a_step_that_servers_refuse_is_the_callers_fault(nodes):
    """Hidden states of another width: InvalidRequest, and nobody is blamed."""
    async with chain_of(nodes, 4) as chain:
        session, peers = session_on(chain)
        with pytest.raises(InvalidRequest):
            await session.step(torch.zeros(1, HIDDEN + 1), positions=[0], num_tokens=[1])
        assert peers.failures == []
        await session.close()
