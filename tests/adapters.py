"""Adapters made up for tests: a bias and a little LoRA per block, small enough to read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import Manifest, encode_shard, shard_info
from swarm.adapters.layout import BlockShape, LinearShape

HIDDEN = 4


@dataclass(frozen=True, eq=False)
class MadeAdapter:
    """What `swarm.adapters.peft.read_adapter` would give."""

    manifest: Manifest
    shards: Mapping[int, bytes]
    embeddings_PH: torch.Tensor | None = None
    deltas: Mapping[int, BlockDelta] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return self.manifest.digest


def shape(hidden: int = HIDDEN) -> BlockShape:
    """Of a block with one linear."""
    return BlockShape(
        hidden_size=hidden,
        linears={"q": LinearShape(num_inputs=hidden, num_outputs=hidden)},
        kv_shape=(1, hidden, hidden),
    )


def make_adapter(
    value: float,
    *,
    blocks=range(2),
    num_blocks: int = 8,
    hidden: int = HIDDEN,
    rank: int = 2,
    num_virtual: int = 0,
    embeddings: torch.Tensor | None = None,
) -> MadeAdapter:
    """An adapter whose bias is `value` in each of some blocks; others make other digests."""
    deltas, shards, infos = {}, {}, []
    for block in blocks:
        linear = LinearDelta(
            a_rI=torch.full((rank, hidden), float(value)) if rank else None,
            b_Or=torch.zeros(hidden, rank) if rank else None,
            bias_O=torch.full((hidden,), float(value)),
        )
        deltas[block] = BlockDelta(linears={"q": linear})
        shards[block] = encode_shard(deltas[block])
        infos.append(shard_info(block, deltas[block], shards[block]))
    manifest = Manifest(
        method="LORA",
        base="fake",
        num_blocks=num_blocks,
        hidden_size=hidden,
        num_virtual=num_virtual,
        shards=tuple(infos),
    )
    return MadeAdapter(manifest, shards, embeddings, deltas)
