"""Packed fp32 linears: the same numbers, each row for itself, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swarm.server.packing import PackedLinear, packs
from swarm.server.quantization import quantize


def make(outputs: int, inputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(outputs * 1000 + inputs)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 40), st.booleans())
def test_products_are_those_of_the_plain_linear(outputs, inputs, rows, bias):
    """Any shape and number of rows, none included, to fp32 rounding; the weight itself comes back bit for bit."""
    plain = make(outputs, inputs, bias)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(1, rows, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.dequantize(), plain.weight)


@pytest.mark.parametrize("others", [0.0, 1e6, float("inf"), float("nan")])
def test_a_row_does_not_depend_on_its_neighbours(others):
    """Whatever other sessions put in the batch, a row's result stays."""
    plain = make(48, 64)
    packed = PackedLinear(plain.weight, plain.bias)
    row = torch.randn(1, 64)
    with torch.inference_mode():
        batched = packed(torch.cat([torch.full((3, 64), others), row]))[3:]
        torch.testing.assert_close(batched, packed(row), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_inputs():
    """Training through a packed layer gives the plain layer's input gradients."""
    plain = make(48, 64)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (packed(x) ** 2).sum().backward()
    (plain(y) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_outputs_are_the_same_bits_with_and_without_gradients():
    """A training pass that is repeated without keeping its graph gives nothing else."""
    packed = PackedLinear(make(48, 64).weight, make(48, 64).bias)
    x = torch.randn(5, 64)
    assert torch.equal(packed(x.clone().requires_grad_()), packed(x))


def test_only_full_precision_layers_on_a_cpu_are_packed():
    """fp32 linears that the layer calls are replaced; 16-bit layers stay as they are."""
    layer = nn.Sequential(make(32, 32), nn.ReLU(), make(32, 32))
    quantize(layer, "none", lambda: layer(torch.zeros(1, 32)))
    assert [type(module) for module in layer] == [PackedLinear, nn.ReLU, PackedLinear]
    assert not packs(nn.Sequential(make(32, 32)).to(torch.bfloat16))
