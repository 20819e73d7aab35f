"""Servers that choose their blocks cover a model, move into gaps, and their sessions go on elsewhere."""

from contextlib import closing

import pytest
import torch

from swarm.server import mover as mover_module
from swarm.server import scout as scout_module
from swarm.types import BlockRange, ServerState
from tests.integration.conftest import NUM_BLOCKS
from tests.integration.test_swarm import embed, expected_logits, logits


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Looks and waits are short, so that a test need not wait for minutes."""
    for name, seconds in (("GAP_DELAY_S", 0.2), ("GAIN_DELAY_S", 0.2), ("SETTLE_S", 0.3), ("LOOK_S", 0.2)):
        monkeypatch.setattr(mover_module, name, seconds)
    monkeypatch.setattr(scout_module, "REFRESH_S", 0.2)


def test_servers_that_choose_cover_the_model_and_say_why(make_swarm, local_model, tmp_path):
    """Two with room for half of it each take both halves; the answer is that of the whole model."""
    swarm = make_swarm()
    servers = [swarm.add_server(None, num_blocks=3, cache_dir=tmp_path) for _ in range(2)]
    assert [str(server.plan.blocks) for server in servers] == ["0:3", "3:6"]
    assert servers[0].reason.startswith("chose blocks 0:3: 3 asked; ")
    assert "tokens/s per block here; the swarm's worth" in servers[1].reason
    assert servers[1].record.batch_tps > 0 and servers[1].record.prefill_tps > 0
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=8) as session:
        outputs = session.step(embed(local_model, [1, 2, 3]), positions=[0], num_tokens=[3])
        assert len(session.route) == 2
    assert_right(local_model, outputs, [1, 2, 3])


def test_a_server_takes_all_blocks_that_fit(make_swarm, tmp_path):
    """The tiny model fits whole."""
    server = make_swarm().add_server(None, cache_dir=tmp_path)
    assert server.plan.blocks == BlockRange(0, NUM_BLOCKS)
    assert f"{NUM_BLOCKS} fit into" in server.reason


def test_a_replica_moves_into_a_gap_and_sessions_go_on(make_swarm, local_model, tmp_path):
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


def test_sessions_of_a_server_that_moves_are_served_by_another(make_swarm, local_model):
    """It lets go of them at once; nothing of them is left behind."""
    swarm = make_swarm("0:6")
    mover = swarm.add_server("0:6")
    with closing(swarm.connect(max_wait_s=30.0)) as service:
        inputs = embed(local_model, [1, 2, 3, 4, 5, 6])
        with service.open_session(batch_size=1, max_length=8) as session:
            session.step(inputs[:3], positions=[0], num_tokens=[3])
            used = next(it for it in swarm.servers if it.node.peer_id == session.route[0].peer_id)
            move(swarm, used, 0, 2)
            outputs = session.step(inputs[3:], positions=[3], num_tokens=[3])
            assert used.num_sessions == 0 or used.plan.blocks == BlockRange(0, 2)
    assert mover in swarm.servers
    assert_right(local_model, outputs, [1, 2, 3, 4, 5, 6])


def move(swarm, server, start, end):
    """Make a server move, whatever it thinks of it."""
    swarm.loop.run(server.leave_for(BlockRange(start, end)), 30)
    swarm.loop.run(server.arrive(), 30)


def assert_right(model, outputs, tokens):
    """These outputs are those of plain transformers for the last of these tokens."""
    expected = expected_logits(model, tokens)[-len(outputs) :]
    torch.testing.assert_close(logits(model, outputs), expected, atol=1e-4, rtol=1e-4)
