"""A token through a full chain of servers, timed: what a client who came along now would find.

    Prober.probe(Target) ─► a checkpoint of this model is here?  yes: tokens ─► generate ─► text
                                                                 no:  made-up hidden states ─► all blocks ─► finite?

It joins as any client does, with a peer and records of its own, and keeps neither sessions nor opinions between
probes but those that a client keeps. Synchronous; to be called from one thread that may wait. It knows nothing of who
asks or how often.
"""

import atexit
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from swarm.checkpoint.source import Checkpoint, resolve
from swarm.client.config import SessionConfig
from swarm.client.generation import DistributedModel
from swarm.client.model import distribute
from swarm.client.peers import Peers
from swarm.client.runtime import LoopThread, SwarmService, close_in_time, join, leave
from swarm.errors import PeerMisbehaved
from swarm.network.node import Node
from swarm.private.credentials import Credentials
from swarm.transport import Transport
from swarm.types import Hop

logger = logging.getLogger(__name__)

PROMPT = "The capital of France is"
"""Far below a page of tokens, so that no server answers from its prefix cache."""
NUM_TOKENS = 2
"""Tokens of a probe: the first shows the way and the prompt, the second a step of decoding."""
MAX_SERVICES = 32
"""Models that are remembered from one probe to the next."""
PATIENCE = SessionConfig(open_timeout_s=5.0, step_timeout_s=20.0, max_wait_s=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model as the swarm announces it."""

    digest: str
    name: str
    num_blocks: int
    hidden_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What came back."""

    text: str | None
    """What the model said; None where only its blocks were probed."""
    first_s: float
    """From nothing to the first token: finding a route, opening sessions, the prompt."""
    next_s: float
    """The token after it."""
    route: tuple[Hop, ...]
    """The servers that it went through."""


class Prober:
    """A client of all models of a swarm.

    Args:
        initial_peers: full addresses of any peers of the swarm.
        credentials: our invitation, where the swarm is private; then nothing is downloaded.
    """

    def __init__(self, initial_peers: Sequence[str], credentials: Credentials | None = None):
        self._initial_peers, self._credentials = tuple(initial_peers), credentials
        self._loop = LoopThread("swarm-probe")
        self._network: tuple[Node, Transport] | None = None
        self._checkpoints: dict[str, Checkpoint] = {}
        self._models: dict[str, tuple[DistributedModel, Any]] = {}
        self._services: dict[str, _SharedService] = {}

    def add_checkpoint(self, model: str, *, cache_dir: Path | None = None) -> Checkpoint:
        """Probe this model with tokens from now on.

        Raises:
            UnknownModel, UnsupportedModel, CheckpointMismatch, ConfigError: there is no such checkpoint here.
        """
        checkpoint = resolve(model, cache_dir=cache_dir, is_offline=self._credentials is not None)
        self._checkpoints[checkpoint.digest] = checkpoint
        return checkpoint

    def has_checkpoint(self, digest: str) -> bool:
        """Whether a model is probed with tokens."""
        return digest in self._checkpoints

    def probe(self, target: Target) -> ProbeResult:
        """Send a token through all blocks of a model.

        Raises:
            RouteNotFound: nobody serves some blocks.
            PeerError, RequestError: why no token came back.
        """
        service = self._service(target)
        if self.has_checkpoint(target.digest):
            return self._probe_tokens(target, service)
        return _probe_blocks(service)

    def close(self) -> None:
        """Leave the swarm; a probe under way fails."""
        for service in self._services.values():
            service.close()
        if self._network is not None:
            node, transport = self._network
            self._loop.run(leave(transport, node), 5.0)
        self._loop.stop()

    def _service(self, target: Target) -> "_SharedService":
        if self._network is None:
            self._network = self._loop.run(join(self._initial_peers, credentials=self._credentials))
        service = self._services.get(target.digest)
        if service is None:
            node, transport = self._network
            peers = Peers(node, model=target.digest, model_name=target.name, num_blocks=target.num_blocks)
            service = _SharedService(self._loop, node, transport, peers, PATIENCE, target.hidden_size)
        self._services.pop(target.digest, None)
        self._services[target.digest] = service
        while len(self._services) > MAX_SERVICES:
            self._forget(next(iter(self._services)))
        return service

    def _forget(self, digest: str) -> None:
        """A model that was not probed for longer than others."""
        service = self._services.pop(digest)
        self._models.pop(digest, None)
        atexit.unregister(service.close)
        service.close()

    def _probe_tokens(self, target: Target, service: "_SharedService") -> ProbeResult:
        model, tokenizer = self._model(target, service)
        ids = torch.tensor([[1, 2, 3]]) if tokenizer is None else tokenizer(PROMPT, return_tensors="pt").input_ids
        clock = _Clock()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            num_beams=1,
            streamer=clock,
        )
        new = output[0, ids.shape[1] :].tolist()
        return ProbeResult(
            text=tokenizer.decode(new, skip_special_tokens=True) if tokenizer is not None else " ".join(map(str, new)),
            first_s=clock.times[1] - clock.times[0],
            next_s=clock.times[2] - clock.times[1],
            route=tuple(hop for _, hop in model.last_route),
        )

    def _model(self, target: Target, service: "_SharedService") -> tuple[DistributedModel, Any]:
        if target.digest not in self._models:
            checkpoint = self._checkpoints[target.digest]
            self._models[target.digest] = distribute(checkpoint, service), _tokenizer(checkpoint)
        return self._models[target.digest]


class _SharedService(SwarmService):
    """The blocks of one model, reached through a network that it doesn't own."""

    def close(self) -> None:
        """Close the sessions only."""
        for session in list(self._sessions):
            close_in_time("a session", session.close)


class _Clock(BaseStreamer):
    """Notes when the prompt was put, and each token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _probe_blocks(service: SwarmService) -> ProbeResult:
    """Hidden states of nobody's text, but of the right shape, through every block."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, service.hidden_size, generator=generator)
    started = time.perf_counter()
    with service.open_session(batch_size=1, max_length=8) as session:
        first = session.step(hidden_states[:3], positions=[0], num_tokens=[3], num_outputs=[1])
        had_first = time.perf_counter()
        second = session.step(hidden_states[3:], positions=[3], num_tokens=[1])
        ended = time.perf_counter()
        route = session.route
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise PeerMisbehaved("the hidden states that came back are not finite")
    return ProbeResult(text=None, first_s=had_first - started, next_s=ended - had_first, route=route)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, or None where it has none that transformers can read."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError) as error:
        logger.info("%s has no tokenizer, token ids are shown: %s", checkpoint.name, error)
        return None
