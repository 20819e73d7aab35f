"""A token through a real chain and back: with the model's files, without them, and where blocks are missing."""

import pytest

from swarm.checkpoint.source import resolve
from swarm.client import probe as probe_module
from swarm.client.config import SessionConfig
from swarm.client.probe import Prober, Target
from swarm.errors import InvalidRequest, PeerUnreachable, RouteNotFound

from .conftest import HIDDEN, NUM_BLOCKS


@pytest.fixture
def target(tiny_llama) -> Target:
    """The tiny model as its swarm announces it."""
    checkpoint = resolve(str(tiny_llama))
    return Target(digest=checkpoint.digest, name=checkpoint.name, num_blocks=NUM_BLOCKS, hidden_size=HIDDEN)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Probes that fail do so soon."""
    monkeypatch.setattr(probe_module, "PATIENCE", SessionConfig(max_wait_s=0.5))


def test_a_probe_says_what_a_client_would_get(swarm, target, tiny_llama, local_model):
    """The same two tokens as plain transformers; without files, the way and the times."""
    import torch

    prober = Prober([swarm.address])
    try:
        blocks_only = prober.probe(target)
        assert blocks_only.text is None and blocks_only.route[-1].blocks.end == NUM_BLOCKS
        prober.add_checkpoint(str(tiny_llama))
        result = prober.probe(target)
        expected = local_model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert result.text == " ".join(map(str, expected[0, 3:].tolist()))
        assert result.first_s > 0 and result.next_s > 0
        assert prober.probe(target).text == result.text
    finally:
        prober.close()
    assert swarm.pages_in_use() == 0


def test_a_gap_or_a_wrong_width_is_an_error_and_the_prober_lives_on(make_swarm, target):
    """The missing blocks are named; a stranger's wrong word about the width is refused by the servers."""
    swarm = make_swarm("0:3")
    prober = Prober([swarm.address])
    try:
        with pytest.raises(RouteNotFound, match="3:6"):
            prober.probe(target)
        swarm.add_server("3:6")
        prober._services.clear()
        wrong = Target(digest=target.digest, name=target.name, num_blocks=NUM_BLOCKS, hidden_size=HIDDEN + 1)
        with pytest.raises(InvalidRequest, match="shape"):
            prober.probe(wrong)
        prober._services.clear()
        assert len(prober.probe(target).route) == 2
    finally:
        prober.close()


def test_a_swarm_that_is_not_there_is_an_error_each_time(target):
    """Joining is tried anew with every probe."""
    prober = Prober(["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWSTo9HLMm1hcZG7MTKnXAbRYwVnJZ5URUvXrBkyGbjPQX"])
    for _ in range(2):
        with pytest.raises(PeerUnreachable):
            prober.probe(target)
    prober.close()
