"""What a server does about its place in the swarm, put together: what it takes, whom it measures, when it moves.

FactsStore, hardware ─► sizing.fit_blocks ─► how many    Scout ─► place, pings for the record
                            └─► Mover.choose ─► which      └────► Mover.run ─► Server.leave_for
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from swarm.checkpoint.partial import shards_by_block
from swarm.directory import Directory
from swarm.leases import LeaseDesk
from swarm.network.node import Node
from swarm.pings import Pinger
from swarm.placement import Survey
from swarm.registry import Registry
from swarm.server.block_facts import BlockFacts, FactsStore, largest_part
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import ServerConfig
from swarm.server.hardware import free_bytes
from swarm.server.mover import Movable, Mover
from swarm.server.plan import Plan
from swarm.server.scout import Scout
from swarm.server.sizing import Fit, fit_blocks
from swarm.transport import Transport
from swarm.types import BlockRange

DOWNLOAD_BYTES_PER_S = 20e6
"""At which rate weights come that are not on disk, for all that is known."""
LOAD_BLOCK_S = 2.0
"""What loading a block takes, before one was loaded."""


class PlacedServer(Movable, Protocol):
    """A server, as far as its place is concerned."""

    config: ServerConfig
    plan: Plan
    node: Node


class Placing:
    """The place of one server.

    Args:
        server: which one; it has joined the swarm.
        transport: how to measure others.
        registry: where their records are.
    """

    def __init__(self, server: PlacedServer, transport: Transport, registry: Registry):
        plan = server.plan
        self.facts: BlockFacts | None = None
        """Of one block, once they are known."""
        self._server = server
        self._generator = np.random.default_rng()
        self._store = FactsStore(
            plan.checkpoint,
            device=plan.device,
            dtype=plan.dtype,
            quantization=plan.quantization,
            cache_dir=server.config.cache_dir,
        )
        directory = Directory(registry, model=plan.checkpoint.digest, num_blocks=plan.num_blocks)
        self.scout = Scout(
            Pinger(transport, self._generator),
            directory,
            own_id=server.node.peer_id,
            own_blocks=lambda: server.plan.blocks,
            generator=self._generator,
        )
        self._mover: Mover | None = None
        self._block_s = LOAD_BLOCK_S
        self._far_bytes: list[int] = []

    @property
    def num_moves(self) -> int:
        """How often the server has moved."""
        return 0 if self._mover is None else self._mover.num_moves

    async def choose(self) -> tuple[BlockRange, str]:
        """How many blocks fit, and where the swarm needs them most; and why, in one line.

        Raises:
            ConfigError: not even one fits.
            UnsupportedModel: the block runner would run this model wrongly.
        """
        plan, config = self._server.plan, self._server.config
        await self.scout.look(max_age_s=0.0, everything=True)
        weakest = Survey(self.scout.holdings, plan.num_blocks).weakest.start
        self.facts = await asyncio.to_thread(self._store.of_block, weakest)
        fit = await asyncio.to_thread(self._fit, self.facts, weakest)
        count = config.num_blocks or fit.num_blocks
        self._far_bytes = await asyncio.to_thread(_bytes_not_on_disk, plan, self.facts)
        self._mover = Mover(
            self._server,
            self.scout,
            LeaseDesk(self._server.node, plan.checkpoint.digest),
            num_blocks=plan.num_blocks,
            length=count,
            reload_s=lambda: reload_times(self._far_bytes, count, self._block_s),
            generator=self._generator,
        )
        choice = await self._mover.choose(self.facts.batch_tps)
        why = f"{count} asked" if config.num_blocks else str(fit)
        gain = (
            f"{choice.before_tps:.0f} -> {choice.after_tps:.0f} tokens/s through {len(self.scout.holdings) + 1} servers"
        )
        speed = f"{self.facts.single_tps:.0f} to {self.facts.batch_tps:.0f} tokens/s per block"
        return choice.blocks, f"chose blocks {choice.blocks}: {why}; {speed} here; the swarm's worth {gain}"

    def loaded(self, span: BlockSpan, seconds: float) -> None:
        """The server has loaded its blocks, in so many seconds; nobody uses them yet."""
        self._block_s = seconds / len(span.blocks)
        self.facts = self._store.known() or self._store.of_span(span)

    async def run(self) -> None:
        """Measure others and, if the blocks were chosen here, move when that pays; until cancelled."""
        await (self.scout.run() if self._mover is None else self._mover.run())

    def _fit(self, facts: BlockFacts, block: int) -> Fit:
        plan, config = self._server.plan, self._server.config
        return fit_blocks(
            facts,
            free_bytes=free_bytes(plan.device),
            cache=config.cache_size,
            adapter_bytes=config.adapter_bytes,
            history_bytes=config.history_bytes if plan.device.type == "cpu" else 0,
            max_blocks=plan.num_blocks,
            largest_part=largest_part(plan.checkpoint, block),
        )


def reload_times(far_bytes: Sequence[int], length: int, block_s: float) -> list[float]:
    """Seconds to load blocks [i, i + length), for each i. Pure.

    Args:
        far_bytes: by block, what of its weights is not on disk.
        length: how many blocks are loaded.
        block_s: what loading one from disk takes.
    """
    return [
        length * block_s + sum(far_bytes[start : start + length]) / DOWNLOAD_BYTES_PER_S
        for start in range(len(far_bytes) - length + 1)
    ]


def _bytes_not_on_disk(plan: Plan, facts: BlockFacts) -> list[int]:
    """By block; a block with one file missing counts as if all of it were, in 16 bits."""
    checkpoint = plan.checkpoint
    bits = {"int8": 2.0, "nf4": 4.0}.get(plan.quantization, 2.0 / plan.dtype.itemsize)
    here = {shard for shard in checkpoint.shards if checkpoint.store.is_here(shard)}
    return [0 if here.issuperset(shards) else int(facts.weight_bytes * bits) for shards in shards_by_block(checkpoint)]
