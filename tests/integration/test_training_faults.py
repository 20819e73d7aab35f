"""Training where servers are lost, late, or without memory: the same bits, or an error that says why."""

import asyncio
import threading

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.model import distribute
from swarm.errors import PeerBusy, PeerDisconnected, PeerUnreachable
from swarm.server.host_pages import HostBudget
from tests.integration.conftest import HIDDEN, closing
from tests.integration.training_job import (
    assert_near,
    local_gradients,
    make_batch,
    make_prompts,
    remote_gradients,
    remote_loss,
    training_of,
)


@pytest.mark.parametrize("moment", ["between forward and backward", "before forward"])
@pytest.mark.parametrize("politely", [True, False])
def test_a_lost_server_changes_no_bit(moment, politely, make_swarm):
    """What it held is done again elsewhere, and counts once."""
    swarm = make_swarm("0:3", "3:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        expected = remote_gradients(model, batch)
        victim = swarm.servers[1]
        swarm.add_server("2:6")

        def lose():
            swarm.remove_server(victim, politely=politely)

        if moment == "before forward":
            lose()
        found = remote_gradients(model, batch, lose if moment != "before forward" else lambda: None)
        assert training_of(model).num_chains == 2
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_a_link_that_breaks_costs_a_chain_and_no_bit(make_swarm):
    """Both servers live on: the chain is made anew, through the client, and what was on the old one is done again."""
    swarm = make_swarm("0:3", "3:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        expected = remote_gradients(model, batch)

        def break_link():
            (run,) = swarm.servers[1].serving.handler.pushes._targets.values()
            swarm.loop.run(run._links.previous._stream.abort(PeerDisconnected("cut")))

        found = remote_gradients(model, batch, break_link)
        remote = training_of(model)
        assert remote.num_chains == 2 and remote.pipeline.links == frozenset()
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_versions_that_come_to_a_new_chain_in_another_order_are_taken(make_swarm):
    """As with a reference adapter: the version that was made last comes first, and the graph of the other goes back."""
    swarm = make_swarm("0:6")
    hidden = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
    with closing(swarm.connect()) as service:
        blocks = distribute(resolve(str(swarm.model)), service, dtype=torch.float32).blocks
        prompts = (make_prompts()[:, :2] * 0.1).requires_grad_()
        (expected,) = torch.autograd.grad(blocks(hidden, prompts=prompts).square().sum(), prompts)
        outputs = blocks(hidden, prompts=prompts)
        with torch.no_grad():
            reference = blocks(hidden, prompts=prompts + 1.0)
        swarm.add_server("0:6")
        swarm.remove_server(swarm.servers[0], politely=False)
        with torch.no_grad():
            assert torch.equal(blocks(hidden, prompts=prompts + 1.0), reference)
        (found,) = torch.autograd.grad(outputs.square().sum(), prompts)
        assert torch.equal(found, expected)


def test_servers_that_cannot_reach_each_other_train_through_the_client(make_swarm, monkeypatch):
    """Nothing is lost but the client's bandwidth; the two are not asked to link again for a while."""
    swarm = make_swarm("0:3", "3:6")
    asked = []

    async def unreachable(peer_id, *, client):
        asked.append(peer_id)
        raise PeerUnreachable("no way there")

    monkeypatch.setattr(swarm.servers[0].serving.handler.pushes, "open", unreachable)
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        first = remote_gradients(model, make_batch())
        remote = training_of(model)
        assert remote.pipeline.links == frozenset() and remote.num_chains == 1
        service._loop.run(remote.close(), 10)
        again = remote_gradients(distribute(resolve(str(swarm.model)), service, dtype=torch.float32), make_batch())
        assert len(asked) == 1 and all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_a_server_without_memory_for_training_takes_none(make_swarm, local_model):
    """It says so, and another one is used."""
    swarm = make_swarm("0:3")
    swarm.add_server("3:6", training_bytes=0, public_name="none")
    with closing(swarm.connect(max_wait_s=0.5)) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        with pytest.raises(PeerBusy, match="takes no training"):
            remote_gradients(model, make_batch())
        swarm.add_server("3:6")
        batch = make_batch()
        assert_near(remote_gradients(model, batch), local_gradients(local_model, batch))


def test_a_server_that_comes_too_late_ends_the_wait(make_swarm):
    """Without the blocks, patience ends with an error, and the next attempt with the blocks succeeds."""
    swarm = make_swarm("0:3")
    with closing(swarm.connect(max_wait_s=0.5)) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        with pytest.raises(Exception, match="no server holds blocks 3:6"):
            remote_gradients(model, make_batch())
        swarm.add_server("3:6")
        assert torch.isfinite(remote_gradients(model, make_batch())[0])


def test_with_little_memory_micro_batches_take_turns(make_swarm, local_model):
    """What a server could not keep goes forth again when its gradients are there, until all have come back."""
    swarm = make_swarm("0:6")
    inputs_bytes = 3 * 40 * HIDDEN * 4  # of one of two micro-batches
    swarm.servers[0].serving.executor.trainer.budget = HostBudget(inputs_bytes)
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        assert_near(remote_gradients(model, batch), local_gradients(local_model, batch))
        assert training_of(model).pipeline.num_restarts > 0


def test_a_server_without_memory_is_not_waited_for_for_ever(make_swarm):
    """Where not even one micro-batch can be kept, the error says so; evaluation needs no memory."""
    swarm = make_swarm("0:6")
    swarm.servers[0].serving.executor.trainer.budget = HostBudget(1)
    with closing(swarm.connect(max_wait_s=0.5)) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        with pytest.raises(PeerBusy, match="may keep this micro-batch"):
            remote_gradients(model, make_batch())
        with torch.no_grad():
            assert torch.isfinite(remote_loss(model, make_batch(), make_prompts()))


def test_a_client_that_leaves_leaves_nothing(make_swarm):
    """Whatever was kept for it is given back."""
    swarm = make_swarm("0:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        prompts = make_prompts().requires_grad_()
        loss = remote_loss(model, make_batch(), prompts)
        assert held(swarm) > 0
        del loss, model
    swarm.loop.run(eventually(lambda: held_now(swarm) == 0))


def held_now(swarm):
    return swarm.servers[0].serving.executor.trainer.budget.used


def held(swarm):
    done = threading.Event()
    swarm.servers[0].serving.executor.train(lambda trainer: done.set())
    assert done.wait(10)
    return held_now(swarm)


async def eventually(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
