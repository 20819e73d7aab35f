"""What an adapter does to a product beside its rank rows: i, o and b of y = o * (W (i * x) + c + s B (A x)) + b.

    LinearDelta, the base's own weight and bias --> o, b side by side for all members of a site, i of each --> its pools

Here is what only a server can work out, since it has the base: DoRA's o from the norms of W + s B A (of the dequantised
W, where it is quantised), and b from a bias that training has changed. It does not know where rank rows lie.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from swarm.adapters.delta import LinearDelta
from swarm.server.blocks.rank_pool import Linears
from swarm.server.blocks.sites import Member, Site
from swarm.server.quantization import dense_weight


def put_vectors(handle: int, site: Site, linears: Linears, device: torch.device) -> None:
    """Give a site what an adapter has for it beside its rank rows."""
    factors: dict[int, Tensor] = {}
    offsets: dict[int, Tensor] = {}
    for index, member in enumerate(site.members):
        linear = linears.get(member.path)
        if linear is None or not _has_vectors(linear):
            continue
        if linear.input_scale_I is not None:
            site.inputs[index].put(handle, linear.input_scale_I.to(device), None)
        factor_O, offset_O = factor_and_offset(site, member, linear, device)
        if factor_O is not None:
            factors[index] = factor_O
        if offset_O is not None and offset_O.any():
            offsets[index] = offset_O
    if factors or offsets:
        site.output.put(handle, _joined(site, factors, 1.0, device), _joined(site, offsets, 0.0, device))


def _has_vectors(linear: LinearDelta) -> bool:
    vectors = (linear.input_scale_I, linear.output_scale_O, linear.magnitude_O, linear.bias_O, linear.base_bias_O)
    return any(it is not None for it in vectors)


def factor_and_offset(
    site: Site, member: Member, linear: LinearDelta, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """o and b of y = o * (what the base and the rank rows give) + b; differentiable, but for the norm in DoRA's o."""
    columns = slice(member.column, member.column + member.shape.num_outputs)
    bias: Tensor | None = getattr(site.product, "bias", None)
    base_O = torch.zeros(member.shape.num_outputs, device=device) if bias is None else bias.detach()[columns].float()
    new_O = base_O if linear.base_bias_O is None else linear.base_bias_O.to(device, torch.float32)
    factor_O, offset_O = None, None
    if linear.output_scale_O is not None:
        factor_O = linear.output_scale_O.to(device, torch.float32)
        offset_O = factor_O * (new_O - base_O)
    elif linear.magnitude_O is not None:
        factor_O = linear.magnitude_O.to(device, torch.float32) / _norms(site, columns, linear, device)
        offset_O = new_O - factor_O * base_O  # only the product is scaled
    elif linear.base_bias_O is not None:
        offset_O = new_O - base_O
    if linear.bias_O is not None:
        own_O = linear.bias_O.to(device, torch.float32)
        offset_O = own_O if offset_O is None else offset_O + own_O
    return factor_O, offset_O


def _norms(site: Site, columns: slice, linear: LinearDelta, device: torch.device) -> Tensor:
    """Of each row of W + s B A, without making that sum: |w|^2 + 2 s w . (b A) + s^2 |b A|^2."""
    assert linear.a_rI is not None and linear.b_Or is not None
    weight_OI = dense_weight(site.product)[columns].to(device)
    a_rI = linear.a_rI.detach().to(device, torch.float32)
    b_Or = linear.scale * linear.b_Or.detach().to(device, torch.float32)
    squares_O = weight_OI.square().sum(1) + ((2 * (weight_OI @ a_rI.t()) + b_Or @ (a_rI @ a_rI.t())) * b_Or).sum(1)
    return squares_O.clamp(min=0).sqrt()


def _joined(site: Site, parts: Mapping[int, Tensor], neutral: float, device: torch.device) -> Tensor | None:
    """The members' parts side by side."""
    if not parts:
        return None
    return torch.cat(
        [
            parts[index] if index in parts else torch.full((member.shape.num_outputs,), neutral, device=device)
            for index, member in enumerate(site.members)
        ]
    )


def vector_bytes(site: Site, linears: Linears) -> int:
    """What `put_vectors` will take, at most."""
    mine = [(member, linears[member.path]) for member in site.members if member.path in linears]
    factor = any(it.output_scale_O is not None or it.magnitude_O is not None for _, it in mine)
    offset = any(it.bias_O is not None or it.base_bias_O is not None or it.magnitude_O is not None for _, it in mine)
    scales = sum(member.shape.num_inputs for member, it in mine if it.input_scale_I is not None)
    return 4 * (site.width * (factor + offset) + scales)
