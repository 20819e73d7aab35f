"""Real swarms on loopback: hivemind peers, servers and clients of a tiny random model, all in this process, quickly."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from swarm.checkpoint.source import resolve
from swarm.client.config import SessionConfig
from swarm.client.runtime import LoopThread, SwarmService, connect
from swarm.network.node import Node, NodeConfig
from swarm.server.config import CacheSize, ServerConfig
from swarm.server.plan import make_plan
from swarm.server.server import Server
from swarm.types import BlockRange

NUM_BLOCKS = 6
HIDDEN = 64
PATIENT = {"max_wait_s": 20.0, "probe_timeout_s": 10.0}
"""For clients of servers in their own process: nobody there is lost because the machine is busy."""


def save_tiny_llama(path: Path, seed: int = 0) -> Path:
    """A random Llama of 6 blocks as a checkpoint directory."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=127,
        bos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class LocalSwarm:
    """A bootstrap peer and servers on an event loop in a thread."""

    def __init__(self, model: Path):
        self.model = model
        self.loop = LoopThread("swarm-test-servers")
        self.bootstrap = self.loop.run(Node.start(NodeConfig(host="127.0.0.1")))
        self.servers: list[Server] = []
        self._serving: dict[Server, asyncio.Task[None]] = {}

    @property
    def address(self) -> str:
        return self.bootstrap.addresses[0]

    def add_server(self, blocks: str | None, **settings) -> Server:
        """A server of `blocks`, or of blocks that it chooses, ONLINE when this returns."""
        config = ServerConfig(
            **{
                "model": str(self.model),
                "blocks": None if blocks is None else BlockRange.parse(blocks),
                "initial_peers": (self.address,),
                "host": "127.0.0.1",
                "device": "cpu",
                "announce_period_s": 600.0,  # nobody renews them
                "cache_size": CacheSize(tokens=2048),
                **settings,
            }
        )
        server = self.loop.run(_start(config), 60)
        self.servers.append(server)
        return server

    def keep_serving(self, server: Server, on_moved: Callable[[], None] = lambda: None) -> None:
        """Let a server do what it does while it serves: announce itself, look at others, move."""
        self._serving[server] = self.loop.run(_start_serving(server, on_moved))

    def remove_server(self, server: Server, *, politely: bool = True) -> None:
        """Stop a server; impolitely means without a word to anybody."""
        self.servers.remove(server)
        self.loop.run(_stop(server, politely, self._serving.pop(server, None)), 30)

    def connect(self, **settings) -> SwarmService:
        """A client's view of the blocks."""
        return connect(
            resolve(str(self.model)),
            num_blocks=NUM_BLOCKS,
            hidden_size=HIDDEN,
            initial_peers=[self.address],
            config=SessionConfig(**{**PATIENT, **settings}),
        )

    def pages_in_use(self) -> int:
        """Pages that any server's cache still holds, after all that was asked of the device threads is done."""
        return sum(self.loop.run(_pages_in_use(server)) for server in self.servers)

    def close(self) -> None:
        """Stop everything."""
        for server in list(self.servers):
            self.remove_server(server)
        self.loop.run(self.bootstrap.close(), 30)
        self.loop.stop()


async def _start(config: ServerConfig) -> Server:
    plan = await asyncio.to_thread(make_plan, config)
    server = Server(config, plan)
    await server.__aenter__()
    try:
        await server.join()
        await server.load()
    except BaseException:
        await server.__aexit__(None, None, None)
        raise
    return server


async def _start_serving(server: Server, on_moved: Callable[[], None]) -> asyncio.Task[None]:
    return asyncio.create_task(server.serve_until(asyncio.Event(), on_moved=on_moved))


async def _stop(server: Server, politely: bool, serving: asyncio.Task[None] | None) -> None:
    if serving is not None:
        serving.cancel()
        await asyncio.wait([serving])
    if politely:
        await server.leave()
    await server.__aexit__(None, None, None)


async def _pages_in_use(server: Server) -> int:
    return await server.serving.executor.pages_in_use()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def local_model(tiny_llama: Path):
    """The same checkpoint in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def swarm(tiny_llama: Path) -> Iterator[LocalSwarm]:
    """Two servers that together hold all blocks, and a third that overlaps both."""
    swarm = LocalSwarm(tiny_llama)
    try:
        for blocks in ("0:3", "3:6", "1:5"):
            swarm.add_server(blocks, public_name=f"server-{blocks}")
        yield swarm
    finally:
        swarm.close()


@pytest.fixture
def make_swarm(tiny_llama: Path) -> Iterator[Callable[..., LocalSwarm]]:
    """Swarms of one's own, for tests that break them."""
    made: list[LocalSwarm] = []

    def make(*spans: str) -> LocalSwarm:
        made.append(LocalSwarm(tiny_llama))
        for blocks in spans:
            made[-1].add_server(blocks)
        return made[-1]

    yield make
    for swarm in made:
        swarm.close()


@contextmanager
def closing(service: SwarmService) -> Iterator[SwarmService]:
    """Leave the swarm at the end."""
    try:
        yield service
    finally:
        service.close()
