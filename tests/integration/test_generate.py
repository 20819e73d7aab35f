"""`generate` through real servers gives transformers' own tokens, also when servers die on the way."""

import signal

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm import AutoDistributedModelForCausalLM
from swarm.client.config import SessionConfig
from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap, start_server

from .conftest import PATIENT, LocalSwarm

PROMPTS = torch.tensor([[5, 9, 44, 12, 7, 61], [0, 0, 3, 8, 1, 90]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def distributed(model, address: str, **config):
    return AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[address], session_config=SessionConfig(**{**PATIENT, **config})
    )


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm):
    with distributed(swarm.model, swarm.address) as model:
        yield model


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampling", "beams", "several-beams", "penalty"],
)
def test_a_left_padded_batch_gets_the_same_tokens_as_from_transformers(model, local_model, settings):
    """Greedy, seeded sampling, beam search and penalties over two prompts of different lengths."""
    tokens = []
    for each in (local_model, model):
        torch.manual_seed(7)
        tokens.append(each.generate(PROMPTS, attention_mask=MASK, max_new_tokens=12, **settings))
    assert torch.equal(tokens[0], tokens[1])


class SignalAt(BaseStreamer):
    """Does something to the swarm when the n-th new token has come."""

    def __init__(self, count: int, action):
        self.count, self.action = count, action

    def put(self, value) -> None:
        self.count -= 1
        if self.count == -1:  # the prompt counts as one
            self.action()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_process_lost_in_mid_answer_costs_no_token(tiny_llama, local_model, how):
    """The process that runs 3:6 is killed, or stopped, after the fourth token; a spare takes over."""
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        processes.append(start_bootstrap())
        address = processes[0].address()
        servers = {}
        for name, blocks in (("first", "0:3"), ("one", "3:6"), ("other", "3:6")):
            args = ("--public-name", name, "--threads", "1", "--kv-cache", "1024", "--device", "cpu")
            servers[name] = start_server(blocks, [address], *args, model=str(tiny_llama))
            processes.append(servers[name])
        for server in servers.values():
            server.wait_for("^ONLINE", 180)
        expected = local_model.generate(PROMPTS[:1], attention_mask=MASK[:1], max_new_tokens=16, do_sample=False)
        with distributed(tiny_llama, address) as model, model.inference_session(max_length=64) as session:

            def lose() -> None:
                peer = session.route[1].peer_id
                servers[model.block_service.peers.name_of(peer)].signal(how)

            tokens = model.generate(
                PROMPTS[:1],
                attention_mask=MASK[:1],
                max_new_tokens=16,
                do_sample=False,
                session=session,
                streamer=SignalAt(4, lose),
            )
            assert session.session.num_replays == 1
        assert torch.equal(tokens, expected)
