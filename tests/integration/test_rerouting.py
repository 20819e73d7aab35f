"""A server becomes slow, a quick one joins: a live session goes there, and its answer is transformers' own."""

import time

import pytest
import torch

from swarm.client import betterment, rerouting
from swarm.client.model import DistributedModel
from swarm.server.server import Server

from .test_adapters import MASK, PROMPTS
from .test_chain import At, distributed

NEW_TOKENS = 48
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
SLOW_S = 0.05
"""What each batch takes longer: a hundred times what the blocks of the tiny model take."""


def slow_down(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """As if somebody else used its device: its record says nothing of it."""
    span = server.serving.executor.span
    run = span.run

    def slowly(batch):
        time.sleep(SLOW_S)
        return run(batch)

    monkeypatch.setattr(span, "run", slowly)


def read_records(model: DistributedModel) -> None:
    """As the client does every 15 seconds, and measure the ways to servers."""
    service = model.block_service
    service._loop.run(service.peers.refresh(max_age_s=0.0))
    service._loop.run(service.peers.get_acquainted())


@pytest.mark.parametrize("reroute", [True, False], ids=["on", "off"])
def test_a_session_leaves_a_slow_server_for_a_quick_one(make_swarm, local_model, monkeypatch, reroute):
    """It moves once and replays nothing; where that is not wanted, it stays."""
    monkeypatch.setattr(rerouting, "LOOK_S", 0.05)
    monkeypatch.setattr(betterment, "DOUBLING_S", 0.0)  # there is no crowd
    monkeypatch.setattr(betterment, "PAYBACK", 0.0)  # nor a long answer
    swarm = make_swarm("0:3", "3:6")
    expected = local_model.generate(PROMPTS, attention_mask=MASK, **GREEDY)
    with (
        distributed(swarm, reroute=reroute) as model,
        model.inference_session(batch_size=len(PROMPTS), max_length=96) as session,
    ):

        def change() -> None:
            slow_down(monkeypatch, swarm.servers[1])
            swarm.add_server("3:6")
            read_records(model)

        look = dict.fromkeys(range(4, NEW_TOKENS), lambda: read_records(model))
        streamer = At({3: change, **look})
        found = model.generate(PROMPTS, attention_mask=MASK, session=session, streamer=streamer, **GREEDY)
        first, slow, quick = (server.node.peer_id for server in swarm.servers)
        assert [hop.peer_id for hop in session.route] == [first, quick if reroute else slow]
        assert session.session.num_moves == reroute and session.session.num_replays == 0
    assert torch.equal(found, expected)
    assert swarm.pages_in_use() == 0
