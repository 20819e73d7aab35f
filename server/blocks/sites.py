"""The products of a block that adapters change, and what becomes of them while rows with adapters run.

    layer --adaptable_linears (probe)--> paths, shapes           before fusion: every linear whose rows are the step's
    layer --find_sites--> [Site]                                 after it: one per product, with one or more members

    input --> [i * rows] --> base product --> add_lora (targets of the members) --> [o * rows + b] --> output

`Site.install` puts itself in place of the forward of the module that multiplies (in its instance dictionary, where both
a module call and a direct `.forward` find it) and `remove` takes it out again: a step without adapters runs exactly the
code that a server without adapters runs. It does not know PEFT, bytes or where rank rows lie.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swarm.adapters.layout import LinearShape
from swarm.checkpoint.layout import is_expert
from swarm.kernels.lora import LoraBatch, LoraTarget, add_lora
from swarm.server.blocks.fusion import GroupMember, LinearGroup
from swarm.server.blocks.vector_pool import RowVectors, VectorPool
from swarm.server.quantization import weight_of

_ROW_COUNTS = (1, 3)
"""Rows of the probe's five with which a layer is run again, to see that its linears get the rows that it gets."""


def adaptable_linears(layer: nn.Module, run: Callable[[slice], Tensor]) -> dict[str, LinearShape]:
    """The linears of a freshly loaded layer that adapters may change, by path.

    These are the ones whose input has a row for each row of the step, in order. Experts that are given the rows that
    were routed to them are none, and linears that are not called (only their weights are used) are none either.

    Args:
        layer: before fusion.
        run: runs it on some of the probe's rows.
    """
    linears = {name: module for name, module in layer.named_modules() if weight_of(module) is not None}
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in linears.items()
    ]
    run(slice(None))
    whole, rows = _flat(seen), None
    for count in _ROW_COUNTS:
        seen.clear()
        run(slice(0, count))
        rows, part = count, _flat(seen)
        whole = {name: tensor for name, tensor in whole.items() if _begins_with(tensor, part.get(name), rows)}
    for hook in hooks:
        hook.remove()
    return {name: _shape(linears[name]) for name in linears if name in whole and not is_expert(name)}


def _flat(seen: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The inputs of linears that were called once, as rows."""
    return {name: inputs[0].flatten(0, -2) for name, inputs in seen.items() if len(inputs) == 1}


def _begins_with(whole: Tensor, part: Tensor | None, rows: int) -> bool:
    if part is None or part.shape[0] != rows or whole.shape[0] <= rows:
        return False
    tolerance = (1e-4 if whole.dtype == torch.float32 else 5e-2) * (1e-6 + whole.abs().max())
    return bool((whole[:rows] - part).abs().max() <= tolerance)


def _shape(linear: nn.Module) -> LinearShape:
    weight = weight_of(linear)
    assert weight is not None
    return LinearShape(num_inputs=weight.shape[1], num_outputs=weight.shape[0])


class Member(NamedTuple):
    """One linear of a site."""

    path: str
    """Its name in the layer."""
    column: int
    """Its first column of the site's output."""
    shape: LinearShape


class RowAdapters:
    """Which adapter each row of a step uses, and what the sites have derived from that.

    Args:
        adapters: handle of each row; -1 for none.
    """

    __slots__ = ("batch", "plans")

    def __init__(self, adapters: Sequence[int]):
        self.batch = LoraBatch(adapters)
        self.plans: dict[Hashable, Any] = {}
        """By site, kept for later steps of the same rows."""


class Current:
    """The rows that are being run now, for all sites of a span."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: RowAdapters | None = None


class Site:
    """One product of a block that adapters change; see the module docstring.

    Args:
        product: the module that multiplies: a linear, or the inner one of a group.
        members: the linears that it is made of, by columns.
        current: shared by all sites of a span.
        device: where they are.
    """

    def __init__(self, product: nn.Module, members: Sequence[Member], current: Current, device: torch.device):
        self.product = product
        self.members = tuple(members)
        self.targets: list[Sequence[LoraTarget]] = []
        """By pool, those of all members: the same objects until a pool is replaced."""
        self.width = sum(member.shape.num_outputs for member in members)
        self.output = VectorPool(self.width, device)
        """o and b, of all members side by side."""
        self.inputs = {index: VectorPool(member.shape.num_inputs, device) for index, member in enumerate(self.members)}
        """i of each member."""
        self._forward: Callable[[Tensor], Tensor] = product.forward
        self._current = current

    @property
    def used(self) -> bool:
        """Whether any adapter changes it."""
        vectors = bool(self.output) or any(self.inputs.values())
        return vectors or any(target.ranks for targets in self.targets for target in targets)

    def forget(self, handle: int) -> None:
        """Drop the vectors of an adapter."""
        for pool in (self.output, *self.inputs.values()):
            pool.remove(handle)

    def install(self) -> None:
        """Run in place of the product's own forward."""
        self.product.__dict__["forward"] = self

    def remove(self) -> None:
        """Give the product its own forward back."""
        self.product.__dict__.pop("forward", None)

    def __call__(self, input: Tensor) -> Tensor:
        rows = self._current.rows
        if rows is None:
            return self._forward(input)
        plan: _Plan | None = rows.plans.get(self)
        if plan is None:
            plan = rows.plans[self] = self._plan(rows.batch)
        if not plan.changes:
            return self._forward(input)
        x_TI = input if input.dim() == 2 else input.flatten(0, -2)
        if x_TI.shape[0] != rows.batch.num_rows:
            raise RuntimeError(f"{self.members[0].path} was given {x_TI.shape[0]} rows of {rows.batch.num_rows}")
        y_TO = self._multiply(x_TI, plan)
        for targets in plan.targets:
            y_TO = add_lora(y_TO, x_TI, targets, rows.batch)
        if plan.output is not None:
            y_TO = plan.output.apply_(y_TO)
        return y_TO if input.dim() == 2 else y_TO.view(*input.shape[:-1], -1)

    def multiply(self, x_TI: Tensor) -> Tensor:
        """The base's own product, whatever is installed."""
        return self._forward(x_TI)

    def _multiply(self, x_TI: Tensor, plan: "_Plan") -> Tensor:
        """W (i * x) + c. A member that scales its inputs has a product of its own, with the whole weight, if others
        in the group don't."""
        if plan.inputs and len(self.members) == 1:
            return self._forward(plan.inputs[0].apply(x_TI))
        y_TO = self._forward(x_TI)
        for index, scale in plan.inputs.items():
            member = self.members[index]
            own_nO = self._forward(scale.part(x_TI)).narrow(1, member.column, member.shape.num_outputs)
            columns = y_TO.narrow(1, member.column, member.shape.num_outputs)
            columns.copy_(own_nO) if scale.rows is None else columns.index_copy_(0, scale.rows, own_nO)
        return y_TO

    def _plan(self, batch: LoraBatch) -> "_Plan":
        return _Plan(
            targets=[
                targets
                for targets in self.targets
                if any(target.ranks.get(adapter) for target in targets for adapter in batch.adapters)
            ],
            inputs={index: it for index, pool in self.inputs.items() if (it := pool.rows_of(batch)) is not None},
            output=self.output.rows_of(batch),
        )


def find_sites(
    layer: nn.Module, linears: Mapping[str, LinearShape], current: Current, device: torch.device
) -> list[Site]:
    """The sites of a layer that is ready to run.

    Args:
        layer: fused and in its final format.
        linears: what `adaptable_linears` found.
        current: of the span.
        device: where it is.
    """
    products: dict[nn.Module, list[Member]] = {}
    for path, shape in linears.items():
        module = layer.get_submodule(path)
        column = 0
        if isinstance(module, GroupMember):
            group: LinearGroup = module.__dict__["group"]
            index: int = module.__dict__["index"]
            module, column = group.linear, sum(group.sizes[:index])
        products.setdefault(module, []).append(Member(path, column, shape))
    return [
        Site(module, sorted(members, key=lambda it: it.column), current, device) for module, members in products.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a site does for the rows of a step."""

    targets: list[Sequence[LoraTarget]]
    inputs: Mapping[int, RowVectors]
    """By member."""
    output: RowVectors | None

    @property
    def changes(self) -> bool:
        return bool(self.targets or self.inputs or self.output)
