"""Training through servers in processes of their own, which are killed, stopped, and told to leave: the same bits."""

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig

import swarm as package
from swarm.client.config import SessionConfig
from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap, start_server

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
NUM_STEPS = 8
TIMEOUT_S = 180.0
ARGS = ("--threads", "1", "--kv-cache", "1024", "--device", "cpu")


@pytest.fixture
def running(tiny_llama) -> Iterator[tuple[str, dict[str, PeerProcess]]]:
    """Six servers, three of each half of the model, by their identities."""
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        processes.append(start_bootstrap())
        address = processes[0].address()
        servers = [start_server(span, [address], *ARGS, model=str(tiny_llama)) for span in ("0:3", "3:6") * 3]
        processes += servers
        for server in servers:
            server.wait_for("^ONLINE", TIMEOUT_S)
        yield address, {server.wait_for(r"/p2p/(\w+)", TIMEOUT_S)[1]: server for server in servers}


def train(address: str, model: str, between: Callable[[int, tuple[str, ...]], None]) -> dict[str, torch.Tensor]:
    """An adapter after all steps of one micro-batch each; `between` is called between forward and backward."""
    config = SessionConfig(max_wait_s=60.0)
    base = package.AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[address], dtype=torch.float32, session_config=config
    )
    torch.manual_seed(0)
    with package.get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM")) as peft_model:
        own = [it for it in peft_model.parameters() if it.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        for step in range(NUM_STEPS):
            ids = torch.randint(3, 120, (2, 12), generator=generator)
            loss = peft_model(input_ids=ids, labels=ids).loss
            between(step, tuple(hop.peer_id for hop in base.blocks.route))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: it.detach().clone() for name, it in peft_model.named_parameters() if it.requires_grad}


def test_lost_processes_change_no_bit_of_the_adapter(running, tiny_llama):
    """One is killed, one stopped, one leaves politely, each with a micro-batch whose gradients are still to come."""
    address, servers = running
    expected = train(address, str(tiny_llama), lambda step, route: None)
    faults = {2: (0, signal.SIGKILL), 4: (1, signal.SIGSTOP), 6: (0, signal.SIGTERM)}
    hit = []

    def strike(step: int, route: tuple[str, ...]) -> None:
        if step in faults:
            hop, number = faults[step]
            hit.append(route[hop])
            servers[route[hop]].signal(number)

    found = train(address, str(tiny_llama), strike)
    assert len(set(hit)) == len(faults)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
