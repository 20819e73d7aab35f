"""Many sessions on few pages: all are served, each gets its own, and nothing stays behind."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from swarm.client.processes import PeerProcess
from swarm.server.config import CacheSize
from swarm.server.pages import PAGE_SIZE

from .conftest import LocalSwarm, closing


def embed(model, tokens: list[int]) -> torch.Tensor:
    return model.model.embed_tokens(torch.tensor(tokens)).detach()


def logits(model, hidden_states: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden_states)).detach()


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_session(service, model, tokens: list[int], prompt: int) -> None:
    """Feed a prompt, then token after token, and compare the last logits with the full model's."""
    with service.open_session(batch_size=1, max_length=len(tokens)) as session:
        session.step(embed(model, tokens[:prompt]), positions=[0], num_tokens=[prompt], num_outputs=[1])
        for position in range(prompt, len(tokens)):
            token = embed(model, tokens[position : position + 1])
            last = session.step(token, positions=[position], num_tokens=[1])
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(logits(model, last), expected, atol=1e-4, rtol=0)


def wait_until(swarm: LocalSwarm, is_so, timeout_s: float = 2.0) -> None:
    """Ask the servers until it is so, for no longer than `timeout_s`."""
    late = threading.Event()
    timer = threading.Timer(timeout_s, late.set)
    timer.start()
    while not is_so(swarm.pages_in_use()):
        assert not late.is_set(), f"still {swarm.pages_in_use()} pages in use after {timeout_s} s"
    timer.cancel()


def test_sixty_four_sessions_at_once_on_one_server(make_swarm, local_model):
    """No session is refused, each gets its own logits, every page comes back."""
    swarm = make_swarm("0:6")
    with closing(swarm.connect()) as service, ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda seed: run_session(service, local_model, random_tokens(24, seed), 18), range(64)))
    wait_until(swarm, lambda pages: pages == 0)


def test_more_sessions_than_pages_are_all_served(make_swarm, local_model):
    """Twelve sessions of four pages each on a cache of sixteen pages: some wait or go to host memory, none fails."""
    swarm = make_swarm()
    swarm.add_server("0:6", cache_size=CacheSize(tokens=16 * PAGE_SIZE))
    barrier = threading.Barrier(12)

    def one(seed: int) -> None:
        tokens = random_tokens(4 * PAGE_SIZE, seed)
        with service.open_session(batch_size=1, max_length=len(tokens)) as session:
            session.step(embed(local_model, tokens[:40]), positions=[0], num_tokens=[40], num_outputs=[1])
            barrier.wait(60)  # all of them hold three pages now, in the cache or in host memory
            for position in range(40, len(tokens)):
                token = embed(local_model, tokens[position : position + 1])
                last = session.step(token, positions=[position], num_tokens=[1])
        with torch.inference_mode():
            expected = local_model(torch.tensor([tokens])).logits[0, -1:]
        torch.testing.assert_close(logits(local_model, last), expected, atol=1e-4, rtol=0)

    with closing(swarm.connect(max_wait_s=60.0)) as service, ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(12)))
    wait_until(swarm, lambda pages: pages == 0)


def test_two_clients_with_the_same_prefix_store_it_once(make_swarm, local_model):
    """A shared system prompt of eight pages: the second client adds only the page of its own words."""
    swarm = make_swarm("0:6")
    system = random_tokens(8 * PAGE_SIZE, 0)
    with closing(swarm.connect()) as one, closing(swarm.connect()) as other:
        with one.open_session(batch_size=1, max_length=256) as first:
            first.step(embed(local_model, [*system, 7]), positions=[0], num_tokens=[len(system) + 1], num_outputs=[1])
            before = swarm.pages_in_use()
            with other.open_session(batch_size=1, max_length=256) as second:
                tokens = [*system, 9]
                last = second.step(embed(local_model, tokens), positions=[0], num_tokens=[len(tokens)], num_outputs=[1])
                assert swarm.pages_in_use() - before == 1
        with torch.inference_mode():
            expected = local_model(torch.tensor([tokens])).logits[0, -1:]
        torch.testing.assert_close(logits(local_model, last), expected, atol=1e-4, rtol=0)
    wait_until(swarm, lambda pages: pages == 0)


CLIENT = """
import sys, torch
from swarm import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=[sys.argv[2]])
class Show:
    def put(self, value): print("token", flush=True)
    def end(self): pass
model.generate(torch.tensor([[5, 9, 44]]), max_new_tokens=500, min_new_tokens=500, streamer=Show())
"""


def test_a_killed_client_frees_its_pages_within_two_seconds(make_swarm, tmp_path):
    """SIGKILL in the middle of an answer: the servers notice by themselves."""
    swarm = make_swarm("0:3", "3:6")
    (tmp_path / "endless.py").write_text(CLIENT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    client = PeerProcess("endless", [str(swarm.model), swarm.address], env={"PYTHONPATH": path})
    try:
        client.wait_for("token", 60)
        wait_until(swarm, lambda pages: pages > 0)
    finally:
        client.process.kill()
        client.process.wait()
    wait_until(swarm, lambda pages: pages == 0)
