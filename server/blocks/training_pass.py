"""Whole sequences on their way through the blocks of a span, forth and back with gradients, block by block.

    hidden states --> block --> block --> ... --> outputs            kept of each block: its input, and, where there
    their gradients <-- block <-- block <-- ... <-- gradients        is room, its graph; without one it is run again

Every block is a graph of its own between detached hidden states. So a pass may rest after any block while something
else uses the device, and what it keeps is counted block by block. Outputs don't depend on what is kept: a block is
always run with gradients, and run again by the same operators.

The sequences of several tenants may share a pass: `Part` has what is one tenant's, and gets its gradients. It knows
neither networks nor who asks; one thread runs it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swarm.adapters.delta import LINEAR_TENSORS, BlockDelta
from swarm.errors import InvalidRequest
from swarm.server.blocks.internals import LayerCall, Ropes
from swarm.server.blocks.step import Prefix, Step, WholeRows
from swarm.server.host_pages import HostBudget

if TYPE_CHECKING:
    from swarm.server.blocks.block import Block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Whole sequences of one tenant."""

    hidden_states: Tensor
    """[sum(lengths), H]: where they enter the first block, one sequence after another."""
    lengths: tuple[int, ...]
    deltas: Mapping[int, BlockDelta] = field(default_factory=dict)
    """What the tenant's adapter does, by block; its tensors are trained."""
    num_virtual: int = 0
    """Positions at the beginning of each sequence that stand for the adapter's prefix or prompts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartGradients:
    """What the backward pass has found out for one part."""

    hidden_states: Tensor
    """[sum(lengths), H], of its inputs."""
    deltas: Mapping[int, list[Tensor]]
    """By block, in the order of `BlockDelta.tensors()`; fp32 or as precise as the tensor itself."""


def check_part(part: Part, hidden_size: int) -> None:
    """Refuse what can't be run.

    Raises:
        InvalidRequest: with the number that is wrong and the one that would be right.
    """
    if not part.lengths or min(part.lengths) < max(1, part.num_virtual):
        raise InvalidRequest(f"sequences of {part.lengths} tokens, need at least {max(1, part.num_virtual)} in each")
    expected = (sum(part.lengths), hidden_size)
    if tuple(part.hidden_states.shape) != expected:
        raise InvalidRequest(f"hidden states have shape {tuple(part.hidden_states.shape)}, expected {expected}")
    for block, delta in part.deltas.items():
        for name in ("prefix_k_PKD", "prefix_v_PKE", "prompt_PH"):
            tensor: Tensor | None = getattr(delta, name)
            if tensor is not None and len(tensor) != part.num_virtual:
                raise InvalidRequest(
                    f"block {block}: {name} has {len(tensor)} positions, the adapter has {part.num_virtual}"
                )


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of one block."""

    input: Tensor
    """[T, H], a leaf."""
    num_bytes: int
    graph: "_Graph | None" = None


@dataclass(slots=True, eq=False)
class _Graph:
    """One block's run."""

    output: Tensor
    leaves: list[list[Tensor]]
    """By part: the tensors of its delta for this block."""
    num_bytes: int


class TrainingPass:
    """See the module docstring; made by `BlockSpan.training_pass`.

    Args:
        blocks: that it goes through, in order.
        parts: at least one.
        budget: of memory for what is kept between forward and backward; shared by all passes.
    """

    def __init__(
        self, blocks: Sequence["Block"], parts: Sequence[Part], *, step: Step, ropes: Ropes, device: torch.device,
        dtype: torch.dtype, budget: HostBudget,
    ):  # fmt: skip
        self.parts = tuple(parts)
        self.num_tokens = sum(len(part.hidden_states) for part in parts)
        self.outputs: tuple[Tensor, ...] = ()
        """By part, when it has been forth."""
        self.gradients: tuple[PartGradients, ...] = ()
        """By part, when it has been back."""
        self._blocks, self._step, self._budget = tuple(blocks), step, budget
        self._device, self._dtype = device, dtype
        self._kept: dict[int, _Kept] = {}
        self._ropes = ropes
        self._rows = self._make_rows([(part.lengths, part.num_virtual) for part in parts])
        self._single: dict[tuple[int, int], _Rows] = {}
        """Of single sequences, by length and virtual positions."""

    @property
    def is_kept(self) -> bool:
        """Whether it can go back."""
        return 0 in self._kept

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return sum(kept.num_bytes for kept in self._kept.values())

    def forward(self, *, keep: bool) -> Iterator[None]:
        """Go forth; stops after each block. Afterwards there are `outputs`.

        Args:
            keep: for going back. If there isn't even room for the inputs, nothing is kept.
        """
        hidden = torch.cat([part.hidden_states.to(self._device, self._dtype) for part in self.parts])
        keep = keep and self._keep(0, hidden)
        for index in range(len(self._blocks)):
            graph = self._run(index, hidden)
            hidden = graph.output.detach()
            if keep and self._budget.has_room(graph.num_bytes) and index in self._kept:
                self._keep_graph(index, graph)
            if keep and index + 1 < len(self._blocks):
                self._keep(index + 1, hidden)
            del graph
            yield
        self.outputs = hidden.split([len(part.hidden_states) for part in self.parts])

    def backward(self, gradients: Sequence[Tensor]) -> Iterator[None]:
        """Go back, once; stops after each block, and before it where it had to be run again.

        Args:
            gradients: of the outputs, by part.

        Raises:
            InvalidRequest: nothing is kept.
        """
        if not self.is_kept:
            raise InvalidRequest("nothing is kept of this pass: it can't go back")
        gradient = torch.cat([it.to(self._device, self._dtype) for it in gradients])
        found: list[dict[int, list[Tensor]]] = [{} for _ in self.parts]
        for index in reversed(range(len(self._blocks))):
            yield from self._refill(index)
            kept = self._kept[index]
            if kept.graph is None:
                self._keep_graph(index, self._run(index, kept.input))
                yield
            assert kept.graph is not None
            leaves = [leaf for part in kept.graph.leaves for leaf in part]
            result = torch.autograd.grad(kept.graph.output, [kept.input, *leaves], gradient, materialize_grads=True)
            gradient, rest = result[0], iter(result[1:])
            for part, own in zip(found, kept.graph.leaves, strict=True):
                if own:
                    part[self._blocks[index].index] = [next(rest) for _ in own]
            self._drop(index)
            yield
        split = gradient.split([len(part.hidden_states) for part in self.parts])
        self.gradients = tuple(
            PartGradients(hidden_states=own, deltas=deltas) for own, deltas in zip(split, found, strict=True)
        )

    def release(self) -> None:
        """Forget what is kept."""
        for index in list(self._kept):
            self._drop(index)

    # -- what is kept -------------------------------------------------------------------------------------------

    def _keep(self, index: int, hidden: Tensor, *, force: bool = False) -> bool:
        """Keep the input of a block, if there is room."""
        if not force and not self._budget.has_room(hidden.nbytes):
            return False
        self._budget.take(hidden.nbytes)
        self._kept[index] = _Kept(hidden.detach().requires_grad_(), hidden.nbytes)
        return True

    def _keep_graph(self, index: int, graph: _Graph) -> None:
        kept = self._kept[index]
        self._budget.take(graph.num_bytes)
        kept.graph, kept.num_bytes = graph, kept.num_bytes + graph.num_bytes

    def _drop(self, index: int) -> None:
        self._budget.give_back(self._kept.pop(index).num_bytes)

    def _refill(self, index: int) -> Iterator[None]:
        """Make the input of a block again from the nearest one before it that is kept."""
        while index not in self._kept:
            nearest = max(it for it in self._kept if it < index)
            graph = self._run(nearest, self._kept[nearest].input)
            self._keep(nearest + 1, graph.output.detach(), force=True)
            del graph
            yield

    # -- running a block ----------------------------------------------------------------------------------------

    def _run(self, index: int, hidden: Tensor) -> _Graph:
        """Run one block with gradients."""
        block = self._blocks[index]
        kept = self._kept.get(index)
        leaf = kept.input if kept is not None else hidden.detach().requires_grad_()
        deltas = [_as_leaves(part.deltas.get(block.index), self._device) for part in self.parts]
        saved = _SavedBytes()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            if block.spec.stateful:
                output = self._run_by_sequence(block, leaf, deltas)
            else:
                output = _run_rows(block, leaf, self._rows, deltas, self._step)
        leaves = [[] if delta is None else delta.tensors() for delta in deltas]
        return _Graph(output=output, leaves=leaves, num_bytes=saved.num_bytes)

    def _run_by_sequence(self, block: "Block", hidden_TH: Tensor, deltas: Sequence[BlockDelta | None]) -> Tensor:
        """A block with a recurrent state, which begins anew with each sequence."""
        outputs, pieces = [], iter(hidden_TH.split([length for part in self.parts for length in part.lengths]))
        for part, delta in zip(self.parts, deltas, strict=True):
            for length in part.lengths:
                rows = self._single.get((length, part.num_virtual))
                if rows is None:
                    rows = self._single[length, part.num_virtual] = self._make_rows([((length,), part.num_virtual)])
                outputs.append(_run_rows(block, next(pieces), rows, [delta], self._step))
        return torch.cat(outputs)

    def _make_rows(self, parts: Sequence[tuple[tuple[int, ...], int]]) -> "_Rows":
        return _Rows(parts, self._ropes, self._device, self._dtype)


class _Rows:
    """Sequences that run together, and what the layers are told of them.

    Args:
        parts: (lengths of the sequences, virtual positions of each) of each part.
    """

    def __init__(
        self, parts: Sequence[tuple[tuple[int, ...], int]], ropes: Ropes, device: torch.device, dtype: torch.dtype
    ):
        lengths = [length for own, _ in parts for length in own]
        self.whole = WholeRows(lengths, device)
        self.virtual: list[Tensor] = []
        """By part: its rows at virtual positions, one sequence after another."""
        row = 0
        for own, num_virtual in parts:
            rows: list[int] = []
            for length in own:
                rows += range(row, row + num_virtual)
                row += length
            self.virtual.append(torch.tensor(rows, dtype=torch.int64).to(device))
        any_hidden = torch.zeros((), dtype=dtype, device=device).expand(1, row, 1)
        with torch.no_grad():
            self._ropes = ropes.compute(any_hidden, self.whole.positions_1T, lengths)
        self._arguments: dict[int, dict[str, Any]] = {}

    def arguments(self, call: LayerCall) -> dict[str, Any]:
        """What a layer is called with."""
        known = self._arguments.get(id(call))
        if known is None:
            known = self._arguments[id(call)] = call.arguments(self._ropes, self.whole.positions_1T)
        return known


def _run_rows(
    block: "Block", hidden_TH: Tensor, rows: _Rows, deltas: Sequence[BlockDelta | None], step: Step
) -> Tensor:
    """Run one block on all rows, with the delta of each part."""
    changed = [(virtual, delta) for virtual, delta in zip(rows.virtual, deltas, strict=True) if delta is not None]
    for virtual, delta in changed:
        if delta.prompt_PH is not None:
            prompts_NH = delta.prompt_PH.to(hidden_TH.dtype).repeat(len(virtual) // len(delta.prompt_PH), 1)
            hidden_TH = hidden_TH.index_add(0, virtual, prompts_NH)
    rows.whole.prefix = _prefix(changed)
    step.set_whole(rows.whole)
    return block.run(hidden_TH[None], rows.arguments(block.call))[0]


def _prefix(changed: Sequence[tuple[Tensor, BlockDelta]]) -> Prefix | None:
    """The keys and values that adapters have for virtual positions, of all parts together."""
    rows, keys, values = [], [], []
    for virtual, delta in changed:
        k_PKD, v_PKE = delta.prefix_k_PKD, delta.prefix_v_PKE
        if k_PKD is not None and v_PKE is not None:
            times = len(virtual) // len(k_PKD)
            rows.append(virtual)
            keys.append(k_PKD.repeat(times, 1, 1))
            values.append(v_PKE.repeat(times, 1, 1))
    return Prefix(torch.cat(rows), torch.cat(keys), torch.cat(values)) if rows else None


def _as_leaves(delta: BlockDelta | None, device: torch.device) -> BlockDelta | None:
    """The same tensors, in the same order, as leaves of a graph of their own."""
    if delta is None:
        return None
    return BlockDelta(
        linears={
            path: replace(it, **_leaves(it, LINEAR_TENSORS.values(), device)) for path, it in delta.linears.items()
        },
        **_leaves(delta, ("prefix_k_PKD", "prefix_v_PKE", "prompt_PH"), device),
    )


def _leaves(holder: object, attributes: Iterable[str], device: torch.device) -> dict[str, Any]:
    tensors = {attribute: getattr(holder, attribute) for attribute in attributes}
    return {name: it.detach().to(device).requires_grad_() for name, it in tensors.items() if it is not None}


class _SavedBytes:
    """Counts the memory that a graph holds on to, the blocks' own weights left out."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor
