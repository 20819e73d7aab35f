"""Gets what a server needs of its model into memory: blocks, their files ahead of that, adapters.

    load_span ─► BlockSpan.load ─┬─► BlockSpan
                                 └─► block_s ─► placing: what loading other blocks would take
    fetch_ahead ─► Checkpoint.ensure ─► MeasuredFiles       blocks that are loaded next
    load_adapter ─► LoadedAdapter

All of it takes long and runs in threads; once `stop` was called it ends at the next file, block or adapter. It knows
neither what else is in memory nor who is served.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from swarm.adapters.load import load_adapter
from swarm.adapters.peft import LoadedAdapter
from swarm.checkpoint.partial import shards_for
from swarm.errors import ConfigError, SwarmError
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import ServerConfig
from swarm.server.pages import PAGE_SIZE
from swarm.server.plan import Plan
from swarm.server.weight_files import MeasuredFiles
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

LOAD_BLOCK_S = 2.0
"""What loading a block from disk takes, before one was loaded."""


class LoadingStopped(SwarmError):
    """The server was told to stop while it loaded its blocks."""


class Loader:
    """Loads for one server.

    Args:
        config: how much cache, and where adapters come from.
        plan: the model, and how its blocks are run.
        files: where the weights of the plan's checkpoint come from.
    """

    def __init__(self, config: ServerConfig, plan: Plan, files: MeasuredFiles):
        self.files = files
        self.block_s = LOAD_BLOCK_S
        """Seconds that a block took the last time, once its files were here."""
        self.is_stopped = False
        self._config, self._plan = config, plan

    def stop(self) -> None:
        """Load nothing any more: what is under way ends soon, with LoadingStopped."""
        self.is_stopped = True

    def check(self, where: str) -> None:
        """Go on unless stopped.

        Raises:
            LoadingStopped: with `where`.
        """
        if self.is_stopped:
            raise LoadingStopped(where)

    async def load_span(self, blocks: BlockRange, on_progress: Callable[[int, int], None] | None = None) -> BlockSpan:
        """Blocks in the memory of the device, with an empty cache.

        Args:
            blocks: which.
            on_progress: called in any thread, with how many of them are loaded.

        Raises:
            UnsupportedModel: the block runner would run this model wrongly.
            ConfigError: they do not fit, or their files can't be read.
            LoadingStopped: `stop` was called meanwhile.
        """
        plan, size = self._plan, self._config.cache_size

        def progress(done: int, total: int) -> None:
            self.check(f"stopped after loading {done} of {total} blocks")
            if on_progress is not None:
                on_progress(done, total)

        started = time.monotonic() - self.files.seconds
        try:
            span = await asyncio.to_thread(
                BlockSpan.load,
                plan.checkpoint,
                blocks,
                device=plan.device,
                dtype=plan.dtype,
                quantization=plan.quantization,
                num_pages=None if size.tokens is None else -(-size.tokens // PAGE_SIZE),
                kv_bytes=size.num_bytes,
                on_progress=progress,
            )
        except (RuntimeError, MemoryError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"blocks {blocks} can't be loaded here: {reason}") from error
        self.block_s = (time.monotonic() - self.files.seconds - started) / len(blocks)
        return span

    async def load_adapter(self, name: str) -> LoadedAdapter:
        """An adapter for the model, by its directory or hub id.

        Raises:
            AdapterError: there is none, or it does not fit.
            LoadingStopped: `stop` was called meanwhile.
        """
        config = self._config
        loaded = await asyncio.to_thread(
            load_adapter, name, self._plan.checkpoint, cache_dir=config.cache_dir, token=config.token
        )
        self.check("stopped while loading adapters")
        return loaded

    async def fetch_ahead(self, blocks: BlockRange) -> None:
        """Get the files of these blocks while something else is done; what fails will fail again in `load_span`."""
        try:
            await asyncio.to_thread(self._fetch, blocks)
        except (SwarmError, OSError) as error:
            logger.info("can't fetch the files of blocks %s: %s", blocks, error)

    def _fetch(self, blocks: BlockRange) -> None:
        checkpoint = self._plan.checkpoint
        for shard in shards_for(checkpoint, blocks):
            self.check("stopped while fetching files")
            checkpoint.ensure([shard])
