"""Low-rank adapters of many users in one batch: layout of a step, reference, autograd and the one public function.

    y_t += s * (x_t . A^T) . B^T        with A, B, s of row t's own adapter and target; rows without one keep y_t

    x_TI --shrink (ranks of A)--> h, ragged --expand (ranks of B)--> y_TO         dx, dA, dB: the same two, swapped,
           |-- CUDA: triton_lora (after its self-test)    |-- else: torch_lora    and one sum of outer products

The unit of storage is the *rank row*. Rank j of an adapter is row j of A [r, in] and column j of B [out, r], kept as a
row of B^T; a pool is any tensor [rows, width] of such rows, and an adapter is a list of row numbers per target. Hence
  - no padding: an adapter of rank r occupies, and costs, r rows, and each linear has ranks of its own or none;
  - pages of 8 ranks are an allocator's business: `page_rows` turns a page table into row numbers. Where the bytes of a
    page are a multiple of every width (a few tens of KB for the usual models, as a page of keys and values is), one
    byte pool holds adapters of all widths and KV, and each `pool.view(-1, width)` is a pool in the sense of this file;
  - adapters in tensors of their own are the special case of row numbers in a run, which torch forms read as views;
  - many adapters may name the same rows (VeRA's shared A and B), and the rows of all layers may have the same numbers,
    so that what a step derives from them is derived once.
A row's result never depends on the weights of another row's adapter, not even if those are NaN: no form multiplies
another's weights by zero. Everything else that PEFT does to a linear, y = o * (W(i * x) + s * B(A x)) + b, is
elementwise around this function (i, o, b), or a factor per rank on h (VeRA).

It does not know models, PEFT, stores or sessions. Legend: T rows of a step, I and O columns of x and y, R rank rows of
a pool, r rank of an adapter, n rows of one adapter, S segments (distinct adapters of a step).
"""

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["PAGE_RANKS", "AdapterRanks", "LoraBatch", "LoraForm", "LoraTarget", "add_lora", "add_lora_reference",
           "lora_form", "page_rows"]  # fmt: skip

logger = logging.getLogger(__name__)

PAGE_RANKS = 8
"""Rank rows of a page."""

Side = Literal["a", "b"]
"""Which of a target's two pools: A, whose rows are as wide as x, or B^T, whose rows are columns of y."""


def page_rows(pages: Sequence[int], rank: int) -> list[int]:
    """Row numbers of `rank` ranks that fill `pages` in order."""
    return [pages[j // PAGE_RANKS] * PAGE_RANKS + j % PAGE_RANKS for j in range(rank)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRanks:
    """One adapter in one target."""

    a_rows: Sequence[int]
    """Rows of the A pool, one per rank."""
    b_rows: Sequence[int]
    """Rows of the B^T pool, one per rank."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""

    @property
    def rank(self) -> int:
        return len(self.a_rows)

    def rows(self, side: Side) -> Sequence[int]:
        return self.a_rows if side == "a" else self.b_rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraTarget:
    """One linear of one layer that adapters may change; a fused one (qkv, gate_up) is several of one x."""

    a_pool_RI: Tensor
    """Rank rows of A; of any floating dtype."""
    b_pool_RO: Tensor
    """Rank rows of B^T; of any floating dtype."""
    ranks: Mapping[int, AdapterRanks]
    """By adapter; one that is absent leaves this linear alone. Not to be changed while a batch that saw it is in use;
    layers whose pools are laid out alike should share one mapping."""
    column: int = 0
    """First column of y."""

    def pool(self, side: Side) -> Tensor:
        return self.a_pool_RI if side == "a" else self.b_pool_RO

    def width(self, side: Side) -> int:
        return self.pool(side).shape[1]

    def of(self, tensor: Tensor, side: Side) -> Tensor:
        """The columns that are this target's: all of x or dx, its own of y or dy."""
        width = self.b_pool_RO.shape[1]
        return tensor if side == "a" or width == tensor.shape[1] else tensor.narrow(1, self.column, width)


class LoraBatch:
    """Which adapter each row of a step uses. Every layer of the step uses it, and so may later steps of the same rows.

    It keeps what was derived for the targets it has seen, and these: they should be the same objects at every step.

    Args:
        adapters: of each row, keys of the targets' `ranks`; -1 for none.
    """

    __slots__ = ("adapters", "homogeneous", "memo", "num_rows", "rows_of")

    def __init__(self, adapters: Sequence[int]):
        self.num_rows = len(adapters)
        self.rows_of: dict[int, list[int]] = {}
        """Rows of each adapter in the batch, ascending."""
        for row, adapter in enumerate(adapters):
            if adapter >= 0:
                self.rows_of.setdefault(adapter, []).append(row)
        self.adapters = sorted(self.rows_of)
        """The distinct adapters: the segments, in order."""
        alone = len(self.adapters) == 1 and len(self.rows_of[self.adapters[0]]) == self.num_rows
        self.homogeneous = self.adapters[0] if alone else None
        """The adapter that all rows use, if there is one."""
        self.memo: dict[Hashable, Any] = {}
        """What a form derives from the layout, kept for other layers and steps."""


class LoraForm(Protocol):
    """An implementation; a module can be one.

    Its h is scale * source . pool^T of all rows, targets and ranks, in a ragged layout of its own.
    """

    def add(self, y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> None:
        """What `add_lora` does without gradients, by the shortest way."""

    def shrink(self, source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> Any:
        """The h of x and A ("a"), or of dy and B^T ("b")."""

    def expand(self, into: Tensor, h: Any, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> None:
        """Add h . pool to y ("b"), or to dx ("a")."""

    def pool_gradients(
        self, h: Any, source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch
    ) -> list[tuple[Tensor, Tensor]]:
        """For each target (rows, gradient of these rows): sums over an adapter's rows of outer products of h, source.

        "a": dA from the h of dy, and x; "b": dB^T from the h of x, and dy. Rows may repeat; gradients are fp32 or fp64.
        """


def add_lora(y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> Tensor:
    """y plus what each row's adapter adds, for one linear or the parts of a fused one.

    Args:
        y_TO: the base linear's output; fp32, fp16 or bf16. Changed in place unless gradients are recorded.
        x_TI: its input, of any floating dtype.
        targets: the linear's parts, which own disjoint columns of y. The same object at every step is fastest.
        batch: which adapter each row uses.

    Returns:
        [T, O]: y itself, or when gradients are recorded a new tensor; differentiable in y, x and the pools.
    """
    if not batch.adapters:
        return y_TO
    if torch.is_grad_enabled():
        pools = _pools(targets)
        if any(tensor.requires_grad for tensor in (y_TO, x_TI, *pools)):
            result: Tensor = _AddLora.apply(y_TO, x_TI, targets, batch, *pools)  # type: ignore[no-untyped-call]
            return result
    lora_form(x_TI.device).add(y_TO, x_TI, targets, batch)
    return y_TO


@functools.cache
def lora_form(device: torch.device) -> LoraForm:
    """The form for tensors of this device, chosen once: on CUDA, Triton's if it passes its self-test there."""
    from swarm.kernels import torch_lora

    if device.type != "cuda":
        return torch_lora
    from swarm.kernels import triton_lora
    from swarm.kernels.lora_self_test import self_test

    failures = self_test(triton_lora, device)
    if failures:
        logger.warning("adapters run without Triton on %s, whose kernels fail there: %s", device, "; ".join(failures))
    return torch_lora if failures else triton_lora


class _AddLora(torch.autograd.Function):
    """y + LoRA(x), with gradients of y, x and every distinct pool."""

    @staticmethod
    def forward(
        ctx: Any, y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch, *pools: Tensor
    ) -> Tensor:
        form = ctx.form = lora_form(x_TI.device)
        h = form.shrink(x_TI, targets, "a", batch)
        out_TO = y_TO.clone()
        form.expand(out_TO, h, targets, "b", batch)
        ctx.targets, ctx.batch, ctx.h = targets, batch, h
        ctx.save_for_backward(x_TI, *pools)
        return out_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = gradients
        x_TI, *pools = ctx.saved_tensors  # looked at first: it is this that notices pools changed since
        dh = ctx.form.shrink(dy_TO, ctx.targets, "b", ctx.batch)
        dx_TI = None
        if ctx.needs_input_grad[1]:
            dx_TI = torch.zeros_like(x_TI)
            ctx.form.expand(dx_TI, dh, ctx.targets, "a", ctx.batch)
        sums = {id(pool): torch.zeros_like(pool) for pool in pools if pool.requires_grad}
        for side, h, source in (("a", dh, x_TI), ("b", ctx.h, dy_TO)):
            if not any(id(target.pool(side)) in sums for target in ctx.targets):
                continue
            parts = ctx.form.pool_gradients(h, source, ctx.targets, side, ctx.batch)
            for target, (rows, gradient) in zip(ctx.targets, parts, strict=True):
                if (total := sums.get(id(target.pool(side)))) is not None:
                    total.index_add_(0, rows, gradient.to(total.dtype))
        return dy_TO, dx_TI, None, None, *(sums.get(id(pool)) for pool in pools)


def _pools(targets: Sequence[LoraTarget]) -> list[Tensor]:
    """The distinct pools of all targets."""
    pools = {id(pool): pool for target in targets for pool in (target.a_pool_RI, target.b_pool_RO)}
    return list(pools.values())


def add_lora_reference(y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> Tensor:
    """The definition, one adapter and target at a time and in fp32 (fp64 for fp64): what forms are tested against."""
    exact = torch.promote_types(y_TO.dtype, torch.float32)
    out_TO, x_TI = y_TO.to(exact), x_TI.to(exact)
    for adapter, members in batch.rows_of.items():
        rows = torch.tensor(members, device=y_TO.device)
        for target in targets:
            if (mine := target.ranks.get(adapter)) is None:
                continue
            a_rI = target.a_pool_RI[list(mine.a_rows)].to(exact)
            b_rO = target.b_pool_RO[list(mine.b_rows)].to(exact)
            before, after = target.column, y_TO.shape[1] - target.column - b_rO.shape[1]
            delta_nO = mine.scale * ((x_TI[rows] @ a_rI.t()) @ b_rO)
            out_TO = out_TO.index_add(0, rows, torch.nn.functional.pad(delta_nO, (before, after)))
    return out_TO.to(y_TO.dtype)
