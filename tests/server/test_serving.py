"""What serves a span of blocks: open to peers once it is ready, closed to them before it goes."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import torch

from swarm.errors import ConfigError, PeerBusy
from swarm.protocol import ADAPTER_SERVICE, INFO_SERVICE, PUSH_SERVICE, SESSION_SERVICE, STATE_SERVICE, TRAIN_SERVICE
from swarm.server.config import ServerConfig
from swarm.server.plan import Plan
from swarm.server.serving import Serving
from swarm.types import BlockRange, ServerState
from tests.server.fake_span import BLOCKS, FakeSpan

SERVICES = {SESSION_SERVICE, PUSH_SERVICE, STATE_SERVICE, TRAIN_SERVICE, INFO_SERVICE}
PLAN = Plan(
    checkpoint=SimpleNamespace(name="fake", digest="ab" * 32),
    num_blocks=8,
    blocks=BLOCKS,
    is_auto=True,
    device=torch.device("cpu"),
    dtype=torch.float32,
    quantization="none",
)


class HeldSpan(FakeSpan):
    """A span as it comes out of loading."""

    max_positions = 512

    def __init__(self, blocks: BlockRange = BLOCKS):
        super().__init__()
        self.blocks = blocks

    def shape(self, block):
        return {}


class FakeTransport:
    """Remembers which services there are, and what is said of those that ended."""

    def __init__(self):
        self.services, self.stopped = {}, {}

    def serve(self, service, handler):
        self.services[service] = handler

    async def stop_serving(self, service, error):
        del self.services[service]
        self.stopped[service] = str(error)


class FakeRun:
    """Of training; remembers why it was ended."""

    def end(self, error):
        self.ending = str(error)


@asynccontextmanager
async def serving_of(transport, **config):
    serving = Serving(HeldSpan(), transport, ServerConfig(model="fake", **config), PLAN, asyncio.Event())
    yield serving
    await serving.close()
    assert not serving.executor._thread.is_alive()


@pytest.mark.parametrize(("adapter_bytes", "more"), [(1 << 20, {ADAPTER_SERVICE}), (0, set())])
async def test_peers_are_let_in_when_it_opens_and_not_before(adapter_bytes, more):
    """Adapters may still have to come: until then it is JOINING. Who takes no adapters has no service for them."""
    transport = FakeTransport()
    async with serving_of(transport, adapter_bytes=adapter_bytes) as serving:
        assert serving.state is ServerState.JOINING and not transport.services
        serving.open()
        assert serving.state is ServerState.ONLINE and transport.services.keys() == SERVICES | more


async def test_whoever_comes_after_it_has_withdrawn_is_told_why():
    """Clients with old records go elsewhere."""
    transport = FakeTransport()
    async with serving_of(transport) as serving:
        serving.open()
        await serving.withdraw(PeerBusy("gone to other blocks"))
    assert not transport.services
    assert transport.stopped == dict.fromkeys(SERVICES | {ADAPTER_SERVICE}, "gone to other blocks")


async def test_draining_ends_training_runs_and_lets_sessions_move():
    """Runs end at once, with a state that says why; sessions have time."""
    async with serving_of(FakeTransport()) as serving:
        serving.open()
        run = FakeRun()
        serving.training._runs.add(run)
        await serving.drain(5.0)
        assert serving.state is ServerState.DRAINING and run.ending == "the server is DRAINING"


async def test_an_adapter_without_memory_for_any_is_refused():
    """The owner has asked for both."""
    async with serving_of(FakeTransport(), adapter_bytes=0) as serving:
        with pytest.raises(ConfigError, match="adapter mine needs memory"):
            await serving.keep("mine", None)
