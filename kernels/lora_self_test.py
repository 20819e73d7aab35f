"""A few random batches through a form on its device, against the definition: what a server runs before it trusts one.

    ranks, rows, dtypes --cases--> form.add, gradients --compared with add_lora_reference--> failures, in words

A kernel that is right elsewhere can be wrong on one generation of devices: in a well-known engine, expand with blocks
of 128 columns gives NaN on Hopper. Memory is filled with NaN first, so that what a kernel leaves unwritten shows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraForm, LoraTarget, Side, add_lora_reference

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest magnitude of the expected."""
_RANKS = (1, 8, 16, 40, 128)
_WIDTHS = ((512, (640, 192, 192)), (1088, (512,)))
_BATCHES = {
    "decode rows of all adapters": [0, 1, 2, -1, 3, 4, 2, 0],
    "decode rows of one adapter": [3] * 5,
    "prefill and decode rows": [1] * 150 + [2] * 40 + [-1] * 20 + [0, 4],
}


@torch.no_grad()
def self_test(form: LoraForm, device: torch.device) -> list[str]:
    """What is wrong with a form on a device, in words; empty if nothing is."""
    failures = []
    dtypes = [torch.float32, torch.float16]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        for width, outs in _WIDTHS:
            targets = _targets(width, outs, dtype, device)
            for name, adapters in _BATCHES.items():
                wrong = _check(form, LoraBatch(adapters), targets, dtype, device)
                if wrong is not None:
                    failures.append(f"{name}, {width} to {'+'.join(map(str, outs))} in {dtype}: {wrong}")
    return failures


def _targets(width: int, outs: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[LoraTarget]:
    """Targets whose adapters lie in scattered rows; the last adapter leaves the last target alone."""
    generator = torch.Generator().manual_seed(width)
    targets: list[LoraTarget] = []
    for out in outs:
        order = torch.randperm(sum(_RANKS), generator=generator).tolist()
        ranks: dict[int, AdapterRanks] = {}
        for adapter, rank in enumerate(_RANKS):
            mine, order = order[:rank], order[rank:]
            ranks[adapter] = AdapterRanks(a_rows=mine, b_rows=mine[::-1], scale=0.25 * (adapter + 1))
        if len(targets) == len(outs) - 1 and len(outs) > 1:
            del ranks[len(_RANKS) - 1]
        a_pool, b_pool = (
            (torch.randn(sum(_RANKS), columns, generator=generator) * columns**-0.5).to(device, dtype)
            for columns in (width, out)
        )
        column = sum(target.b_pool_RO.shape[1] for target in targets)
        targets.append(LoraTarget(a_pool_RI=a_pool, b_pool_RO=b_pool, ranks=ranks, column=column))
    return targets


def _check(
    form: LoraForm, batch: LoraBatch, targets: Sequence[LoraTarget], dtype: torch.dtype, device: torch.device
) -> str | None:
    generator = torch.Generator().manual_seed(batch.num_rows)
    columns = sum(target.b_pool_RO.shape[1] for target in targets)
    x, y, dy = (
        torch.randn(batch.num_rows, width, generator=generator).to(device, dtype)
        for width in (targets[0].a_pool_RI.shape[1], columns, columns)
    )
    expected = _by_definition(x, y, dy, targets, batch)
    torch.full((1 << 20,), float("nan"), device=device)  # freed at once: memory that comes next is likely this
    got = _by_form(form, x, y, dy, targets, batch)
    for name, tensor in got.items():
        if not torch.isfinite(tensor).all():
            return f"{name} has {int((~torch.isfinite(tensor)).sum())} numbers that are not finite"
        error = float((tensor.float() - expected[name]).abs().max() / expected[name].abs().max())
        if error > _TOLERANCE[dtype]:
            return f"{name} is off by {error:.1e}, {_TOLERANCE[dtype]:.0e} allowed"
    return None


def _by_form(
    form: LoraForm, x: Tensor, y: Tensor, dy: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch
) -> dict[str, Tensor]:
    y, dx = y.clone(), torch.zeros_like(x)
    form.add(y, x, targets, batch)
    dh = form.shrink(dy, targets, "b", batch)
    form.expand(dx, dh, targets, "a", batch)
    results = {"y": y, "dx": dx}
    h = form.shrink(x, targets, "a", batch)
    sides: tuple[tuple[Side, Any, Tensor], ...] = (("a", dh, x), ("b", h, dy))
    for side, factor, source in sides:
        gradients = form.pool_gradients(factor, source, targets, side, batch)
        for index, (target, (rows, gradient)) in enumerate(zip(targets, gradients, strict=True)):
            total = torch.zeros_like(target.pool(side), dtype=torch.float32)
            results[f"d{side}{index}"] = total.index_add_(0, rows, gradient)
    return results


def _by_definition(
    x: Tensor, y: Tensor, dy: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch
) -> dict[str, Tensor]:
    """The same in fp32 on the CPU, by autograd."""
    x, y, dy = (tensor.detach().to("cpu", torch.float32, copy=True) for tensor in (x, y, dy))
    exact = [
        LoraTarget(
            a_pool_RI=target.a_pool_RI.to("cpu", torch.float32, copy=True).requires_grad_(),
            b_pool_RO=target.b_pool_RO.to("cpu", torch.float32, copy=True).requires_grad_(),
            ranks=target.ranks,
            column=target.column,
        )
        for target in targets
    ]
    with torch.enable_grad():
        out = add_lora_reference(y, x.requires_grad_(), exact, batch)
        pools = [target.pool(side) for side in ("a", "b") for target in exact]
        gradients = torch.autograd.grad(out, [x, *pools], dy)
    device = targets[0].a_pool_RI.device
    names = ["y", "dx", *(f"d{side}{index}" for side in "ab" for index in range(len(exact)))]
    return {name: tensor.detach().to(device) for name, tensor in zip(names, (out, *gradients), strict=True)}
