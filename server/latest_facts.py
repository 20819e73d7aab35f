"""What one block takes and gives on this machine, by the latest that is known: measured, then set right by use.

    of_block: before blocks are chosen ─┐
    of_span: when they are loaded ──────┼─► latest ─► record, holding, how many blocks fit
    ran: what their batches took ───────┘      └──► FactsStore, for the next start

It does not know which blocks are held, nor what follows from it.
"""

import asyncio
import logging
import time
from pathlib import Path

import torch

from swarm.errors import ConfigError
from swarm.server.block_facts import BlockFacts, FactsStore
from swarm.server.blocks.span import BlockSpan
from swarm.server.lean import collect_garbage
from swarm.server.plan import Plan
from swarm.server.speeds import Plain, SpeedCheck

logger = logging.getLogger(__name__)


class LatestFacts:
    """The facts of one server.

    Args:
        plan: the model, and how its blocks are run.
        cache_dir: where facts are kept.
    """

    def __init__(self, plan: Plan, cache_dir: Path | None = None):
        self.latest: BlockFacts | None = None
        """Once anything is known."""
        self._device = plan.device
        self._store = FactsStore(
            plan.checkpoint,
            device=plan.device,
            dtype=plan.dtype,
            quantization=plan.quantization,
            cache_dir=cache_dir,
        )
        self._speeds = SpeedCheck()

    @property
    def batch_tps(self) -> float:
        """Tokens per second of full batches through a block; 0 while that is not known."""
        return 0.0 if self.latest is None else self.latest.batch_tps

    async def of_block(self, block: int) -> BlockFacts:
        """What is known, else what this block shows.

        Raises:
            ConfigError: not even one block can be loaded.
            UnsupportedModel: the block runner would run this model wrongly.
        """
        self.latest = await asyncio.to_thread(self._of_block, block)
        return self.latest

    async def of_span(self, span: BlockSpan) -> BlockFacts:
        """What blocks that are loaded show, which nobody uses yet.

        Raises:
            ConfigError: they can't be run.
        """
        try:
            self.latest = await asyncio.to_thread(self._store.of_span, span)
        except (RuntimeError, MemoryError) as error:
            reason = error or type(error).__name__
            raise ConfigError(f"blocks {span.blocks} can't be run here: {reason}") from error
        return self.latest

    def ran(self, plain: Plain) -> None:
        """These batches have run so far: what is said of the machine's speed is set right if it is far off."""
        if self.latest is None:
            return
        before, self.latest = self.latest, self._speeds.corrected(self.latest, plain, time.monotonic())
        if self.latest is not before:
            rates = (self.latest.single_tps, self.latest.batch_tps, before.single_tps, before.batch_tps)
            logger.info("one row gives %.0f tokens/s and full batches %.0f, not %.0f and %.0f", *rates)
            self._store.remember(self.latest)

    def _of_block(self, block: int) -> BlockFacts:
        try:
            facts = self._store.of_block(block)
        except (RuntimeError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"block {block} can't be loaded here: {reason}") from error
        collect_garbage()  # what was measured is gone, and free memory is asked for next
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return facts
