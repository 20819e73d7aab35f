"""Rounds inside a trainer: what goes wrong in one does not end the training."""

from types import SimpleNamespace

import pytest
import torch

from swarm.client.federated import RoundResult
from swarm.client.federated_rounds import FederatedRounds
from swarm.errors import PeerTimeout, RoundFailed


class FakeRun:
    """Rounds that end as they are told."""

    def __init__(self, *ends: Exception | RoundResult):
        self.ends = list(ends)

    def round(self, num_examples: int) -> RoundResult:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.mark.parametrize("error", [RoundFailed("1 clients came, need 2"), PeerTimeout("the DHT does not answer")])
def test_training_goes_on_alone_after_a_round_that_has_failed(error, capsys):
    """Moments are kept, since the adapter is as it was; after a round that succeeds they are not."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    result = RoundResult(
        round=0, clients={"a": 1, "b": 1}, took_part=True, refused={}, rank=2, bytes_sent=1, bytes_received=1
    )
    rounds = FederatedRounds(FakeRun(error, result), local_steps=2, num_examples=5)
    rounds.on_step_end(None, SimpleNamespace(global_step=1), None, optimizer=optimizer)
    rounds.on_step_end(None, SimpleNamespace(global_step=2), None, optimizer=optimizer)
    assert optimizer.state and f"{error}; going on alone" in capsys.readouterr().err
    rounds.on_step_end(None, SimpleNamespace(global_step=4), None, optimizer=optimizer)
    assert not optimizer.state and "round 0: 2 clients" in capsys.readouterr().err
