"""Clients with private data train one adapter: the same bits for all, whoever vanishes, lies or comes late."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import set_seed

from swarm.checkpoint.source import resolve
from swarm.client.federated import FederatedRun, RoundResult
from swarm.client.federated_stages import FederatedSettings
from swarm.client.model import distribute
from swarm.client.peft_model import get_peft_model
from tests.integration.conftest import LocalSwarm, closing

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Adapter.*was active")


@pytest.fixture
def service(swarm: LocalSwarm):
    """Blocks of two servers, and a third that overlaps both; all clients of these tests share the connection."""
    with closing(swarm.connect()) as service:
        yield service


@pytest.fixture
def join(swarm: LocalSwarm, service) -> Iterator[Callable[..., FederatedRun]]:
    """A client of a run, with a model of its own."""
    runs: list[FederatedRun] = []

    def join(name: str, *, rank: int = 4, settings: dict[str, Any] | None = None, **options: Any) -> FederatedRun:
        base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        set_seed(len(runs))  # so that A begins otherwise at each, if nobody takes care
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        given = {"timeout_s": 30.0, "host": "127.0.0.1", "settings": FederatedSettings(**(settings or {})), **options}
        runs.append(FederatedRun(model, name=name, **given))
        return runs[-1]

    yield join
    for run in runs:
        run.close()


def learn(run: FederatedRun, seed: int, steps: int = 2) -> None:
    """Some steps on tokens that nobody else has."""
    ids = torch.randint(3, 126, (2, 12), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)
    for _ in range(steps):
        run._factors.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def together(runs: list[FederatedRun], *, num_examples: int = 10) -> list[RoundResult]:
    """A round of all of these at once."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: run.round(num_examples), runs))


def bits(run: FederatedRun) -> bytes:
    """All that a client has learnt."""
    return b"".join(tensor.numpy().tobytes() for delta in run.current().values() for tensor in delta.tensors())


@pytest.mark.parametrize("aggregate", ["svd", "stack", "average"])
def test_three_clients_have_the_same_bits_after_two_rounds(join, aggregate):
    """Each trains on its own data; A begins the same for all, whatever their seeds."""
    runs = [join(f"two rounds, {aggregate}", min_clients=3, settings={"aggregate": aggregate}) for _ in range(3)]
    begin = bits(runs[0])
    for number in range(2):
        for seed, run in enumerate(runs):
            learn(run, seed)
        results = together(runs)
        assert all(result.took_part and result.round == number and len(result.clients) == 3 for result in results)
        assert len({bits(run) for run in runs}) == len({run.digest for run in runs}) == 1
    assert bits(runs[0]) != begin
