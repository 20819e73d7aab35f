"""A client's update as bytes, and what has to be true of another client's before it counts. Pure.

    {block: BlockDelta} ─pack─► manifest, a shard per block (swarm.adapters.format) ~~► peers
    manifest of a peer ─check_manifest─► how much may come ~~► shards ─read─► {block: BlockDelta}, as the rules want it

The rules follow from settings that all clients of a run share, so all of them refuse the same updates. Sizes and ranks
are checked before anything is allocated; hashes, names, shapes and finite numbers by `decode_shard`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import Manifest, ShardInfo, decode_shard
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft import Contents, LoadedAdapter, pack
from swarm.errors import InvalidRequest
from swarm.federated.aggregate import Update

MAX_NUMBER = 1e6
"""Of A, and of B times its scale: beyond, sums of products might overflow, and no training comes there."""
_HEADER_BYTES = 4096
_ENTRY_BYTES = 512
"""Most that the header of a shard takes, and each linear's entries in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What an update of this round looks like."""

    layout: ModelLayout
    linears: Mapping[int, Sequence[str]]
    """Of each block that is changed, the paths of the linears: these, all of them, and no others."""
    max_rank: int
    is_rank_fixed: bool
    """Whether each linear must have just this rank."""
    scale: float | None = None
    """That each linear must have; None for any."""
    common_a: Update | None = None
    """Whose A each linear must have, to the bit, where A is not trained."""

    def max_shard_bytes(self, block: int) -> int:
        """Most that a shard of fp32 may have."""
        shapes = [self.layout.blocks[block].linears[path] for path in self.linears[block]]
        numbers = sum(self.max_rank * (shape.num_inputs + shape.num_outputs) for shape in shapes)
        return 4 * numbers + _HEADER_BYTES + _ENTRY_BYTES * len(shapes)


def pack_update(update: Update, layout: ModelLayout) -> LoadedAdapter:
    """As bytes with a name; the same numbers have the same name."""
    return pack(Contents(deltas=update), method="LORA", base="", layout=layout)


def check_manifest(manifest: Manifest, rules: Rules) -> None:
    """Refuse what can't be an update, or is too large, before any of it is fetched.

    Raises:
        InvalidRequest: says what is wrong.
    """
    ours = (len(rules.layout.blocks), rules.layout.hidden_size)
    if (theirs := (manifest.num_blocks, manifest.hidden_size)) != ours:
        raise InvalidRequest(f"the update is for (blocks, width) {theirs}, the model has {ours}")
    if manifest.num_virtual or manifest.embeddings is not None:
        raise InvalidRequest(f"the update has {manifest.num_virtual} virtual positions, need a LoRA without any")
    if (blocks := [info.block for info in manifest.shards]) != sorted(rules.linears):
        raise InvalidRequest(f"the update changes {len(blocks)} blocks, need the {len(rules.linears)} of the run")
    for info in manifest.shards:
        limit = rules.max_shard_bytes(info.block)
        if info.num_bytes > limit or 2 * info.num_elements > limit:
            raise InvalidRequest(
                f"block {info.block}: {info.num_bytes} bytes of {info.num_elements} numbers, limit {limit} bytes"
            )
        if info.max_rank > rules.max_rank:
            raise InvalidRequest(f"block {info.block}: rank {info.max_rank}, limit {rules.max_rank}")


def read_shard(data: bytearray, info: ShardInfo, rules: Rules) -> BlockDelta:
    """One block's part of an update whose manifest was checked; tensors are views of `data`.

    Raises:
        HashMismatch: other bytes than the manifest names. InvalidRequest: they don't fit the rules; names the linear.
    """
    delta = decode_shard(data, info, rules.layout.blocks[info.block], num_virtual=0)
    where = f"block {info.block}"
    if sorted(delta.linears) != sorted(rules.linears[info.block]):
        raise InvalidRequest(f"{where}: linears {sorted(delta.linears)}, need {sorted(rules.linears[info.block])}")
    for path, linear in delta.linears.items():
        _check_linear(f"{where}, {path}", linear, rules, _common_a(rules, info.block, path))
    return delta


def _common_a(rules: Rules, block: int, path: str) -> torch.Tensor | None:
    return None if rules.common_a is None else rules.common_a[block].linears[path].a_rI


def _check_linear(where: str, linear: LinearDelta, rules: Rules, common_a: torch.Tensor | None) -> None:
    a, b = linear.a_rI, linear.b_Or
    if a is None or b is None or len(linear.tensors()) > 2:
        raise InvalidRequest(f"{where} has {', '.join(linear.tensors())}, need lora_A and lora_B and nothing else")
    if linear.rank > rules.max_rank:
        raise InvalidRequest(f"{where} has rank {linear.rank}, limit {rules.max_rank}")
    if rules.is_rank_fixed and linear.rank != rules.max_rank:
        raise InvalidRequest(f"{where} has rank {linear.rank}, need {rules.max_rank}")
    if rules.scale is not None and linear.scale != rules.scale:
        raise InvalidRequest(f"{where} has scale {linear.scale}, need {rules.scale}")
    largest = max(float(a.abs().max()), float(b.abs().max()) * max(abs(linear.scale), 1.0))
    if largest > MAX_NUMBER:
        raise InvalidRequest(f"{where} has a number of {largest:.3g}, limit {MAX_NUMBER:g}")
    if common_a is not None and not torch.equal(a, common_a):
        raise InvalidRequest(f"{where} has an A of its own; in this round all have the same")
