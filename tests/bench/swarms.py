"""Swarms for benchmarks: servers on the hosts of a network, clients of them, and answers with all their times.

start_swarm(network, spans) ─► bootstrap on host 0, a server on each of hosts 1, 2, ... ─► Swarm
connect(network, swarm)     ─► a model on host 0, in this process
answer(model, tokens, n)    ─► Answer: its tokens, when each came, what each step and its servers took
"""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from common import ROOT
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from swarm import AutoDistributedModelForCausalLM
from swarm.checkpoint.source import resolve
from swarm.client.config import SessionConfig
from swarm.client.processes import PeerProcess
from swarm.client.timings import HopTiming
from tests.wan import DelayProxies, Wan

MODEL = "smollm2-135m-instruct"
START_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """A bootstrap peer and servers, as child processes."""

    model: str
    address: str
    """Of the bootstrap peer."""
    processes: list[PeerProcess]


class Loopback:
    """No network between hosts: everything on 127.0.0.1."""

    def inside(self, host: int) -> AbstractContextManager[None]:
        """Nothing to enter."""
        return nullcontext()

    def local_address(self, host: int) -> str:
        """The address to listen on."""
        return "127.0.0.1"

    def listen_args(self, host: int) -> list[str]:
        """Options of a server."""
        return ["--host", "127.0.0.1"]


Network = Wan | DelayProxies | Loopback


def start_swarm(
    network: Network,
    spans: Sequence[str],
    processes: list[PeerProcess],
    *args: str,
    model: str = MODEL,
    module: str = "swarm.server",
    env: dict[str, str] | None = None,
) -> Swarm:
    """A swarm of its own: the bootstrap on host 0, one server per span on the hosts from 1 on.

    Args:
        network: where, entered.
        processes: all that is started is added here, for the caller to stop.
        args: further options of each server.
        module: what to run in place of a server.
        env: more environment of the servers.
    """
    with network.inside(0):
        bootstrap = PeerProcess("swarm.bootstrap", ["--host", network.local_address(0)])
    processes.append(bootstrap)
    address = bootstrap.wait_for(r"--initial-peers (\S+)", START_TIMEOUT_S)[1]
    servers = []
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **(env or {})}
    for host, span in enumerate(spans, 1):
        options = [model, "--blocks", span, "--initial-peers", address, *network.listen_args(host), *args]
        with network.inside(host):
            servers.append(PeerProcess(module, options, env=env))
    processes.extend(servers)
    for server in servers:
        server.wait_for(r"^ONLINE", START_TIMEOUT_S)
    return Swarm(model=model, address=address, processes=[bootstrap, *servers])


def python_path() -> str:
    """Lets servers run modules of this folder."""
    return os.pathsep.join(filter(None, (str(ROOT / "tests" / "bench"), os.environ.get("PYTHONPATH"))))


def connect(network: Network, swarm: Swarm, **config: Any) -> Any:
    """A client's model on host 0; `config` is that of its sessions."""
    with network.inside(0):
        return connect_here(swarm.model, swarm.address, **config)


def connect_here(model: str, address: str, **config: Any) -> Any:
    """A client's model whose answers have no end of their own; `config` is that of its sessions."""
    return endless(
        AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=[address], dtype=torch.float32, session_config=SessionConfig(**config)
        )
    )


def endless(model: Any) -> Any:
    """Let no answer end before its length."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def chat_tokens(question: str, model: str = MODEL) -> list[int]:
    """A question as the model's chat template has it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(model).path)
    chat = [{"role": "user", "content": question}]
    tokens: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokens


class Clock(BaseStreamer):
    """Notes when each token came; the prompt is no token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if not self._is_prompt:
            self.times.append(time.perf_counter())
        self._is_prompt = False

    def end(self) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class Answer:
    """One generation."""

    tokens: list[int]
    """The prompt and what follows."""
    started: float
    times: list[float]
    """When each new token came."""
    steps: list[float] = field(default_factory=list)
    """Seconds of each step, as its caller saw it; the first is the prompt's."""
    timings: list[HopTiming] = field(default_factory=list)
    """What each server took of each step."""
    route: list[str] = field(default_factory=list)
    """The peers that it went through at the end."""
    replays: int = 0
    """Servers that were replaced."""
    moves: int = 0
    """Servers that have handed the session to another."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [b - a for a, b in pairwise(self.times)]

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.started

    def server_seconds(self, part: str = "compute_s") -> list[float]:
        """Compute (or `queue_s`) of all servers together for each step of one token."""
        decode = [timing for timing in self.timings if timing.num_tokens == 1]
        hops = len({timing.peer_id for timing in decode})
        return [sum(getattr(one, part) for one in decode[i : i + hops]) for i in range(0, len(decode), hops or 1)]


def answer(
    model: Any, tokens: Sequence[int], new_tokens: int, *, clock: Clock | None = None, cache: Any = None
) -> Answer:
    """The greedy answer of exactly so many tokens, in a session of its own or (`cache`) of the caller."""
    if cache is None:
        with model.inference_session(max_length=len(tokens) + new_tokens) as cache:
            return answer(model, tokens, new_tokens, clock=clock, cache=cache)
    clock = clock or Clock()
    ids = torch.tensor([list(tokens)])
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "streamer": clock}
    steps = _time_steps(cache.session)
    started = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), session=cache, **settings)
    return Answer(
        tokens=output[0].tolist(),
        started=started,
        times=clock.times,
        steps=steps,
        timings=list(cache.session.timings),
        route=[hop.peer_id for hop in cache.session.route],
        replays=cache.session.num_replays,
        moves=cache.session.num_moves,
    )


def _time_steps(session: Any) -> list[float]:
    """Note the seconds of each step of this session in the list."""
    seconds: list[float] = []
    step = session.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        outputs = step(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return outputs

    session.step = timed
    return seconds
