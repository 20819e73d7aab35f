"""Several adapters as one, for rows that use them together, as PEFT does with all that are active.

    y = W x + s1 B1 (A1 x) + s2 B2 (A2 x)      is one adapter with A = [A1; A2], B = [s1 B1, s2 B2], of rank r1 + r2
    scales multiply, biases add, one of them may have virtual positions

It is exact, and costs what the parts cost. What does not add up is refused: two norms of one matrix (DoRA), say.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import Manifest, decode_shard
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft import Contents, LoadedAdapter, pack
from swarm.errors import InvalidRequest


class Part(Protocol):
    """An adapter that is combined: `swarm.adapters.peft.LoadedAdapter`."""

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""

    @property
    def shards(self) -> Mapping[int, bytes]:
        """By block."""

    @property
    def embeddings_PH(self) -> Tensor | None:
        """Of its virtual positions."""


def combine(parts: Sequence[Part], layout: ModelLayout) -> LoadedAdapter:
    """What these adapters do together.

    Args:
        parts: at least one.
        layout: of the base model.

    Raises:
        InvalidRequest: they can't be used together; names why.
    """
    virtual = [part for part in parts if part.manifest.num_virtual]
    if len(virtual) > 1:
        raise InvalidRequest(f"{len(virtual)} of the adapters have virtual positions, at most one can")
    deltas: dict[int, BlockDelta] = {}
    for part in parts:
        for info in part.manifest.shards:
            data, shape = bytearray(part.shards[info.block]), layout.blocks[info.block]
            delta = decode_shard(data, info, shape, part.manifest.num_virtual)
            known = deltas.get(info.block)
            deltas[info.block] = delta if known is None else _both(known, delta, info.block)
    contents = Contents(
        deltas=deltas,
        num_virtual=virtual[0].manifest.num_virtual if virtual else 0,
        embeddings_PH=virtual[0].embeddings_PH if virtual else None,
    )
    method = " + ".join(part.manifest.method for part in parts)
    return pack(contents, method=method[:1024], base=parts[0].manifest.base, layout=layout)


def _both(first: BlockDelta, second: BlockDelta, block: int) -> BlockDelta:
    linears = dict(first.linears)
    for path, linear in second.linears.items():
        known = linears.get(path)
        linears[path] = linear if known is None else _stacked(known, linear, f"block {block}, {path}")
    return BlockDelta(
        linears=linears,
        prefix_k_PKD=_either(first.prefix_k_PKD, second.prefix_k_PKD),
        prefix_v_PKE=_either(first.prefix_v_PKE, second.prefix_v_PKE),
        prompt_PH=_either(first.prompt_PH, second.prompt_PH),
    )


def _stacked(first: LinearDelta, second: LinearDelta, where: str) -> LinearDelta:
    for one, other in ((first, second), (second, first)):
        if one.magnitude_O is not None:
            raise InvalidRequest(f"{where}: an adapter with a magnitude (DoRA) can't be used together with another")
        if one.base_bias_O is not None and other.base_bias_O is not None:
            raise InvalidRequest(f"{where}: both adapters replace the base's own bias")
        scales = one.input_scale_I is not None or one.output_scale_O is not None or one.base_bias_O is not None
        if scales and (other.rank or other.bias_O is not None):
            raise InvalidRequest(f"{where}: one adapter scales what the other adds to")
    ranked = [linear for linear in (first, second) if linear.rank]
    a_rI = b_Or = None
    if ranked:
        dtype = reduce(
            torch.promote_types, [it.dtype for linear in ranked for it in (linear.a_rI, linear.b_Or) if it is not None]
        )
        a_rI = torch.cat([linear.a_rI.to(dtype) for linear in ranked if linear.a_rI is not None])
        scaled = [linear.scale * linear.b_Or.to(dtype) for linear in ranked if linear.b_Or is not None]
        b_Or = torch.cat(scaled, dim=1)
    return LinearDelta(
        a_rI=a_rI,
        b_Or=b_Or,
        input_scale_I=_product(first.input_scale_I, second.input_scale_I),
        output_scale_O=_product(first.output_scale_O, second.output_scale_O),
        bias_O=_sum(first.bias_O, second.bias_O),
        base_bias_O=_either(first.base_bias_O, second.base_bias_O),
    )


def _either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first * second if first is not None and second is not None else _either(first, second)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first + second if first is not None and second is not None else _either(first, second)
