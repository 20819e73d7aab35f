"""Adapters change those linears of a layer that are given the rows of the step, and only while they are wanted."""

import pytest
import torch
from torch import nn

from swarm.adapters.layout import LinearShape
from swarm.server.blocks.fusion import GroupMember, LinearGroup
from swarm.server.blocks.sites import Current, RowAdapters, adaptable_linears, find_sites

ROWS = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """Linears that see the step's rows, and linears that don't."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 24)
        self.after = nn.Linear(24, 16)
        self.reversed = nn.Linear(16, 16)
        self.some = nn.Linear(16, 16)
        self.pooled = nn.Linear(16, 16)
        self.twice = nn.Linear(16, 16)
        self.by_weight = nn.Linear(16, 16)
        self.experts = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        x = x + self.after(self.q(x).tanh())
        x = x + self.reversed(x.flip(1)).flip(1) + self.twice(self.twice(x)) + x @ self.by_weight.weight
        x = x + self.pooled(x.mean(1, keepdim=True)) + self.experts[0](x)
        return x + self.some(x[:, ::2]).mean()


def test_linears_that_get_the_rows_of_the_step_are_found():
    """Others are given more, fewer or other rows, are called twice, or not at all."""
    layer = Layer()
    found = adaptable_linears(layer, lambda rows: layer(ROWS[:, rows]))
    assert found == {
        "q": LinearShape(num_inputs=16, num_outputs=24),
        "after": LinearShape(num_inputs=24, num_outputs=16),
    }
    assert not any(module._forward_pre_hooks for module in layer.modules())


def site_of_a_group():
    layer = nn.Module()
    members = [nn.Linear(16, 8), nn.Linear(16, 4)]
    group = LinearGroup(members)
    layer.group = group
    layer.k, layer.v = (GroupMember(group, index, it) for index, it in enumerate(members))
    shapes = {"v": LinearShape(num_inputs=16, num_outputs=4), "k": LinearShape(num_inputs=16, num_outputs=8)}
    current = Current()
    (site,) = find_sites(layer, shapes, current, torch.device("cpu"))
    return layer, site, current


def test_the_members_of_a_group_share_a_site():
    """In the order of their columns."""
    _, site, _ = site_of_a_group()
    assert [(member.path, member.column) for member in site.members] == [("k", 0), ("v", 8)]
    assert site.width == 12 and not site.used


@torch.inference_mode()
def test_an_installed_site_runs_for_module_calls_and_direct_ones():
    """Both `module(x)` and `module.forward(x)` find it, for rows with adapters only, until it is removed."""
    layer, site, current = site_of_a_group()
    x = ROWS[0]
    before = site.product(x)
    site.output.put(7, torch.full((12,), 2.0), None)
    site.install()
    assert torch.equal(site.product(x), before)
    current.rows = RowAdapters([-1, 7, 7, -1, 7])
    expected = before * torch.tensor([1.0, 2, 2, 1, 2])[:, None]
    assert torch.equal(site.product(x), expected) and torch.equal(site.product.forward(x), expected)
    assert torch.equal(layer.v(x), expected[:, 8:]) if layer.k(x) is not None else False
    current.rows = RowAdapters([-1] * 5)
    assert torch.equal(site.product(x), before)
    site.remove()
    assert "forward" not in site.product.__dict__


@torch.inference_mode()
def test_inputs_are_scaled_for_one_member_of_a_group():
    """The others keep the product of the inputs as they are."""
    layer, site, current = site_of_a_group()
    x, scale = ROWS[0], torch.rand(16)
    site.inputs[1].put(3, scale, None)
    site.install()
    current.rows = RowAdapters([3, -1, 3, 3, -1])
    with_k, with_v = layer.k(x), layer.v(x)
    weight, bias = site.product.weight, site.product.bias
    scaled = torch.where(torch.tensor([1, 0, 1, 1, 0])[:, None] > 0, x * scale, x)
    torch.testing.assert_close(with_k, x @ weight[:8].t() + bias[:8])
    torch.testing.assert_close(with_v, scaled @ weight[8:].t() + bias[8:])


def test_other_rows_than_the_step_s_are_an_error():
    """Never the adapter of another row, even if a layer behaves otherwise than it did when it was probed."""
    _, site, current = site_of_a_group()
    site.output.put(0, torch.ones(12), None)
    site.install()
    current.rows = RowAdapters([0, 0])
    with pytest.raises(RuntimeError, match="k was given 5 rows of 2"):
        site.product(ROWS[0])
