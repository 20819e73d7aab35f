"""Quantised linears: near the original, each row for itself, with gradients, and put where they belong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarm.errors import ConfigError
from swarm.server.quantization import Int8Linear, activation_levels, quantize, quantized_linear

ERROR = {"int8": 0.02, "nf4": 0.12}
FORMATS = list(ERROR)


def make_linear(inputs=96, outputs=64, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator) if bias else None


def relative_error(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_products_are_near_the_original(format, bias, rows):
    """One row and many, with and without a bias, in the leading shape that layers use."""
    weight, offset = make_linear(bias=bias)
    x = torch.randn(1, rows, 96, generator=torch.Generator().manual_seed(1))
    result = quantized_linear(weight, offset, format)(x)
    expected = nn.functional.linear(x, weight, offset)
    assert result.shape == expected.shape
    assert relative_error(result, expected) < ERROR[format]


@pytest.mark.parametrize("format", FORMATS)
@given(others=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e6, float("inf"), float("nan")]), max_size=4))
def test_a_row_does_not_depend_on_its_neighbours(format, others):
    """Whatever other sessions put in the batch, even hostile numbers, a row's result stays."""
    linear = quantized_linear(*make_linear(), format)
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(2, 96, generator=generator)
    neighbours = [torch.randn(1, 96, generator=generator) * size for size in others]
    batched = linear(torch.cat([row, *neighbours]))[:2]
    torch.testing.assert_close(batched, linear(row), rtol=0, atol=1e-4)


def test_one_row_alone_is_what_it_is_in_a_batch():
    """The form with fewer operators for a single row differs by rounding only."""
    linear = Int8Linear(*make_linear())
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(3))
    together = linear(rows)
    alone = torch.cat([linear(row[None]) for row in rows])
    assert relative_error(alone, together) < 1e-3


@pytest.mark.parametrize("rows", [1, 4])
def test_a_row_with_an_outlier_is_as_exact_as_others(rows):
    """Large models have hidden channels a hundred times the rest: they must not drown the others' bits."""
    weight, _ = make_linear(1024, bias=False)
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(4))
    x[0, 7] = 500.0
    weight[:, 7] = 0  # all that is left to see is what the outlier does to its neighbours
    assert relative_error(Int8Linear(weight, None)(x), x @ weight.T) < ERROR["int8"]


def test_a_row_of_zeros_gives_the_bias():
    """No division by zero."""
    weight, bias = make_linear()
    for rows in (1, 3):
        torch.testing.assert_close(Int8Linear(weight, bias)(torch.zeros(rows, 96)), bias.expand(rows, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_dtype_of_the_hidden_states_is_kept(format, dtype):
    """Servers with half-precision hidden states can use any format."""
    weight, bias = make_linear()
    linear = quantized_linear(weight.to(dtype), bias.to(dtype), format)
    assert linear(torch.randn(2, 96).to(dtype)).dtype == dtype


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_reach_the_inputs(format):
    """Backward through frozen quantised weights: the gradient of the dequantised product."""
    weight, bias = make_linear()
    linear = quantized_linear(weight, bias, format)
    x = torch.randn(3, 96, requires_grad=True)
    ahead = torch.randn(3, 64)
    linear(x).backward(ahead)
    torch.testing.assert_close(x.grad, ahead @ linear.dequantize())
    assert relative_error(x.grad, ahead @ weight) < ERROR[format]
    assert torch.equal(linear(x), linear(x.detach()))


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_a_quarter_or_less(format):
    """What quantisation is for."""
    weight, bias = make_linear(256, 256)
    linear = quantized_linear(weight, bias, format)
    assert linear.num_bytes < weight.numel() * (1.1 if format == "int8" else 0.6)


def test_activation_codes_never_saturate():
    """The largest codes of both sides give the exact product on this CPU."""
    levels = activation_levels()
    linear = Int8Linear(torch.ones(16, 64), None)
    torch.testing.assert_close(linear(torch.ones(2, 64)), torch.full((2, 16), 64.0), rtol=1e-5, atol=0)
    assert levels in (63, 127)


class Mixture(nn.Module):
    """A layer with everything that needs care."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.conv = Conv1D(48, 64)
        self.gate = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.experts = nn.Parameter(torch.randn(4, 32, 48))
        self.special = type("Special", (nn.Linear,), {})(48, 32)

    def forward(self, x):
        return self.special(self.conv(self.up(x))) + self.gate(x) + x @ self.unused.weight


def test_only_linears_that_are_called_are_replaced():
    """Subclasses and Conv1D too; not routers, not experts, not weights that a layer reads itself."""
    torch.manual_seed(0)
    layer = Mixture().requires_grad_(False)
    x = torch.randn(5, 32)
    before = layer(x)
    share = quantize(layer, "int8", lambda: layer(x))
    replaced = {name for name, module in layer.named_children() if isinstance(module, Int8Linear)}
    assert replaced == {"up", "conv", "special"}
    assert 0.3 < share < 0.7
    assert relative_error(layer(x), before) < 0.02


def test_none_changes_nothing():
    """The default is the plain layer."""
    layer = Mixture()
    assert quantize(layer, "none", lambda: None) == 0.0
    assert type(layer.up) is nn.Linear


def test_an_unknown_format_names_the_known_ones():
    """The message says what there is on which device."""
    with pytest.raises(ConfigError, match=r"'int3' on cpu; there is int8 on cpu"):
        quantized_linear(torch.zeros(16, 16), None, "int3")
