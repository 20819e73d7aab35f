"""What one adapter changes in one block, whatever method it was trained with.

    each linear:  y = o * (W (i * x) + c + s * B (A x)) + b           W, c: the base's own weight and bias (or a new c)
    the block:    keys and values of the first positions, and what is added to their hidden states

    LoRA, rsLoRA A, B, s   AdaLoRA, VeRA folded into A, B, s   DoRA A, B, s, magnitude (o, b follow from W)
    IA3 i or o             BitFit b, or a new c                prefix tuning keys, values   deep prompts
    prompt tuning changes no block: its embeddings stay with the client

Values on their own: this module knows neither files nor bytes (`format`), nor how a server applies them. Legend: I and
O columns of a linear's input and output, r rank, P positions, H hidden size, K heads of keys, D and E their widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

MAX_RANK = 512
"""Of one linear; a larger one is no adapter."""
MAX_PREFIX = 4096
"""Positions that an adapter may put before a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearDelta:
    """What an adapter does to one linear; what is None is left out of the formula."""

    a_rI: Tensor | None = None
    b_Or: Tensor | None = None
    scale: float = 1.0
    """s: alpha / r, or alpha / sqrt(r) for rsLoRA. Only with A and B."""
    input_scale_I: Tensor | None = None
    output_scale_O: Tensor | None = None
    magnitude_O: Tensor | None = None
    """DoRA: the norm of each row of W + s B A; the server derives o = magnitude / norm, and leaves c unscaled."""
    bias_O: Tensor | None = None
    """b."""
    base_bias_O: Tensor | None = None
    """What c becomes, where training has changed the base's own bias; with a magnitude, too, it is not scaled."""

    @property
    def rank(self) -> int:
        """0 where there are no low-rank matrices."""
        return 0 if self.a_rI is None else self.a_rI.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by the name that they have in a file."""
        named = {name: getattr(self, attribute) for name, attribute in LINEAR_TENSORS.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


LINEAR_TENSORS = {
    "lora_A": "a_rI",
    "lora_B": "b_Or",
    "input_scale": "input_scale_I",
    "output_scale": "output_scale_O",
    "magnitude": "magnitude_O",
    "bias": "bias_O",
    "base_bias": "base_bias_O",
}
"""Name in a shard -> attribute of LinearDelta."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockDelta:
    """What an adapter does to one block."""

    linears: Mapping[str, LinearDelta] = field(default_factory=dict)
    """By path in the layer, such as "self_attn.q_proj"."""
    prefix_k_PKD: Tensor | None = None
    """Keys of positions [0, P), as they stand in the cache: nothing is done to them any more."""
    prefix_v_PKE: Tensor | None = None
    prompt_PH: Tensor | None = None
    """Added to the hidden states of positions [0, P) where they enter the block."""

    def tensors(self) -> list[Tensor]:
        """All of them, linears by path: in an order that both ends of a wire agree about."""
        own = (self.prefix_k_PKD, self.prefix_v_PKE, self.prompt_PH)
        linears = [tensor for _, linear in sorted(self.linears.items()) for tensor in linear.tensors().values()]
        return [*linears, *(tensor for tensor in own if tensor is not None)]

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())
