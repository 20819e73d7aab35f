"""Sessions with adapters through the real face of servers: uploads, replacements, refusals; made-up devices behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from swarm.client.adapter_needs import AdapterNeeds, WhoHas
from swarm.client.config import SessionConfig
from swarm.client.row_adapters import RowAdapters
from swarm.client.session import RemoteSession
from swarm.errors import AdapterError, InvalidRequest, PeerBusy
from swarm.protocol import ADAPTER_SERVICE
from swarm.server import adapter_desk
from swarm.server.adapter_intake import Base
from swarm.types import BlockRange
from tests.adapters import make_adapter, shape
from tests.client.fake_server import FakePeers
from tests.client.test_session_with_handlers import SPANS, nodes  # noqa: F401
from tests.server.conftest import chain_of
from tests.server.fakes import HIDDEN, MODEL, Chain, eventually, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALL = BlockRange(0, 8)
BASE = Base(blocks=ALL, shapes={block: shape() for block in ALL}, num_blocks=8, hidden_size=HIDDEN, name="fake")
A, B = make_adapter(2, blocks=range(6)), make_adapter(5, blocks=(0, 5))
OF_SERVER = {A: (12, 12, 12), B: (10, 10, 10), None: (0, 0, 0)}
"""What each server's outputs grow by: a fake server holds all blocks, so it adds up all of an adapter's."""


class Peers(FakePeers):
    """That know who has which adapter from steps alone."""

    model = MODEL

    def __init__(self, chain: Chain):
        super().__init__([SimpleNamespace(peer_id=chain.peer_id(i), blocks=span) for i, span in enumerate(SPANS)])  # type: ignore[misc]
        self.who_has = WhoHas()

    def adapters_of(self, adapters: RowAdapters) -> AdapterNeeds | None:
        return AdapterNeeds(adapters, self.who_has) if adapters.remote else None

    def have_adapters(self, hops, adapters) -> None:
        self.who_has.seen(hops, adapters.digests)

    async def route(self, blocks, **wishes):
        return await super().route(blocks)


@asynccontextmanager
async def swarm_of(nodes, *, limit_bytes: int = 1 << 20, with_adapters=range(4)) -> AsyncIterator[tuple[Chain, Peers]]:  # noqa: F811
    """Three servers in a row, and a fourth that can stand in for the second."""
    async with chain_of(nodes, 4) as chain:
        chain.executors[3].constant = chain.executors[1].constant
        for index in with_adapters:
            chain.handlers[index].take_adapters(BASE, limit_bytes)
            chain.transports[index].serve(ADAPTER_SERVICE, chain.handlers[index].adapter)
        yield chain, Peers(chain)


def session_on(chain, peers, *adapters, **config):
    settings = SessionConfig(**{"max_wait_s": 60.0, "late_s": 60.0, **config})
    return RemoteSession(
        peers,
        chain.client,
        batch_size=len(adapters),
        max_length=512,
        config=settings,
        adapters=RowAdapters.of(adapters),
    )


def expected(row, adapter):
    for constant, own in zip((10, 20, 30), OF_SERVER[adapter], strict=True):
        row = run_blocks(row, constant + own)
    return row


async def step(session, rows, adapters):
    """The first step, whose last outputs must be right."""
    counts = [len(row) for row in rows]
    found = await session.step(
        torch.cat(rows), positions=[0] * len(rows), num_tokens=counts, num_outputs=[1] * len(rows)
    )
    right = [expected(row, adapter)[-1:] for row, adapter in zip(rows, adapters, strict=True)]
    assert torch.equal(found, torch.cat(right))


def uploaded(chain):
    return [handler.adapters.loader.num_uploaded_bytes for handler in chain.handlers]


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
async def test_rows_with_different_adapters_share_a_session(nodes, push):  # noqa: F811
    """Each server gets them once; a second session, of another client's process perhaps, sends nothing."""
    async with swarm_of(nodes) as (chain, peers):
        for _ in range(2):
            session = session_on(chain, peers, A, None, B, A, push=push)
            rows = [tokens(20, 1), tokens(9, 2), tokens(14, 3), tokens(20, 1)]
            await step(session, rows, [A, None, B, A])
            new = tokens(4, 5)
            rows = [torch.cat([rows[old], token[None]]) for old, token in zip((3, 1, 2, 3), new, strict=True)]
            found = await session.step(new, positions=[20, 9, 14, 20], num_tokens=[1] * 4, order=[3, 1, 2, 3])
            right = [expected(row, adapter)[-1:] for row, adapter in zip(rows, [A, None, B, A], strict=True)]
            assert torch.equal(found, torch.cat(right))
            with pytest.raises(InvalidRequest, match="can't continue row"):
                await session.step(new, positions=[21, 10, 10, 21], num_tokens=[1] * 4, order=[0, 1, 1, 3])
            await session.close()
            before = uploaded(chain)
        assert uploaded(chain) == before and all(before[:3]) and not before[3]
        await eventually(lambda: chain.pages == 0, "freed pages")


async def test_a_replacement_asks_other_servers_first(nodes):  # noqa: F811
    """The adapter comes from a neighbour that is known to have it, and the session goes on where it was."""
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, A)
        row = tokens(30)
        await step(session, [row], [A])
        for connection in list(chain.transports[1]._connections):
            connection.transport.abort()
        peers.servers.pop(1)
        peers.who_has.seen([replace(hop, blocks=ALL) for hop in session.route[:1]], [A.digest])
        for seed in range(3):
            new = tokens(1, seed)
            row = torch.cat([row, new])
            found = await session.step(new, positions=[len(row) - 1], num_tokens=[1])
            assert torch.equal(found, expected(row, A)[-1:])
        assert session.machine.num_replays == 1
        assert chain.handlers[3].adapters.loader.num_fetched_bytes and not uploaded(chain)[3]
        await session.close()


async def test_a_replacement_gets_the_adapter_from_the_client_if_nobody_else_has_it(nodes):  # noqa: F811
    """While it comes, the step waits; nobody is blamed for that."""
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, A)
        row = tokens(30)
        await step(session, [row], [A])
        peers.who_has = WhoHas()
        session._adapters._who_has = peers.who_has
        await chain.transports[1].close()
        row = torch.cat([row, tokens(1)])
        found = await session.step(tokens(1), positions=[30], num_tokens=[1])
        assert torch.equal(found, expected(row, A)[-1:]) and uploaded(chain)[3]
        assert peers.failures.count(chain.peer_id(3)) == 0
        await session.close()


async def test_a_server_that_knows_better_is_believed(nodes):  # noqa: F811
    """An adapter for another model ends the step at once with the server's reason, at whatever hop."""
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, make_adapter(1, num_blocks=12))
        with pytest.raises(AdapterError, match=r"fake has \(8, 4\)"):
            await session.step(tokens(3), positions=[0], num_tokens=[3])
        await session.close()
        other = session_on(chain, peers, B)
        await step(other, [tokens(5)], [B])
        await other.close()


async def test_bytes_that_changed_on_the_way_are_an_error_of_the_caller(nodes):  # noqa: F811
    """What this client has is not what its name says."""
    spoiled = replace(B, shards={block: bytes(len(data)) for block, data in B.shards.items()})
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, spoiled)
        with pytest.raises(AdapterError, match="has hash"):
            await session.step(tokens(3), positions=[0], num_tokens=[3])
        await session.close()


async def test_only_a_name_is_not_enough_when_no_server_has_it(nodes):  # noqa: F811
    """The client is asked, and has nothing to send."""
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, replace(B, shards={}))
        with pytest.raises(AdapterError, match="only its name is known here"):
            await session.step(tokens(3), positions=[0], num_tokens=[3])
        await session.close()


async def test_servers_without_room_are_left_for_others(nodes):  # noqa: F811
    """One that takes no adapters is replaced; where there is no other, the step ends with its reason."""
    async with swarm_of(nodes, with_adapters=(0, 2, 3)) as (chain, peers):
        session = session_on(chain, peers, A)
        await step(session, [tokens(5)], [A])
        assert session.route[1].peer_id == chain.peer_id(3)
        await session.close()
        peers.servers = [server for server in peers.servers if server.peer_id != chain.peer_id(3)]
        session = session_on(chain, peers, A, max_wait_s=0.2)
        with pytest.raises(PeerBusy, match="takes no adapters"):
            await session.step(tokens(5), positions=[0], num_tokens=[5])
        await session.close()


async def test_a_slow_transfer_is_no_trouble_as_long_as_it_goes_on(nodes, monkeypatch):  # noqa: F811
    """The time that a caller waits at most does not run while bytes come."""
    monkeypatch.setattr(adapter_desk, "TELL_PERIOD_S", 0.01)
    async with swarm_of(nodes) as (chain, peers):
        session = session_on(chain, peers, A, max_wait_s=0.3)
        check = chain.handlers[1].adapters.loader._intake._check

        async def check_slowly(*arguments):
            await asyncio.sleep(0.12)
            await check(*arguments)

        monkeypatch.setattr(chain.handlers[1].adapters.loader._intake, "_check", check_slowly)
        await step(session, [tokens(5)], [A])
        assert peers.failures == []
        await session.close()
