"""Adapters in the linears of a block while it is trained on: the same formula as in `sites`, differentiable.

    rows of part after part --base product--> y --each part's own columns and delta--> o * (y + s * B (A x)) + b

There are few parts in a training pass, each with many rows, so every part's matrices are applied by products of their
own, straight from its tensors: gradients reach these and the inputs. As in PEFT, the norm in DoRA's factor counts as a
constant. The sites of inference are out of the way meanwhile, and are put back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.server.blocks.adapter_vectors import factor_and_offset
from swarm.server.blocks.sites import Current, Member, Site


class PartRows(NamedTuple):
    """Consecutive rows of one part of a pass."""

    num_rows: int
    delta: BlockDelta | None


@contextmanager
def trained_sites(sites: Sequence[Site], parts: Sequence[PartRows], current: Current) -> Iterator[None]:
    """Within, the sites' products do what the parts' deltas say.

    Args:
        sites: of the block that runs.
        parts: all rows, in order.
        current: of the sites.
    """
    rows, current.rows = current.rows, None
    replaced = []
    try:
        for site in sites:
            linears = [_linears_of(site, part.delta) for part in parts]
            if any(linears):
                own = vars(site.product)
                replaced.append((own, own.get("forward")))
                own["forward"] = _TrainedSite(site, [part.num_rows for part in parts], linears)
        yield
    finally:
        for own, forward in replaced:
            own.pop("forward")
            if forward is not None:
                own["forward"] = forward
        current.rows = rows


def _linears_of(site: Site, delta: BlockDelta | None) -> dict[Member, LinearDelta]:
    if delta is None:
        return {}
    return {member: delta.linears[member.path] for member in site.members if member.path in delta.linears}


class _TrainedSite:
    """Stands for the forward of a site's product."""

    def __init__(self, site: Site, counts: Sequence[int], linears: Sequence[Mapping[Member, LinearDelta]]):
        self._site, self._counts, self._linears = site, list(counts), linears

    def __call__(self, input: Tensor) -> Tensor:
        x_TI = input if input.dim() == 2 else input.flatten(0, -2)
        y_TO = self._site.multiply(x_TI)
        outputs = [
            self._changed(x_nI, y_nO, linears) if linears else y_nO
            for x_nI, y_nO, linears in zip(
                x_TI.split(self._counts), y_TO.split(self._counts), self._linears, strict=True
            )
        ]
        y_TO = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return y_TO if input.dim() == 2 else y_TO.view(*input.shape[:-1], -1)

    def _changed(self, x_nI: Tensor, y_nO: Tensor, linears: Mapping[Member, LinearDelta]) -> Tensor:
        """One part's rows; members side by side."""
        parts = []
        for member in self._site.members:
            width = member.shape.num_outputs
            own_nO, linear = y_nO.narrow(1, member.column, width), linears.get(member)
            if linear is not None:
                if linear.input_scale_I is not None:
                    scaled_nI = (x_nI * linear.input_scale_I).to(x_nI.dtype)
                    own_nO = self._site.multiply(scaled_nI).narrow(1, member.column, width)
                own_nO = _change(self._site, member, linear, x_nI, own_nO)
            parts.append(own_nO)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _change(site: Site, member: Member, linear: LinearDelta, x_nI: Tensor, y_nO: Tensor) -> Tensor:
    dtype = y_nO.dtype
    if linear.a_rI is not None and linear.b_Or is not None:
        h_nr = x_nI.to(linear.a_rI.dtype) @ linear.a_rI.t()
        y_nO = y_nO + linear.scale * (h_nr @ linear.b_Or.t())
    factor_O, offset_O = factor_and_offset(site, member, linear, y_nO.device)
    if factor_O is not None:
        y_nO = y_nO * factor_O
    if offset_O is not None:
        y_nO = y_nO + offset_O
    return y_nO.to(dtype)
