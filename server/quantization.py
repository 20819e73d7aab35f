"""Linear layers in the format of a server: a table (format, kind of device) -> module, and how a layer is converted.

    none | CPU    fp32 in oneDNN's blocked layout (server/packing.py), other dtypes as they are
    int8 | CPU    weights and activations in 8 bits, torch's FBGEMM product     (Int8Linear; measured below)
    int8 | CUDA   bitsandbytes LLM.int8() kernels without outlier columns
    nf4  | CPU    4-bit NormalFloat in blocks of 64, dequantised for each product (Nf4Linear)
    nf4  | CUDA   bitsandbytes Linear4bit with double quantisation

Every form is row-independent: a row's result doesn't depend on the rows of other sessions in the batch. So activations
are scaled row by row, and LLM.int8()'s outlier columns, which are chosen by looking at the whole batch, are off. Every
form passes gradients to its inputs, by its dequantised weight, while its outputs stay what they are without gradients:
so training sees the numbers that will be served. Experts of a mixture that are 3-D parameters stay in 16 or 32 bits.

One thread, AVX-512 VNNI, us per product of 1 / 8 / 64 rows, 4096 x 4096: fp32 2960 / 8300 / 26550, FBGEMM 500 / 750
/ 5300, torch._int_mm 780 / 6280 / 10690, torch._weight_int8pack_mm in bf16 1250 / 3750 / 26950, bitsandbytes int8
46800 for 1 row. It knows nothing of models.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarm.errors import ConfigError
from swarm.server.packing import PackedLinear, differentiable, packs

logger = logging.getLogger(__name__)

FORMATS = ("none", "int8", "nf4")
"""What `quantize` takes."""

CREST = {127: 14.0, 63: 6.0}
"""Largest magnitude of a row over its root mean square from which on Int8Linear spends two codes on its elements, by
activation levels. CPUs with 7-bit activations need it sooner."""

_FBGEMM: Callable[[Tensor, float, int, Any], Tensor]
_FBGEMM = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
"""(rows, activation scale, zero point, packed weight) -> rows . weight^T in fp32."""
_TINY = 1e-12
_NF4_BLOCK = 64
_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""The 16 values of NormalFloat 4 (bitsandbytes' table)."""
_NF4_PAIRS = torch.stack([_NF4.repeat_interleave(16), _NF4.repeat(16)], 1).view(torch.float64)[:, 0].contiguous()
"""Values of both codes of each byte, two fp32 in the 8 bytes of one element: moved at once (0.6 instead of 3 ms for
3072 x 576)."""


def quantize(layer: nn.Module, format: str, run: Callable[[], object]) -> float:
    """Replace the linear layers of a loaded block by quantised ones, one at a time.

    Args:
        layer: frozen, in eval mode, on its device.
        format: one of FORMATS.
        run: runs the layer once; only linears that are really called are replaced (some layers use `linear.weight`
            directly, and a router's few outputs aren't worth it).

    Returns:
        The share of the layer's weights that is quantised now, 0..1.

    Raises:
        ConfigError: no such format on the layer's device.
    """
    if format == "none" and not packs(layer):
        return 0.0
    called: dict[nn.Module, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.setdefault(module))
        for module in layer.modules()
        if weight_of(module) is not None
    ]
    run()
    for hook in hooks:
        hook.remove()
    total = sum(parameter.numel() for parameter in layer.parameters())
    done = 0
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            weight = weight_of(child)
            if child in called and weight is not None and min(weight.shape) >= 16 and name not in ROUTERS:
                done += weight.numel()
                setattr(parent, name, quantized_linear(weight.detach(), _bias_of(child), format))
    return done / max(1, total) if format != "none" else 0.0


ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of linears that choose experts: small, and a wrong choice costs more than a rounded weight."""


def quantized_linear(weight: Tensor, bias: Tensor | None, format: str) -> nn.Module:
    """The module that stands for `weight` [out, in] and `bias` [out] in `format` on the weight's device.

    Raises:
        ConfigError: there is no such form.
    """
    make = _TABLE.get((format, weight.device.type))
    if make is None:
        known = ", ".join(sorted({f"{name} on {kind}" for name, kind in _TABLE}))
        raise ConfigError(f"no quantisation {format!r} on {weight.device.type}; there is {known}")
    return make(weight, bias)


class Int8Linear(nn.Module):
    """8-bit weights with a scale per output; activations in one or two 8-bit codes with a scale per row, on the CPU.

    A row whose largest magnitude stands out of it (more than CREST times its root mean square) loses too much in 8
    bits. It is written as (h + l / 2L) * s / L with two codes h, l in -L..L, and both are rows of the same product.
    Perplexity of SmolLM2-135M on WikiText-2 against fp32: one code 1.032, two codes for rows beyond 14 times 1.009,
    beyond 10 times 1.003, for all 1.001; with 7-bit activations beyond 14 times 1.028, beyond 6 times 1.001. A second
    row costs no weight traffic: all linears of 30 blocks take 7.9 ms for 1, 2 or 4 rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scales = (weight.float().abs().amax(1) / 127).clamp_(min=_TINY)
        codes = (weight.float() / scales[:, None]).round_().to(torch.int8).contiguous()
        self._packed = _pack(codes, scales)
        self._levels = activation_levels()
        self._max_peak = CREST[self._levels] / math.sqrt(self.in_features)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return differentiable(input, self) if torch.is_grad_enabled() and input.requires_grad else self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """What `forward` computes, without gradients."""
        rows = input if input.dtype == torch.float32 else input.float()
        if rows.dim() != 2:
            rows = rows.reshape(-1, self.in_features)
        product = self._product_of(rows)
        if self.bias is not None:
            product = product.add_(self.bias)
        if input.dim() != 2:
            product = product.view(*input.shape[:-1], self.out_features)
        return product if input.dtype == torch.float32 else product.to(input.dtype)

    def _product_of(self, rows: Tensor) -> Tensor:
        if rows.shape[0] > 1:
            return self._product_of_many(rows)
        lowest, highest = torch.aminmax(rows)
        peak = max(-lowest.item(), highest.item())
        if not 0 < peak < math.inf:
            return self._product_of_many(rows)
        if peak <= self._max_peak * torch.linalg.vector_norm(rows).item():
            return _FBGEMM(rows, peak / self._levels, self._levels + 1, self._packed)
        high, low = _FBGEMM(self._two_codes(rows * (self._levels / peak)), 1.0, self._levels + 1, self._packed).unbind()
        return torch.add(high, low, alpha=0.5 / self._levels).mul_(peak / self._levels).unsqueeze_(0)

    def _product_of_many(self, rows: Tensor) -> Tensor:
        """The same for several rows, of which some may need two codes."""
        peak = rows.abs().amax(-1, True)
        standing_out = (
            (peak > self._max_peak * torch.linalg.vector_norm(rows, 2, -1, True)).flatten().nonzero().flatten()
        )
        codes = rows * (self._levels / peak)  # zeros become NaN, then some code, and that times 0
        count, scale = rows.shape[0], peak / self._levels
        if len(standing_out) == 0:
            return _FBGEMM(codes, 1.0, self._levels + 1, self._packed).mul_(scale)
        both = self._two_codes(codes.index_select(0, standing_out))
        product = _FBGEMM(torch.cat([codes, both[len(standing_out) :]]), 1.0, self._levels + 1, self._packed)
        result = product[:count].index_add(0, standing_out, product[count:], alpha=0.5 / self._levels)
        return result.mul_(scale)

    def _two_codes(self, scaled: Tensor) -> Tensor:
        high = scaled.round()
        return torch.cat((high, scaled.sub_(high).mul_(2 * self._levels)))

    def dequantize(self) -> Tensor:
        """[out, in] fp32."""
        weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        return weight

    @property
    def num_bytes(self) -> int:
        return self.out_features * (self.in_features + 8)


class Nf4Linear(nn.Module):
    """4-bit NormalFloat weights in blocks of 64 (Dettmers et al., QLoRA, 2023, section 3), dequantised when used.

    Two codes per byte, the first one in the high half. Not through bitsandbytes, whose CPU form (0.50) reads the wrong
    scales where a row is no multiple of the block: an error of 0.23 instead of 0.09 for 64 x 96.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
        scales = blocks.abs().amax(1, True).clamp_(min=_TINY)
        codes = torch.bucketize((blocks / scales).flatten(), (_NF4[1:] + _NF4[:-1]) / 2).to(torch.uint8)
        self.codes = nn.Buffer((codes[0::2] << 4) | codes[1::2])
        self.scales = nn.Buffer(scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return differentiable(input, self) if torch.is_grad_enabled() and input.requires_grad else self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """What `forward` computes, without gradients."""
        return F.linear(input, self.dequantize(), self.bias)

    def dequantize(self) -> Tensor:
        """[out, in] in the dtype of the original weight."""
        pairs = _NF4_PAIRS.index_select(0, self.codes.int()).view(torch.float32)
        values = pairs.view(-1, _NF4_BLOCK).mul_(self.scales)
        count = self.out_features * self.in_features
        return values.view(-1)[:count].view(self.out_features, self.in_features).to(self.dtype)

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + self.scales.numel() * 4


@functools.cache
def activation_levels() -> int:
    """Largest code of an activation: 127, or 63 on CPUs whose 8-bit products saturate at 16 bits (AVX2 without VNNI).

    Found out by the worst case: 64 products of 127 and 255 in one sum.
    """
    packed = _pack(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16))
    rows = torch.full((1, 64), 127.0)
    product = _FBGEMM(rows, 1.0, 128, packed)
    return 127 if float(product[0, 0]) == 64.0 * 127 * 127 else 63


def _pack(codes: Tensor, scales: Tensor) -> Any:
    """FBGEMM's own layout of an 8-bit weight."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        # torch means to drop tensors of quantised dtypes some day; it has no other way to FBGEMM in 2.11 to 2.13
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*", category=UserWarning)
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def _bitsandbytes_int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    import bitsandbytes as bnb

    # it says on every call that it casts to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    linear = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False,
                                 threshold=0.0, device="meta")  # fmt: skip
    linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return _placed(linear, weight, bias)


def _bitsandbytes_nf4(weight: Tensor, bias: Tensor | None) -> nn.Module:
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=weight.dtype,
                               compress_statistics=True, quant_type="nf4", device="meta")  # fmt: skip
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    )
    return _placed(linear, weight, bias)


def _placed(linear: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Quantisation happens when bitsandbytes' parameter is moved to the device."""
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    placed: nn.Module = linear.to(weight.device)
    return placed.requires_grad_(False).eval()


def _bias_of(linear: Any) -> Tensor | None:
    bias: Tensor | None = linear.bias
    return bias


def dense_weight(module: nn.Module) -> Tensor:
    """[out, in] in fp32 of a linear in any format: the weight that its products come from."""
    if isinstance(module, PackedLinear | Int8Linear | Nf4Linear):
        return module.dequantize().float()
    linear: Any = module
    kind = type(module).__name__
    if kind == "Linear4bit":
        import bitsandbytes as bnb

        dequantized: Tensor = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return dequantized.float()
    if kind == "Linear8bitLt":
        scales: Tensor = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
        codes: Tensor = linear.state.CB if linear.state.CB is not None else linear.weight.data
        return codes.float() * (scales / 127)[:, None]
    weight = weight_of(module)
    assert weight is not None, f"{kind} is no linear"
    return weight.detach().float()


def weight_of(module: nn.Module) -> Tensor | None:
    """[out, in] of a linear layer: nn.Linear and its subclasses, or GPT-2's Conv1D, which keeps [in, out]."""
    linear: Any = module
    if isinstance(module, nn.Linear):
        return module.weight
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return linear.weight.t() if is_conv1d else None


_TABLE: dict[tuple[str, str], Callable[[Tensor, Tensor | None], nn.Module]] = {
    ("none", "cpu"): PackedLinear,
    ("int8", "cpu"): Int8Linear,
    ("int8", "cuda"): _bitsandbytes_int8,
    ("nf4", "cpu"): Nf4Linear,
    ("nf4", "cuda"): _bitsandbytes_nf4,
}
