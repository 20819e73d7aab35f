"""Full-precision linear layers in the layout in which the CPU's matrix product wants them.

torch hands a [out, in] weight to a general product that is made for many rows. oneDNN's own blocked layout, prepared
once at load, needs about the same time for 1, 2 or 4 rows, which is what batching the decode steps of several users is
about. One core, 15 blocks of SmolLM2-135M in fp32, ms by rows of the batch:

    rows                        1     2     4     8    16    32
    [out, in], columns packed  15.7  22.6  32.3  40.3  48.1  69.9
    oneDNN's layout            18.2  21.9  17.2  21.9  29.9  48.4

It knows nothing of models or formats; `swarm.server.quantization` decides what is packed.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ROWS = 32
"""Rows for which the layout is chosen; it is at most a few percent worse for others (1 to 128 tried)."""


def packs(layer: nn.Module) -> bool:
    """Whether the linears of a loaded layer can be packed: fp32 on a CPU, and a torch with oneDNN."""
    parameter = next(layer.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PackedLinear(nn.Module):
    """x @ W^T + b in fp32 on the CPU. The weight exists in oneDNN's layout only.

    Args:
        weight: [out, in], fp32, on the CPU.
        bias: [out].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return differentiable(input, self)
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """What `forward` computes, without gradients."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return product

    def dequantize(self) -> Tensor:
        """[out, in], bit for bit what was packed."""
        dense: Tensor = self._packed.to_dense()
        return dense

    @property
    def num_bytes(self) -> int:
        return self.out_features * self.in_features * 4


class FrozenLinear(Protocol):
    """A linear whose weight is in a format of its own."""

    def product(self, input: Tensor) -> Tensor:
        """x . W^T + b, without gradients."""

    def dequantize(self) -> Tensor:
        """W [out, in], made anew."""


def differentiable(input: Tensor, linear: FrozenLinear) -> Tensor:
    """`linear.product(input)`, bit for bit what it gives without gradients, and differentiable in the input."""
    rows: Tensor = _FrozenProduct.apply(input.flatten(0, -2), linear)  # type: ignore[no-untyped-call]
    result: Tensor = rows.unflatten(0, input.shape[:-1])  # as a view that is made here, a layer may change it in place
    return result


class _FrozenProduct(torch.autograd.Function):
    """Forth by the linear's own product, back by its dequantised weight, which is never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(input)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.linear.dequantize().to(gradient.dtype), None
