"""What the swarm knows of a server as long as it is there: whatever it does, it says so again before that expires."""

import asyncio
import threading

from swarm.errors import PeerTimeout
from swarm.network import Node
from swarm.registry import Registry, ServerRecord
from swarm.server import patience
from swarm.server import server as server_module
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import ServerConfig
from swarm.server.plan import make_plan
from swarm.server.server import Server
from swarm.types import BlockRange, ServerState

from .conftest import LocalSwarm

PERIOD_S = 0.5


async def join_only(swarm: LocalSwarm, blocks: BlockRange | None = None) -> Server:
    """A server that has not begun to load, and renews its record often."""
    config = ServerConfig(
        model=str(swarm.model),
        initial_peers=(swarm.address,),
        host="127.0.0.1",
        device="cpu",
        announce_period_s=PERIOD_S,
        blocks=blocks,
        num_blocks=None if blocks else 6,
    )
    server = Server(config, await asyncio.to_thread(make_plan, config))
    await server.join()
    return server


async def next_record(swarm: LocalSwarm, server: Server, state: ServerState) -> ServerRecord:
    """The next record of a server, when it has renewed the one that it has now."""
    registry, digest = Registry(swarm.bootstrap), server.plan.checkpoint.digest
    first: ServerRecord | None = None
    async with asyncio.timeout(20):
        while True:
            for record in await registry.lookup(digest):
                if record.state is state and first is not None and record.expires_at > first.expires_at:
                    return record
                if record.state is state:
                    first = first or record
            await asyncio.sleep(0.05)


def test_a_server_that_loads_for_long_says_so_again(make_swarm, monkeypatch):
    """A first download takes longer than a record lives: others must not take its blocks for a gap."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    is_here, load = threading.Event(), BlockSpan.load

    def load_slowly(*args, **options):
        assert is_here.wait(30)
        return load(*args, **options)

    monkeypatch.setattr(BlockSpan, "load", load_slowly)
    loading = asyncio.run_coroutine_threadsafe(server.load(), swarm.loop._loop)
    try:
        record = swarm.loop.run(next_record(swarm, server, ServerState.JOINING), 30)
        assert record.blocks == server.plan.blocks
    finally:
        is_here.set()
        loading.result(30)
    assert swarm.loop.run(next_record(swarm, server, ServerState.ONLINE), 30).batch_tps > 0


def test_a_server_that_drains_for_long_says_so_again(make_swarm):
    """Its sessions may take longer than a record lives; until it has gone it is DRAINING, and then OFFLINE."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    swarm.loop.run(server.load(), 30)

    stays = asyncio.Event()
    server.serving.handler.drain = lambda timeout_s: stays.wait()
    draining = asyncio.run_coroutine_threadsafe(server.tenancy.drain(600.0), swarm.loop._loop)
    swarm.loop.run(next_record(swarm, server, ServerState.DRAINING), 30)
    swarm.loop.post(stays.set)
    draining.result(30)


def test_a_renewal_that_fails_is_not_the_last(make_swarm, monkeypatch):
    """Whatever was wrong with one, the next comes: a server that runs and is seen by nobody is of no use."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    renew, num_failed = server.renew, 0

    async def fail_once() -> None:
        nonlocal num_failed
        if not num_failed:
            num_failed += 1
            raise ValueError("a defect")
        await renew()

    monkeypatch.setattr(server._announcer, "_renew", fail_once)
    swarm.loop.run(next_record(swarm, server, ServerState.JOINING), 30)
    assert num_failed == 1


def test_a_server_starts_when_the_dht_answers_at_last(make_swarm, monkeypatch):
    """Neither the check of the model's name nor the first look at the others gives up."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    swarm = make_swarm()
    failing = ["the name", "the records", "the records", "the records", "the records"]
    get_many = Node.dht_get_many

    async def slow(node: Node, keys: list[str]) -> dict[str, dict[str, bytes]]:
        if node is not swarm.bootstrap and failing and (failing[0] == "the name") == ("/names/" in keys[0]):
            raise PeerTimeout(failing.pop(0))
        return await get_many(node, keys)

    monkeypatch.setattr(Node, "dht_get_many", slow)
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    assert not failing and server.reason


def test_an_announcement_does_not_wait_for_a_look_that_takes_long(make_swarm, monkeypatch):
    """Nor does the next renewal begin another one."""
    monkeypatch.setattr(server_module, "LOOK_WAIT_S", 0.01)
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm, blocks=BlockRange(0, 6)), 30)
    swarm.servers.append(server)
    looks = []

    async def look_for_ever() -> None:
        looks.append(None)
        await asyncio.Event().wait()

    server._placing.scout.look = look_for_ever
    for _ in range(2):
        swarm.loop.run(next_record(swarm, server, ServerState.JOINING), 30)
    assert len(looks) == 1
