"""A server that trains much slower than it announces loses its runs to one that doesn't, and no bit changes."""

import time

import msgspec
import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client import pace
from swarm.client import training as training_module
from swarm.client.model import distribute
from swarm.server.server import Server
from tests.integration.conftest import LocalSwarm, closing
from tests.integration.training_job import make_batch, remote_gradients, training_of

SLOW_S = 0.25
"""What each micro-batch takes longer on its way back: many times what the tiny model takes."""
USUAL_TPS = 20_000.0
"""What the other servers announce: a part of what any machine does with the tiny model."""
SLOW_TPS = 100.0
"""Less than the slow server does."""


def slow_down(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """As if somebody else used its device."""
    span = server.serving.executor.span
    training_pass = span.training_pass

    def slowly(*args):
        whole = training_pass(*args)
        backward = whole.backward

        def late(gradients):
            time.sleep(SLOW_S)
            return backward(gradients)

        whole.backward = late
        return whole

    monkeypatch.setattr(span, "training_pass", slowly)


def claim(swarm: LocalSwarm, server: Server, tps: float) -> None:
    """Announce this speed."""
    server._facts.latest = msgspec.structs.replace(server._facts.latest, prefill_tps=tps)
    swarm.loop.run(server._announcer.tell())


@pytest.mark.parametrize(
    ("lies", "push"), [(True, True), (True, False), (False, True)], ids=["boasts", "boasts, no links", "says so"]
)
def test_a_run_leaves_a_server_that_is_slower_than_it_announces(make_swarm, monkeypatch, lies, push):
    """Between two steps, for good, linked or not; one that announces how slow it is keeps what it has."""
    monkeypatch.setattr(training_module, "LOOK_S", 0.0)
    monkeypatch.setattr(pace, "PRIOR_S", 0.005)
    swarm = make_swarm("0:3", "3:6")
    first, slow = swarm.servers
    slow_down(monkeypatch, slow)
    claim(swarm, first, USUAL_TPS)
    claim(swarm, slow, 10 * USUAL_TPS if lies else SLOW_TPS)
    with closing(swarm.connect(push=push)) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        expected = remote_gradients(model, make_batch())
        quick = swarm.add_server("3:6")
        claim(swarm, quick, USUAL_TPS)
        service._loop.run(service.peers.refresh(max_age_s=0.0))
        for _ in range(3):
            found = remote_gradients(model, make_batch())
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        remote = training_of(model)
        assert [hop.peer_id for hop in remote.route] == [first.node.peer_id, (quick if lies else slow).node.peer_id]
        assert remote.num_chains == 1 + lies and remote.pipeline.num_restarts == 0
