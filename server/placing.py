"""What a server does about its place in the swarm, put together: what it takes, whom it measures, when it moves.

LatestFacts, hardware ─► sizing.fit_blocks ─► how many     Scout ─► place, pings for the record
                             └─► Mover.choose ─► which       └────► Mover.run ─► Tenancy.leave_for, arrive

It does not know how blocks are loaded, nor who is served.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from swarm.checkpoint.partial import shards_by_block
from swarm.directory import Directory
from swarm.leases import LeaseDesk
from swarm.pings import Pinger
from swarm.placement import Choice, Survey
from swarm.registry import Registry
from swarm.server.block_facts import BlockFacts, largest_part
from swarm.server.config import ServerConfig
from swarm.server.hardware import free_bytes
from swarm.server.latest_facts import LatestFacts
from swarm.server.loading import Loader
from swarm.server.mover import Movable, Mover
from swarm.server.plan import Plan
from swarm.server.scout import Scout
from swarm.server.sizing import Fit, fit_blocks
from swarm.transport import Transport
from swarm.types import BlockRange, name_ranges

STORED_PART = {"int8": 2.0, "nf4": 4.0}
"""How much larger a block is in the files, which have 16 bits, than in memory; otherwise the dtype says it."""


class Placed(Movable, Protocol):
    """What a server holds, as far as its place is concerned."""

    plan: Plan


class Placing:
    """The place of one server.

    Args:
        config: what it was told.
        held: its blocks.
        facts: what a block takes and gives here.
        loader: what loading one takes.
        transport: how to measure others.
        registry: where their records are.
    """

    def __init__(
        self,
        config: ServerConfig,
        held: Placed,
        *,
        facts: LatestFacts,
        loader: Loader,
        transport: Transport,
        registry: Registry,
    ):
        plan = held.plan
        self._config, self._held, self._facts, self._loader = config, held, facts, loader
        self._node = transport.node
        self._generator = np.random.default_rng()
        self.scout = Scout(
            Pinger(transport, self._generator),
            Directory(registry, model=plan.checkpoint.digest, num_blocks=plan.num_blocks),
            own_id=self._node.peer_id,
            own_blocks=lambda: held.plan.blocks,
            generator=self._generator,
        )
        self._mover: Mover | None = None
        self._length = 0
        self._shards: list[tuple[str, ...]] = []
        """Weight files of each block, once they are known."""

    @property
    def num_moves(self) -> int:
        """How often the server has moved."""
        return 0 if self._mover is None else self._mover.num_moves

    async def choose(self) -> tuple[BlockRange, str]:
        """How many blocks fit, and where the swarm gains most by them; and why, in one line.

        Raises:
            ConfigError: not even one fits.
            PeerTimeout: the records of the swarm can't be read.
            UnsupportedModel: the block runner would run this model wrongly.
        """
        plan, config = self._held.plan, self._config
        await self.scout.look_closely()
        weakest = Survey(self.scout.holdings, plan.num_blocks).weakest.start
        facts = await self._facts.of_block(weakest)
        if config.num_blocks is None:
            fit = await asyncio.to_thread(self._fit, facts, weakest)
            self._length, why = fit.num_blocks, str(fit)
        else:
            self._length, why = config.num_blocks, f"{config.num_blocks} asked"
        self._mover = Mover(
            self._held,
            self.scout,
            LeaseDesk(self._node, plan.checkpoint.digest, num_blocks=plan.num_blocks),
            num_blocks=plan.num_blocks,
            length=self._length,
            reload_s=self._reload_s,
            generator=self._generator,
        )
        choice = await self._mover.choose(facts.batch_tps)
        return choice.blocks, explained(choice, why, facts, num_servers=len(self.scout.holdings) + 1)

    async def keep_moving(self) -> None:
        """Move whenever that pays, if the blocks were chosen here; until cancelled.

        Raises:
            SwarmError: the server could load neither the new blocks nor its old ones.
        """
        if self._mover is None:
            await asyncio.Event().wait()
        assert self._mover is not None
        self._shards = await asyncio.to_thread(shards_by_block, self._held.plan.checkpoint)
        await self._mover.run()

    def _fit(self, facts: BlockFacts, block: int) -> Fit:
        plan, config = self._held.plan, self._config
        return fit_blocks(
            facts,
            free_bytes=free_bytes(plan.device),
            cache=config.cache_size,
            adapter_bytes=config.adapter_bytes,
            history_bytes=config.history_bytes if plan.device.type == "cpu" else 0,
            training_bytes=config.training_bytes,
            max_blocks=plan.num_blocks,
            largest_part=largest_part(plan.checkpoint, block),
        )

    def _reload_s(self) -> list[float]:
        """Seconds to load blocks [i, i + length), for each i, by what is on disk now."""
        plan, files, facts = self._held.plan, self._loader.files, self._facts.latest
        assert facts is not None, "asked after the blocks were chosen"
        stored_bytes = int(facts.weight_bytes * STORED_PART.get(plan.quantization, 2.0 / plan.dtype.itemsize))
        here = {shard for shard in plan.checkpoint.shards if files.is_here(shard)}
        far = [0 if here.issuperset(shards) else stored_bytes for shards in self._shards]
        return reload_times(
            far or [0] * plan.num_blocks, self._length, block_s=self._loader.block_s, bytes_per_s=files.bytes_per_s
        )


def explained(choice: Choice, why: str, facts: BlockFacts, *, num_servers: int) -> str:
    """One line for the owner. Pure.

    Args:
        choice: the blocks, and what they do for the swarm.
        why: where their number comes from.
        facts: of one block.
        num_servers: in the swarm, this one included.
    """
    speed = f"{facts.single_tps:.0f} to {facts.batch_tps:.0f} tokens/s through a block here"
    swarm = "the first server" if num_servers == 1 else f"best place among {num_servers} servers"
    gain = f"full batches of the swarm {choice.before_tps:.3g} -> {choice.after_tps:.3g} tokens/s"
    if choice.missing:
        gain = f"nobody serves {name_ranges(choice.missing)} yet"
    return f"chose blocks {choice.blocks}: {why}; {speed}; {swarm}: {gain}"


def reload_times(far_bytes: Sequence[int], length: int, *, block_s: float, bytes_per_s: float) -> list[float]:
    """Seconds to load blocks [i, i + length), for each i. Pure.

    Args:
        far_bytes: by block, what of its weights is not on disk.
        length: how many blocks are loaded.
        block_s: what loading one from disk takes.
        bytes_per_s: how fast the others come.
    """
    return [
        length * block_s + sum(far_bytes[start : start + length]) / bytes_per_s
        for start in range(len(far_bytes) - length + 1)
    ]
