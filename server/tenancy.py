"""The blocks that a server holds: loads them, serves them, and leaves them for others.

    load ─► Loader ─► BlockSpan ─► LatestFacts ─► Serving ─► ONLINE        announce ─► the swarm
              ▲                                      │
    arrive ───┘ ◄── JOINING ◄── unload ◄── drain ◄───┴── leave_for         Mover calls these two

It does not know why it moves, nor how the swarm is told.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import torch

from swarm.errors import PeerBusy, SwarmError
from swarm.network.tasks import TaskSet
from swarm.placement import Holding
from swarm.server.config import ServerConfig
from swarm.server.latest_facts import LatestFacts
from swarm.server.lean import settle_heap, thaw_heap
from swarm.server.loading import Loader, LoadingStopped
from swarm.server.plan import Plan
from swarm.server.reach import Reach
from swarm.server.serving import Serving
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)


class Tenancy:
    """The blocks of one server; a `swarm.server.mover.Movable`.

    Args:
        config: how much memory for what, and which adapters.
        plan: the model, how its blocks are run, and which.
        reach: the server's place in the network, where it is when blocks are loaded.
        loader: gets them.
        facts: learns what they take and give.
        announce: tells the swarm what holds now.

    Attributes:
        plan: with the blocks that it holds or is about to hold.
        serving: what serves them, from when they are loaded until it leaves them.
        died: set when the device thread has failed.
        on_moved: called when other blocks are served.
    """

    def __init__(
        self,
        config: ServerConfig,
        plan: Plan,
        *,
        reach: Reach,
        loader: Loader,
        facts: LatestFacts,
        announce: Callable[[], Coroutine[Any, Any, None]],
    ):
        self.plan = plan
        self.serving: Serving | None = None
        self.died = asyncio.Event()
        self.on_moved: Callable[[], None] = lambda: None
        self._config, self._reach, self._loader, self._facts = config, reach, loader, facts
        self._announce = announce
        self._blocks_before = plan.blocks
        self._fetching: asyncio.Task[None] | None = None
        """Gets files of the blocks that it leaves for."""
        self._was_settled = False
        self._tasks = TaskSet()

    @property
    def state(self) -> ServerState:
        """OFFLINE after `end`, else what there is of the blocks."""
        if self._loader.is_stopped:
            return ServerState.OFFLINE
        return ServerState.JOINING if self.serving is None else self.serving.state

    @property
    def holding(self) -> Holding:
        """What it holds now, or is about to."""
        return Holding(peer_id=self._reach.node.peer_id, blocks=self.plan.blocks, capacity_tps=self._facts.batch_tps)

    @property
    def num_sessions(self) -> int:
        """Sessions that it carries."""
        return 0 if self.serving is None else self.serving.handler.num_sessions

    async def load(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load the blocks and serve them.

        Args:
            on_progress: called in any thread, with how many of how many blocks are loaded.

        Raises:
            UnsupportedModel: the block runner would run this model wrongly.
            ConfigError: blocks or adapters do not fit here.
            LoadingStopped: `end` was called meanwhile.
            SwarmError: an adapter that it was told to have can't be had.
        """
        span = await self._loader.load_span(self.plan.blocks, on_progress)
        await self._facts.of_span(span)
        self._loader.check("stopped after loading")
        self.serving = Serving(span, self._reach.transport, self._config, self.plan, self.died)
        for name in self._config.adapters:
            await self.serving.keep(name, await self._loader.load_adapter(name))
        self._loader.check("stopped after loading adapters")
        self.serving.open()
        await self._announce()

    async def drain(self, timeout_s: float) -> None:
        """Let go of everybody: announce DRAINING, admit nobody, end training runs, have sessions moved elsewhere.

        Returns when all sessions have gone, or at the latest after `timeout_s`; those that are left then are replayed
        by their clients once this server is gone.
        """
        if self.serving is None or timeout_s <= 0:
            return
        announcing = self._tasks.spawn(self._announce(), name="announce DRAINING")
        await self.serving.drain(timeout_s)
        announcing.cancel()

    async def announce_blocks(self, blocks: BlockRange) -> None:
        """Tell the swarm that it is about to load these."""
        self.plan = replace(self.plan, blocks=blocks)
        await self._announce()

    async def leave_for(self, blocks: BlockRange, *, drain_s: float) -> None:
        """Let go of sessions and blocks, and tell the swarm that it is about to load others.

        Args:
            blocks: the others; their files are fetched from now on.
            drain_s: how long sessions may take to be handed over; then their clients go on elsewhere by a replay.
        """
        self._blocks_before = self.plan.blocks
        self._fetching = self._tasks.spawn(self._loader.fetch_ahead(blocks), name=f"fetch blocks {blocks}")
        await self.drain(drain_s)
        await self._unload()
        await self.announce_blocks(blocks)

    async def arrive(self) -> bool:
        """Load the blocks that it has left for; if they can't be had, those of before. Whether it has the new ones.

        Raises:
            SwarmError: neither can be loaded.
        """
        before, has_them = self._blocks_before, True
        try:
            if self._fetching is not None:
                await asyncio.wait([self._fetching])
            await self.load()
        except LoadingStopped:
            raise
        except SwarmError as error:
            logger.warning("blocks %s can't be loaded (%s), going back to %s", self.plan.blocks, str(error), before)
            has_them = False
        if not has_them:  # when the error is gone, which holds on to what was loaded
            await self._unload()
            await self.announce_blocks(before)
            await self.load()
        if self._was_settled:
            settle_heap()
            self._was_settled = False
        self.on_moved()
        return has_them

    def end(self) -> None:
        """Load nothing and admit nobody any more: the server goes."""
        self._loader.stop()
        if self.serving is not None:
            self.serving.handler.state = ServerState.OFFLINE

    async def close(self) -> None:
        """End what serves the blocks, whoever uses it."""
        await self._tasks.close()
        if self.serving is not None:
            await self.serving.close()

    async def _unload(self) -> None:
        """End what still runs, and free the memory of the blocks."""
        if self.serving is not None:
            serving, self.serving = self.serving, None
            await serving.withdraw(PeerBusy("the server goes to other blocks", retry_after_s=60.0))
            await serving.close()
            del serving  # the last reference to the blocks
        self._was_settled |= thaw_heap()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()
