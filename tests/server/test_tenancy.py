"""The blocks of a server over time: what others are told, what is in memory, what comes of blocks that can't be had."""

import asyncio
import gc
import weakref
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from swarm.errors import ConfigError
from swarm.server.config import ServerConfig
from swarm.server.lean import settle_heap
from swarm.server.loading import Loader, LoadingStopped
from swarm.server.tenancy import Tenancy
from swarm.types import BlockRange, ServerState
from tests.server.fake_span import BLOCKS
from tests.server.test_serving import PLAN, FakeTransport, HeldSpan

OTHERS = BlockRange(4, 8)


class FakeLoader(Loader):
    """Makes spans at once, one at a time: those of before must be gone."""

    def __init__(self):
        super().__init__(ServerConfig(model="fake"), PLAN, files=None)
        self.loaded, self.fetched = [], []
        self._spans = []

    async def load_span(self, blocks, on_progress=None):
        assert not any(span() for span in self._spans), "what was loaded before is still in memory"
        self.loaded.append(blocks)
        span = HeldSpan(blocks)
        self._spans.append(weakref.ref(span))
        return span

    async def fetch_ahead(self, blocks):
        self.fetched.append(blocks)


class FakeFacts:
    """Measures spans; some blocks can't be run."""

    batch_tps = 7.0

    def __init__(self, *broken):
        self.broken = broken

    async def of_span(self, span):
        if span.blocks in self.broken:
            raise ConfigError(f"blocks {span.blocks} can't be run here")


class Told:
    """What the swarm is told, in order."""

    def __init__(self):
        self.records, self.changed = [], asyncio.Event()

    async def announce(self):
        self.records.append((self.tenancy.state.name, str(self.tenancy.plan.blocks)))
        self.changed.set()


@asynccontextmanager
async def tenancy_of(told, *, facts=None, transport=None):
    reach = SimpleNamespace(transport=transport or FakeTransport(), node=SimpleNamespace(peer_id="own"))
    told.tenancy = Tenancy(
        ServerConfig(model="fake"),
        PLAN,
        reach=reach,
        loader=FakeLoader(),
        facts=facts or FakeFacts(),
        announce=told.announce,
    )
    yield told.tenancy
    await told.tenancy.close()


async def test_a_server_says_what_it_holds_from_the_first_blocks_to_the_next():
    """DRAINING while sessions leave, JOINING with the other blocks; then it serves those, and nothing else."""
    told, transport = Told(), FakeTransport()
    async with tenancy_of(told, transport=transport) as tenancy:
        assert tenancy.state is ServerState.JOINING and not tenancy.num_sessions
        await tenancy.load()
        told.changed.clear()
        tenancy.serving.handler.drain = lambda timeout_s: told.changed.wait()
        moved = []
        tenancy.on_moved = lambda: moved.append(tenancy.serving.executor.span.blocks)
        await tenancy.leave_for(OTHERS, drain_s=5.0)
        assert tenancy.serving is None and not transport.services
        assert await tenancy.arrive() is True
        assert moved == [OTHERS] and tenancy._loader.fetched == [OTHERS] and transport.services
        assert (tenancy.holding.blocks, tenancy.holding.capacity_tps) == (OTHERS, 7.0)
    assert told.records == [("ONLINE", "0:4"), ("DRAINING", "0:4"), ("JOINING", "4:8"), ("ONLINE", "4:8")]


async def test_blocks_that_cannot_be_had_are_given_up_for_those_of_before():
    """What was loaded of them leaves the memory first, and the swarm is told."""
    told = Told()
    async with tenancy_of(told, facts=FakeFacts(OTHERS)) as tenancy:
        await tenancy.load()
        await tenancy.leave_for(OTHERS, drain_s=0.0)
        assert await tenancy.arrive() is False
        assert tenancy._loader.loaded == [BLOCKS, OTHERS, BLOCKS]
    assert told.records == [("ONLINE", "0:4"), ("JOINING", "4:8"), ("JOINING", "0:4"), ("ONLINE", "0:4")]


async def test_a_server_that_can_load_nothing_any_more_says_why():
    """Neither the new blocks nor the old ones: it ends."""
    facts = FakeFacts(OTHERS)
    async with tenancy_of(Told(), facts=facts) as tenancy:
        await tenancy.load()
        await tenancy.leave_for(OTHERS, drain_s=0.0)
        facts.broken = (OTHERS, BLOCKS)
        with pytest.raises(ConfigError, match="blocks 0:4 can't be run here"):
            await tenancy.arrive()


@pytest.mark.parametrize("is_moving", [False, True])
async def test_a_server_that_is_told_to_go_while_it_loads_serves_nothing(is_moving):
    """It is OFFLINE, announces nothing more, and does not go back to what it had."""
    told, facts = Told(), FakeFacts()
    async with tenancy_of(told, facts=facts) as tenancy:
        if is_moving:
            await tenancy.load()
            await tenancy.leave_for(OTHERS, drain_s=0.0)
        before = list(told.records)

        async def told_to_go(span):
            tenancy.end()

        facts.of_span = told_to_go
        with pytest.raises(LoadingStopped):
            await (tenancy.arrive() if is_moving else tenancy.load())
        assert tenancy.state is ServerState.OFFLINE and tenancy.serving is None and told.records == before


async def test_a_server_that_goes_admits_nobody():
    """Until its process is gone, peers may still come."""
    async with tenancy_of(Told()) as tenancy:
        await tenancy.load()
        tenancy.end()
        assert tenancy.state is tenancy.serving.handler.state is ServerState.OFFLINE


async def test_a_heap_that_was_settled_is_settled_again_after_a_move():
    """Else the garbage collector would go through the new blocks again and again; it must find the old ones, though."""
    try:
        async with tenancy_of(Told()) as tenancy:
            await tenancy.load()
            settle_heap()
            await tenancy.leave_for(OTHERS, drain_s=0.0)
            assert not gc.get_freeze_count()
            await tenancy.arrive()
            assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
