"""Keeps a State of the swarm up to date, its history and its canaries, and wakes up who watches.

    every period, and at news of a canary:  Census.look ─► State ─► history (a thread, once a minute) ─► Trends
                                                              └───► revision + 1 ─► everybody in `watch`

One per process, on the event loop. It knows nothing of HTTP.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from swarm import __version__
from swarm.errors import PeerBusy, SwarmError
from swarm.health.canary import Canaries
from swarm.health.census import Census
from swarm.health.history import MINUTE_S, WINDOWS, Contributor, History, Point
from swarm.health.state import Model, State, Verdict
from swarm.network import Node
from swarm.private.credentials import Credentials
from swarm.transport import Transport

log = logging.getLogger(__name__)

MAX_WATCHERS = 256
"""Browsers that are told of news at once; more are refused."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trends:
    """What the history tells, as of the last minute."""

    points: dict[tuple[str, str], tuple[Point | None, ...]] = field(default_factory=dict)
    """By digest of the model and name of the window, oldest first."""
    contributors: tuple[Contributor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a page looks at its swarm."""

    initial_peers: tuple[str, ...]
    """Addresses that lead to the swarm."""
    period_s: float = 10.0
    """How often it looks."""
    checkpoints: tuple[str, ...] = ()
    """Models whose files are here, for canaries with real tokens."""
    has_canary: bool = True
    """Whether canaries are sent at all."""
    canary_period_s: float = 60.0
    credentials: Credentials | None = None
    """Our invitation, where the swarm is private."""


class Monitor:
    """The state of one swarm.

    Args:
        node: our peer.
        transport: reaches servers.
        history: where the past is kept.
        settings: how to look.
    """

    def __init__(self, node: Node, transport: Transport, history: History, settings: Settings):
        self.settings = settings
        self.transport = transport
        self.state = State(
            at=time.time(), version=__version__, peer_id=node.peer_id, dht_peers=0, refresh_ms=0.0, stale_s=0.0
        )
        self.trends = Trends()
        self.revision = 0
        """Grows with every new state."""
        self.num_refreshes = self.num_failures = self.num_watchers = 0
        self._node, self._history = node, history
        self._census = Census(node, transport, period_s=settings.period_s)
        self.canaries = Canaries(
            self._addresses,
            settings.checkpoints,
            models=self._probed,
            on_news=self.wake,
            period_s=settings.canary_period_s,
            credentials=settings.credentials,
        )
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._recorded_minute = -1
        self._known_addresses: tuple[str, ...] = ()
        self._is_closed = False

    async def run(self) -> None:
        """Look at the swarm for ever."""
        async with asyncio.TaskGroup() as group:
            if self.settings.has_canary:
                group.create_task(self.canaries.run())
            while True:
                await self.refresh()
                self._wake.clear()
                try:
                    async with asyncio.timeout(self.settings.period_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def refresh(self) -> State:
        """Look now, and tell everybody who watches."""
        started = time.monotonic()
        try:
            models = await self._census.look(self.canaries.last, self.state.models)
        except SwarmError as error:
            self.num_failures += 1
            log.warning("the swarm can't be looked at: %s", error)
            models = self.state.models
        read_at = self._census.read_at
        now = time.time()
        self.state = State(
            at=now,
            version=__version__,
            peer_id=self._node.peer_id,
            dht_peers=self._node.num_peers,
            refresh_ms=(time.monotonic() - started) * 1e3,
            stale_s=0.0 if read_at is None or now - read_at < 2 * self.settings.period_s else now - read_at,
            models=models,
        )
        self.num_refreshes += 1
        await self._record()
        self.revision += 1
        self._news.set()
        self._news = asyncio.Event()
        return self.state

    def wake(self) -> None:
        """Look again at once."""
        self._wake.set()

    async def watch(self) -> AsyncIterator[int]:
        """The revision of each new state, the present one first.

        Raises:
            PeerBusy: too many are watching.
        """
        if self.num_watchers >= MAX_WATCHERS:
            raise PeerBusy(f"{self.num_watchers} are watching, limit {MAX_WATCHERS}", retry_after_s=30.0)
        self.num_watchers += 1
        try:
            while not self._is_closed:
                news = self._news
                yield self.revision
                await news.wait()
        finally:
            self.num_watchers -= 1

    def dismiss(self) -> None:
        """Send those who watch away."""
        self._is_closed = True
        self._news.set()

    async def close(self) -> None:
        """Ask nobody any more, and leave the swarm with the canaries."""
        self.dismiss()
        await self._census.close()
        await self.canaries.close()
        await asyncio.to_thread(self._disk.shutdown)

    def _probed(self) -> Sequence[tuple[Model, int]]:
        """Models worth a canary: where a block is missing, everybody knows how it would end."""
        models = [model for model in self.state.models if model.verdict is not Verdict.INCOMPLETE]
        sized = [(model, self._census.hidden_size(model.digest)) for model in models]
        return [(model, size) for model, size in sized if size]

    def _addresses(self) -> Sequence[str]:
        return [*self.settings.initial_peers, *self._known_addresses[:8]]

    async def _record(self) -> None:
        """Once a minute: write to the history, and read from it what the page shows."""
        minute = int(self.state.at) // MINUTE_S
        if minute == self._recorded_minute:
            return
        self._recorded_minute = minute
        try:
            self._known_addresses = await self._node.known_addresses()
            self.trends = await self._on_disk(self._write_and_read)
        except (sqlite3.Error, SwarmError) as error:
            log.warning("this minute is not in the history: %s", error)

    def _write_and_read(self) -> Trends:
        state = self.state
        self._history.record(state)
        self._history.remember(self.settings.initial_peers, self._known_addresses, state.at)
        return Trends(
            points={
                (model.digest, window.name): self._history.trend(model.digest, window, state.at)
                for model in state.models
                for window in WINDOWS
            },
            contributors=self._history.contributors(state.at),
        )

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)
