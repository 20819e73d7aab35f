"""The head gives the same logits in every layout, and close ones in every format."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swarm.client import head as head_module
from swarm.client.head import CastHead, Int8Head, PackedHead, choose_layout, fastest, fit_head, pack
from swarm.client.model import distribute
from swarm.errors import InvalidRequest
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockService


class Clock:
    """Says how long the products take that are measured: the head as it is, then another layout, then a third."""

    def __init__(self, *times_s: float):
        self.times = list(times_s)

    def __call__(self, compute: object) -> float:
        return self.times.pop(0)


def big_linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 16384, bias=bias).requires_grad_(False)


def test_columns_are_chosen_when_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values stay, only the order in memory changes; products agree to rounding."""
    linear, hidden = big_linear(bias=True), torch.randn(2, 1, 128)
    before, expected = linear.weight.clone(), linear(hidden)
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, 4e-3))
    assert choose_layout(linear) == "columns"
    assert linear.weight.stride() == (1, 16384)
    assert torch.equal(linear.weight, before)
    torch.testing.assert_close(linear(hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns_s", [9e-3, 8.5e-3])
def test_rows_stay_when_columns_gain_little(columns_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain within the noise changes nothing."""
    linear = big_linear()
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, columns_s))
    assert choose_layout(linear) == "rows"
    assert linear.weight.is_contiguous()


def test_tied_embeddings_see_the_new_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and embeddings stay one tensor, and lookups stay exact."""
    linear = big_linear()
    embedding = nn.Embedding(16384, 128)
    embedding.weight = linear.weight
    ids = torch.tensor([[0, 5, 16383]])
    expected = embedding(ids).clone()
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, 4e-3))
    choose_layout(linear)
    assert embedding.weight is linear.weight
    assert torch.equal(embedding(ids), expected)


needs_packing = pytest.mark.skipif(pack(big_linear(), torch.float32, is_tied=False) is None, reason="needs oneDNN")


@needs_packing
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_packed_layout_is_chosen_when_it_is_faster(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values stay; a matrix that is tied to the embeddings stays theirs, another one exists packed only."""
    linear, hidden = big_linear(bias=True), torch.randn(2, 3, 128)
    weight, expected = linear.weight.clone(), linear(hidden)
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, 4e-3))
    head = fastest(linear, torch.float32, is_tied=is_tied)
    assert isinstance(head, PackedHead)
    assert (head.weight is linear.weight) is is_tied
    assert torch.equal(head.weight, weight)
    torch.testing.assert_close(head(hidden), expected, atol=1e-5, rtol=1e-5)
    del linear
    assert sum(it.numel() for it in head.parameters()) == 16384 * (129 if is_tied else 1)


@needs_packing
def test_the_packed_layout_must_be_faster_and_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives way to columns when it gains little, and is not made when it would be a second copy of a huge matrix."""
    linear = big_linear()
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, 8.5e-3, 9e-3, 4e-3))
    assert fastest(linear, torch.float32, is_tied=False) is linear
    assert linear.weight.stride() == (1, 16384)
    monkeypatch.setattr(head_module, "_MAX_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(head_module, "_best_s", Clock(9e-3, 9e-3))
    assert fastest(linear, torch.float32, is_tied=True) is linear


@needs_packing
def test_a_packed_head_passes_gradients_on() -> None:
    """The packed product has none; where they are wanted, the plain one is used."""
    linear = big_linear(bias=True)
    head = PackedHead(linear, torch.float32, is_tied=False)
    hidden = torch.randn(2, 128, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(hidden).square().sum(), hidden)
    (found,) = torch.autograd.grad(head(hidden).square().sum(), hidden)
    torch.testing.assert_close(found, expected)


def test_what_can_not_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that oneDNN refuses on this CPU, and a torch without it."""
    linear = big_linear()
    assert pack(linear, torch.float64, is_tied=False) is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack(linear, torch.float32, is_tied=False) is None
    assert isinstance(fastest(linear, torch.bfloat16, is_tied=False), CastHead)


@pytest.mark.parametrize(("name", "bound"), [("float16", 2e-3), ("bfloat16", 1e-2), ("int8", 3e-2)])
def test_reduced_formats_are_close(pair: Pair, name: str, bound: float) -> None:
    """The error stays within the documented part of the largest logit, and the model still generates."""
    service = LocalBlockService(pair.local)
    model = distribute(pair.distributed.checkpoint, service, dtype=torch.float32, head=name)  # type: ignore[arg-type]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, expected = model(ids).logits, pair.local(ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < bound * expected.abs().max()
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


def test_int8_head_adds_the_bias() -> None:
    """A head with a bias keeps it."""
    linear, hidden = big_linear(bias=True), torch.randn(3, 128)
    linear.bias.fill_(100.0)
    expected = F.linear(hidden, linear.weight) + 100.0
    torch.testing.assert_close(Int8Head(linear)(hidden), expected, atol=1.0, rtol=0)


def test_unknown_formats_and_heads_are_refused(pair: Pair) -> None:
    """A format that does not exist, and a head that is no matrix."""
    with pytest.raises(InvalidRequest, match="int4"):
        fit_head(pair.distributed, "int4")  # type: ignore[arg-type]

    class Odd:
        def get_output_embeddings(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(InvalidRequest, match="no plain matrix"):
        fit_head(Odd(), "int8")  # type: ignore[arg-type]
