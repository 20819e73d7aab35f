"""Servers that choose their blocks cover a model and move into gaps, one at a time; their sessions go on elsewhere."""

import asyncio
import threading
import weakref
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest
import torch

from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap
from swarm.errors import UnknownModel
from swarm.server import mover as mover_module
from swarm.server import scout as scout_module
from swarm.server.blocks.span import BlockSpan
from swarm.types import BlockRange, ServerState
from tests.integration.conftest import NUM_BLOCKS, closing
from tests.integration.test_swarm import embed, expected_logits, join_only, logits


@pytest.fixture
def soon(monkeypatch):
    """Looks and waits are short, so that a test need not wait for minutes."""
    for name, seconds in (("GAP_DELAY_S", 0.2), ("GAIN_DELAY_S", 0.2), ("SETTLE_S", 0.3), ("LOOK_S", 0.2)):
        monkeypatch.setattr(mover_module, name, seconds)
    monkeypatch.setattr(mover_module, "DRAIN_S", 0.5)
    monkeypatch.setattr(scout_module, "REFRESH_S", 0.2)


def test_servers_that_choose_cover_the_model_and_say_why(make_swarm, local_model, tmp_path, soon):
    """Two with room for half of it each take both halves; the answer is that of the whole model."""
    swarm = make_swarm()
    servers = [swarm.add_server(None, num_blocks=3, cache_dir=tmp_path) for _ in range(2)]
    assert [str(server.plan.blocks) for server in servers] == ["0:3", "3:6"]
    assert servers[0].reason.startswith("chose blocks 0:3: 3 asked; ")
    assert "nobody serves 3:6 yet" in servers[0].reason
    assert "best place among 2 servers: full batches of the swarm 0 -> " in servers[1].reason
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=8) as session:
        outputs = session.step(embed(local_model, [1, 2, 3]), positions=[0], num_tokens=[3])
        assert len(session.route) == 2
        record = service.peers.records[0]
        assert record.decode_tps > 0 and record.batch_tps > 0 and record.prefill_tps > 0
    assert_right(local_model, outputs, [1, 2, 3])


def test_a_server_takes_all_blocks_that_fit(make_swarm, tmp_path, soon):
    """The tiny model fits whole."""
    server = make_swarm().add_server(None, cache_dir=tmp_path)
    assert server.plan.blocks == BlockRange(0, NUM_BLOCKS)
    assert f"{NUM_BLOCKS} fit into" in server.reason


def test_a_replica_moves_into_a_gap_and_sessions_go_on(make_swarm, local_model, tmp_path, soon):
    """The only server of 3:6 dies; one of two replicas of 0:3 takes over, and a session in progress ends rightly."""
    swarm = make_swarm("0:3", "3:6")
    spare = swarm.add_server(None, num_blocks=3, cache_dir=tmp_path)
    move(swarm, spare, 0, 3)
    swarm.keep_serving(spare)
    with closing(swarm.connect(max_wait_s=60.0)) as service:
        inputs = embed(local_model, [1, 2, 3, 4])
        with service.open_session(batch_size=1, max_length=8) as session:
            session.step(inputs[:3], positions=[0], num_tokens=[3])
            swarm.remove_server(swarm.servers[1], politely=False)
            outputs = session.step(inputs[3:], positions=[3], num_tokens=[1])
            assert session.num_replays >= 1
    assert spare.plan.blocks == BlockRange(3, 6) and spare.state is ServerState.ONLINE
    assert_right(local_model, outputs, [1, 2, 3, 4])


def test_of_two_that_could_fill_a_gap_one_moves(make_swarm, tmp_path, soon):
    """Two replicas of 0:3 notice at the same moment that nobody serves 3:6 any more; one of them stays."""
    swarm = make_swarm("3:6")
    replicas = [swarm.add_server(None, num_blocks=3, cache_dir=tmp_path) for _ in range(2)]
    for replica in replicas:
        move(swarm, replica, 0, 3)
    moved = threading.Event()
    for replica in replicas:
        swarm.keep_serving(replica, moved.set)
    swarm.remove_server(swarm.servers[0], politely=False)
    assert moved.wait(30)
    assert sorted(str(replica.plan.blocks) for replica in replicas) == ["0:3", "3:6"]
    (stayed,) = (replica for replica in replicas if replica.plan.blocks == BlockRange(0, 3))
    swarm.loop.run(stayed._placing.scout.look_closely(), 30)
    assert stayed._placing.num_moves == 0 and stayed._placing._mover._decide() is None


def test_sessions_of_a_server_that_moves_are_served_by_another(make_swarm, local_model, soon):
    """They go on at another one, handed over or, if that takes too long, replayed; the answer is right."""
    swarm = make_swarm("0:6", "0:6")
    with closing(swarm.connect(max_wait_s=30.0)) as service:
        inputs = embed(local_model, [1, 2, 3, 4, 5, 6])
        with service.open_session(batch_size=1, max_length=8) as session:
            session.step(inputs[:3], positions=[0], num_tokens=[3])
            used = next(it for it in swarm.servers if it.node.peer_id == session.route[0].peer_id)
            move(swarm, used, 0, 2)
            outputs = session.step(inputs[3:], positions=[3], num_tokens=[3])
            assert session.num_moves + session.num_replays >= 1
    assert used.plan.blocks == BlockRange(0, 2) and used.state is ServerState.ONLINE
    assert_right(local_model, outputs, [1, 2, 3, 4, 5, 6])


def test_sessions_of_a_server_that_fills_a_gap_are_handed_over(make_swarm, local_model, tmp_path, soon):
    """The only server of 3:6 dies: what the one that takes its place has of a session goes to its replica first."""
    swarm = make_swarm("3:6")
    spare = swarm.add_server(None, num_blocks=3, cache_dir=tmp_path)
    assert spare.plan.blocks == BlockRange(0, 3)
    inputs, moved = embed(local_model, [1, 2, 3, 4]), threading.Event()
    with (
        closing(swarm.connect(max_wait_s=60.0)) as service,
        service.open_session(batch_size=1, max_length=8) as session,
    ):
        session.step(inputs[:3], positions=[0], num_tokens=[3])
        swarm.add_server("0:3")
        swarm.keep_serving(spare, moved.set)
        swarm.remove_server(swarm.servers[0], politely=False)
        assert moved.wait(30)
        assert spare.plan.blocks == BlockRange(3, 6)
        outputs = session.step(inputs[3:], positions=[3], num_tokens=[1])
        assert session.num_moves == 1
    assert_right(local_model, outputs, [1, 2, 3, 4])


def test_files_are_fetched_while_sessions_leave(make_swarm, monkeypatch):
    """Handing sessions over takes nothing from the time in which a gap is filled, where files must come first."""
    swarm = make_swarm("0:6")
    (server,) = swarm.servers
    fetched, store, states = threading.Event(), server._loader.files._store, []

    class SlowStore:
        is_here = store.is_here

        def fetch(self, shards):
            states.append(server.state)
            fetched.set()
            return store.fetch(shards)

    async def last_until_fetched(timeout_s):
        assert await asyncio.to_thread(fetched.wait, 10)

    monkeypatch.setattr(server._loader.files, "_store", SlowStore())
    monkeypatch.setattr(server.serving.handler, "drain", last_until_fetched)
    swarm.loop.run(server.tenancy.leave_for(BlockRange(0, 2), drain_s=5.0), 30)
    assert states[0] is ServerState.DRAINING
    assert swarm.loop.run(server.tenancy.arrive(), 30) is True


def test_files_that_cannot_be_fetched_do_not_keep_a_server_from_leaving(make_swarm, monkeypatch):
    """Loading will tell, and go back."""
    swarm = make_swarm("0:6")
    (server,) = swarm.servers
    with monkeypatch.context() as broken:
        broken.setattr(server._loader.files, "fetch", fail_to_fetch)
        swarm.loop.run(server.tenancy.leave_for(BlockRange(0, 2), drain_s=0.0), 30)
        swarm.loop.run(wait_for(server.tenancy._fetching), 30)
    assert swarm.loop.run(server.tenancy.arrive(), 30) is True
    assert server.plan.blocks == BlockRange(0, 2)


def fail_to_fetch(shards):
    raise UnknownModel("the hub is gone")


async def wait_for(task):
    await task


def test_fetching_files_is_no_part_of_what_loading_takes(make_swarm, monkeypatch):
    """Else a first download would count twice for every block that is still far."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    now, store, load = [0.0], server._loader.files._store, BlockSpan.load

    class SlowStore:
        is_here = store.is_here

        def fetch(self, shards):
            now[0] += 100.0
            return store.fetch(shards)

    def load_slowly(*args, **options):
        now[0] += 7.0
        return load(*args, **options)

    def clock():
        return now[0]

    monkeypatch.setattr(server._loader.files, "_store", SlowStore())
    monkeypatch.setattr(server._loader.files, "_clock", clock)
    monkeypatch.setattr("swarm.server.loading.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(BlockSpan, "load", load_slowly)
    swarm.loop.run(server.load(), 30)
    assert server._loader.block_s == 7.0 / NUM_BLOCKS and server._loader.files.seconds >= 100.0


def test_what_a_server_leaves_is_freed_before_it_loads_other_blocks(make_swarm):
    """It took as much as fits: both would not."""
    swarm = make_swarm("0:6")
    (server,) = swarm.servers
    old = weakref.ref(server.serving.executor.span)
    swarm.loop.run(server.tenancy.leave_for(BlockRange(0, 2), drain_s=0.0), 30)
    assert old() is None
    assert swarm.loop.run(server.tenancy.arrive(), 30) is True


def test_blocks_that_cannot_be_loaded_are_given_up_for_those_of_before(make_swarm, local_model, monkeypatch):
    """The server goes back to what it had, and serves it."""
    swarm = make_swarm("0:6")
    (server,) = swarm.servers
    swarm.loop.run(server.tenancy.leave_for(BlockRange(0, 2), drain_s=0.0), 30)
    load, loads = server.tenancy.load, []

    async def fails_once(*args):
        loads.append(server.plan.blocks)
        if len(loads) == 1:
            server.plan.checkpoint.ensure(["no such file"])
        await load(*args)

    monkeypatch.setattr(server.tenancy, "load", fails_once)
    assert swarm.loop.run(server.tenancy.arrive(), 30) is False
    assert loads == [BlockRange(0, 2), BlockRange(0, 6)] and server.state is ServerState.ONLINE
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=8) as session:
        outputs = session.step(embed(local_model, [1, 2, 3]), positions=[0], num_tokens=[3])
    assert_right(local_model, outputs, [1, 2, 3])


def test_three_processes_cover_a_model_and_fill_the_place_of_one_that_is_killed(tiny_llama, tmp_path):
    """As users start them: none is told its blocks, and nobody tells them that the only holder of some is gone."""
    settings = [str(tiny_llama), "--num-blocks", "3", "--cache-dir", str(tmp_path), "--host", "127.0.0.1"]
    processes: list[PeerProcess] = []
    with ThreadPoolExecutor() as pool, all_stopped(processes):
        processes.append(start_bootstrap())
        settings += ["--initial-peers", processes[0].address()]
        processes.append(PeerProcess("swarm.server", settings))
        processes[1].wait_for("ONLINE: blocks 0:3", 60)  # from now on it is known how fast this machine is
        processes += [PeerProcess("swarm.server", settings) for _ in range(2)]
        taken = [server.wait_for(r"ONLINE: blocks (\d:\d)", 60)[1] for server in processes[1:]]
        assert "0:3" in taken and taken.count("3:6") == 1
        killed = processes[1 + taken.index("3:6")]
        killed.process.kill()
        survivors = [server for server in processes[1:] if server is not killed]
        waits = [pool.submit(server.wait_for, "ONLINE: blocks 3:6", 60) for server in survivors]
        done, _ = wait(waits, return_when=FIRST_COMPLETED)
        assert done.pop().result()


def move(swarm, server, start, end):
    """Make a server move, whatever it thinks of it."""
    swarm.loop.run(server.tenancy.leave_for(BlockRange(start, end), drain_s=0.5), 30)
    swarm.loop.run(server.tenancy.arrive(), 30)


def assert_right(model, outputs, tokens):
    """These outputs are those of plain transformers for the last of these tokens."""
    expected = expected_logits(model, tokens)[-len(outputs) :]
    torch.testing.assert_close(logits(model, outputs), expected, atol=1e-4, rtol=1e-4)
