"""Whether an adapter fits the blocks of a span: everything is checked before anything is changed.

    {block: BlockDelta} + [AdaptableBlock] --check_deltas--> number of virtual positions, or an InvalidRequest
                                                             that names the block, the linear and both shapes

It knows shapes only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from swarm.adapters.delta import LINEAR_TENSORS, BlockDelta, LinearDelta
from swarm.adapters.layout import BlockShape, LinearShape
from swarm.errors import InvalidRequest
from swarm.server.blocks.attention import LayerAttention
from swarm.server.blocks.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptableBlock:
    """What adapters see of a block."""

    index: int
    shape: BlockShape
    sites: Sequence[Site]
    attention: LayerAttention | None
    stateful: bool


def block_of(blocks: Mapping[int, AdaptableBlock], index: int) -> AdaptableBlock:
    """One block of a span.

    Raises:
        InvalidRequest: it is not in the span.
    """
    block = blocks.get(index)
    if block is None:
        raise InvalidRequest(f"block {index} is not among {min(blocks)}:{max(blocks) + 1}")
    return block


def check_deltas(deltas: Mapping[int, BlockDelta], blocks: Mapping[int, AdaptableBlock]) -> int:
    """How many virtual positions an adapter has that fits these blocks.

    Raises:
        InvalidRequest: it doesn't fit; names what.
    """
    lengths = set()
    for index, delta in deltas.items():
        block = block_of(blocks, index)
        for path, linear in delta.linears.items():
            _check_linear(f"adapter, block {index}: {path}", linear, block.shape.linears.get(path))
        lengths |= {it.shape[0] for it in _check_virtual(block, delta)}
        if delta.prefix_k_PKD is not None and any(it.stateful for it in blocks.values()):
            raise InvalidRequest("adapter with a prefix, whose positions would go through recurrent states here")
    if len(lengths) > 1:
        raise InvalidRequest(f"adapter has {min(lengths)} virtual positions in one place, {max(lengths)} in another")
    return lengths.pop() if lengths else 0


def _check_linear(where: str, linear: LinearDelta, shape: LinearShape | None) -> None:
    if shape is None:
        raise InvalidRequest(f"{where} is no linear here that adapters may change")
    inputs, outputs, rank = shape.num_inputs, shape.num_outputs, linear.rank
    expected = {
        "a_rI": (rank, inputs),
        "b_Or": (outputs, rank),
        "input_scale_I": (inputs,),
        **dict.fromkeys(("output_scale_O", "magnitude_O", "bias_O", "base_bias_O"), (outputs,)),
    }
    for name in LINEAR_TENSORS.values():
        tensor: Tensor | None = getattr(linear, name)
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise InvalidRequest(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
    if (linear.a_rI is None) != (linear.b_Or is None) or (linear.magnitude_O is not None and linear.a_rI is None):
        raise InvalidRequest(f"{where}: has only one of A and B, or a magnitude without them")


def _check_virtual(block: AdaptableBlock, delta: BlockDelta) -> list[Tensor]:
    """The tensors of virtual positions, of right shapes."""
    where = f"adapter, block {block.index}"
    k_PKD, v_PKE = delta.prefix_k_PKD, delta.prefix_v_PKE
    if (k_PKD is None) != (v_PKE is None):
        raise InvalidRequest(f"{where}: a prefix needs keys and values")
    if k_PKD is not None and v_PKE is not None:
        if block.shape.kv_shape is None:
            raise InvalidRequest(f"{where}: the block has no attention, so it can have no prefix")
        heads, key_width, value_width = block.shape.kv_shape
        if tuple(k_PKD.shape[1:]) != (heads, key_width) or tuple(v_PKE.shape[1:]) != (heads, value_width):
            raise InvalidRequest(
                f"{where}: prefix of {tuple(k_PKD.shape)} and {tuple(v_PKE.shape)}, expected heads and widths "
                f"{(heads, key_width)} and {(heads, value_width)}"
            )
    if delta.prompt_PH is not None and tuple(delta.prompt_PH.shape[1:]) != (block.shape.hidden_size,):
        raise InvalidRequest(
            f"{where}: prompt of {tuple(delta.prompt_PH.shape)}, hidden size {block.shape.hidden_size}"
        )
    return [tensor for tensor in (k_PKD, v_PKE, delta.prompt_PH) if tensor is not None]
