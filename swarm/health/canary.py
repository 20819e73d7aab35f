"""Sends a token through every model once a minute, as a client would, and keeps what came of it.

    Canaries.run ─► thread: swarm.client.probe.Prober ~~► the swarm ─► Canary per model ─► on_news

The only part of this room that knows clients; torch and transformers are loaded in its thread, at the first probe.
Models whose checkpoint is here get real tokens, the others made-up hidden states through all their blocks.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.errors import SwarmError
from swarm.health.compose import clean
from swarm.health.state import Canary, CanaryHop, Model
from swarm.private.credentials import Credentials

if TYPE_CHECKING:
    from swarm.client.probe import Prober

log = logging.getLogger(__name__)

PERIOD_S = 60.0
MAX_MODELS = 8
"""Models that get a canary, those of most servers first."""
MAX_REMEMBERED = 64
"""Models whose last canary is kept."""


class Canaries:
    """The canaries of all models.

    Args:
        initial_peers: asked for when the canary joins: addresses of any peers.
        checkpoints: models whose files are here, by name, directory or hub id; they are looked up when the swarm
            announces a model of that name.
        models: asked for at each round: the models to probe, and the width of hidden states of each.
        on_news: called on the loop after each probe.
        period_s: from one round to the next.
        credentials: our invitation, where the swarm is private; then no files are fetched for canaries.
    """

    def __init__(
        self,
        initial_peers: Callable[[], Sequence[str]],
        checkpoints: Sequence[str],
        *,
        models: Callable[[], Sequence[tuple[Model, int]]],
        on_news: Callable[[], None],
        period_s: float = PERIOD_S,
        credentials: Credentials | None = None,
    ):
        self.last: dict[str, Canary] = {}
        """The last canary of each model, by digest."""
        self.num_sent: Counter[str] = Counter()
        self.num_lost: Counter[str] = Counter()
        self._initial_peers, self._credentials = initial_peers, credentials
        self._checkpoints = {_announced_name(checkpoint): checkpoint for checkpoint in checkpoints}
        self._models, self._on_news, self._period_s = models, on_news, period_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canary")
        self._prober: Prober | None = None
        self._is_closed = False

    async def run(self) -> None:
        """Send canaries for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._period_s
            for model, hidden_size in self._models()[:MAX_MODELS]:
                canary = await loop.run_in_executor(self._thread, self._send, model, hidden_size)
                self.num_sent[model.digest] += 1
                self.num_lost[model.digest] += not canary.ok
                self.last.pop(model.digest, None)
                self.last[model.digest] = canary
                self._forget_old()
                self._on_news()
            await asyncio.sleep(max(1.0, due - loop.time()) if self.last else 1.0)

    async def close(self) -> None:
        """Leave the swarm; a canary under way is lost."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._prober is not None:
            await asyncio.to_thread(self._prober.close)

    def _forget_old(self) -> None:
        """Names are claims that cost nothing: keep those that were probed last."""
        while len(self.last) > MAX_REMEMBERED:
            digest = next(iter(self.last))
            for known in (self.last, self.num_sent, self.num_lost):
                known.pop(digest, None)

    def _send(self, model: Model, hidden_size: int) -> Canary:
        """One canary; in the thread."""
        from swarm.client.probe import Target

        at, has_text = time.time(), False
        try:
            prober = self._ready_prober(model.name)
            target = Target(digest=model.digest, name=model.name, num_blocks=model.num_blocks, hidden_size=hidden_size)
            has_text = prober.has_checkpoint(model.digest)
            result = prober.probe(target)
        except (SwarmError, OSError, CancelledError) as error:
            return Canary(at=at, ok=False, has_text=has_text, error=clean(str(error) or type(error).__name__))
        names = {server.peer_id: server.label for server in model.servers}
        return Canary(
            at=at,
            ok=True,
            has_text=has_text,
            first_ms=result.first_s * 1e3,
            next_ms=result.next_s * 1e3,
            text=clean(result.text) if result.text is not None else None,
            route=tuple(_hop(hop, names) for hop in result.route),
        )

    def _ready_prober(self, name: str) -> "Prober":
        """The prober, with the checkpoint of this name looked up if it is one of those that are here."""
        from swarm.client.probe import Prober

        if self._is_closed:
            raise CancelledError
        if self._prober is None:
            self._prober = Prober(self._initial_peers(), self._credentials)
        if (checkpoint := self._checkpoints.pop(name, None)) is not None:
            try:
                self._prober.add_checkpoint(checkpoint)
            except SwarmError as error:
                log.warning("no canary with tokens for %s: %s", name, error)
        return self._prober


def _announced_name(checkpoint: str) -> str:
    """What servers of a checkpoint call it: directories go by their last part."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def _hop(hop: Any, names: dict[str, str]) -> CanaryHop:
    name = names.get(hop.peer_id, f"…{hop.peer_id[-8:]}")
    return CanaryHop(peer_id=hop.peer_id, name=name, start=hop.blocks.start, end=hop.blocks.end)
