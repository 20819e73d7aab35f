"""Adapters of a span: attaching and detaching them, and making the rows of a step use them.

    attach: {block: BlockDelta} --checked--> rank rows into pools, vectors to sites, prefixes to attention
    step:   chunks --adapter of each row, kept for later steps--> sites installed, or removed if no row has an adapter

Each row of a step has an adapter of its own or none. A step without adapters runs through the blocks as if there were
no such thing. It does not know PEFT, digests, budgets or who owns pages; one thread calls it.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.adapters.delta import LINEAR_TENSORS, BlockDelta, LinearDelta
from swarm.adapters.format import BlockShape, LinearShape
from swarm.errors import InvalidRequest
from swarm.server.blocks.attention import LayerAttention
from swarm.server.blocks.rank_pool import Linears, OwnPool, PagedPool
from swarm.server.blocks.sites import Current, Member, RowAdapters, Site, Vectors
from swarm.server.blocks.step import Chunk, Step, VirtualRows
from swarm.server.quantization import dense_weight

_MAX_KEPT = 64
"""Compositions of steps whose derived data is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptableBlock:
    """What adapters see of a block."""

    index: int
    shape: BlockShape
    sites: Sequence[Site]
    attention: LayerAttention | None
    stateful: bool


class _Kind(NamedTuple):
    """Blocks that are laid out alike."""

    blocks: list[AdaptableBlock]
    paged: PagedPool | None
    """None where blocks have no KV pools."""
    own: OwnPool


class _Attached(NamedTuple):
    paged: bool
    own_bytes: int
    num_virtual: int


class SpanAdapters:
    """See the module docstring.

    Args:
        blocks: of the span, with their KV pools allocated.
        current: what their sites share.
        like: a tensor of the span's dtype and device.
    """

    def __init__(self, blocks: Sequence[AdaptableBlock], current: Current, like: Tensor):
        self._blocks = {block.index: block for block in blocks}
        self._current = current
        self._like = like
        self._attached: dict[int, _Attached] = {}
        self._prompts: dict[int, dict[int, Tensor]] = {}
        """By block and adapter."""
        self._next_handle = 0
        self._kept: OrderedDict[tuple[tuple[int, int], ...], RowAdapters] = OrderedDict()
        self._installed = False
        groups: dict[object, list[AdaptableBlock]] = {}
        for block in blocks:
            layout = (block.shape.kv_shape, tuple(sorted(block.shape.linears.items(), key=lambda it: it[0])))
            groups.setdefault(layout, []).append(block)
        self._kinds = [self._kind(members) for members in groups.values()]

    def shape(self, block: int) -> BlockShape:
        """What adapters may change in a block.

        Raises:
            InvalidRequest: it is not in the span.
        """
        return self._block(block).shape

    def pages_missing(self, deltas: Mapping[int, BlockDelta], pages: Sequence[int]) -> int:
        """How many pages `attach` needs beside these; see BlockSpan.adapter_pages."""
        counts = [kind.paged.pages_missing(_linears(kind, deltas), pages) for kind in self._kinds if kind.paged]
        return max(counts, default=0)

    def own_bytes(self, deltas: Mapping[int, BlockDelta], *, paged: bool) -> int:
        """Memory of an `attach` outside of the pages."""
        numbers = 0
        for kind in self._kinds:
            if not (paged and kind.paged):
                numbers += kind.own.num_elements(_linears(kind, deltas))
        size = numbers * self._like.element_size()
        for index, delta in deltas.items():
            virtual = (delta.prefix_k_PKD, delta.prefix_v_PKE, delta.prompt_PH)
            size += sum(it.numel() * self._like.element_size() for it in virtual if it is not None)
            size += sum(_vector_bytes(site, delta.linears) for site in self._block(index).sites)
        return size

    def attach(self, deltas: Mapping[int, BlockDelta], pages: Sequence[int] | None) -> int:
        """See BlockSpan.attach."""
        num_virtual = self._check(deltas)
        if pages is not None and (missing := self.pages_missing(deltas, pages)):
            raise InvalidRequest(f"{len(pages)} pages have no room for the adapter, it needs {missing} more")
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        for kind in self._kinds:
            self._attach_ranks(handle, kind, _linears(kind, deltas), pages)
        for index, delta in deltas.items():
            self._attach_rest(handle, self._blocks[index], delta)
        size = self.own_bytes(deltas, paged=pages is not None)
        self._attached[handle] = _Attached(pages is not None, size, num_virtual)
        self._remove_sites()
        return handle

    def detach(self, handle: int) -> None:
        """See BlockSpan.detach."""
        if self._attached.pop(handle, None) is None:
            raise InvalidRequest(f"no adapter is attached as {handle}")
        for kind in self._kinds:
            if kind.paged is not None:
                kind.paged.remove(handle)
            kind.own.remove(handle)
        for block in self._blocks.values():
            for site in block.sites:
                site.vectors.pop(handle, None)
            if block.attention is not None:
                block.attention.prefixes.pop(handle, None)
        for prompts in self._prompts.values():
            prompts.pop(handle, None)
        self._kept = OrderedDict((key, it) for key, it in self._kept.items() if handle not in it.batch.rows_of)
        self._remove_sites()

    def check(self, chunk: Chunk) -> None:
        """Refuse a chunk with an adapter that is not here.

        Raises:
            InvalidRequest: it names one.
        """
        if chunk.adapter != -1 and chunk.adapter not in self._attached:
            raise InvalidRequest(f"no adapter is attached as {chunk.adapter}")

    def enter(self, step: Step) -> None:
        """Make the rows of a step use their adapters, from now until the next call."""
        if all(chunk.adapter < 0 for chunk in step.chunks):
            self._current.rows = None
            self._remove_sites()
            return
        key = tuple((chunk.adapter, chunk.num_tokens) for chunk in step.chunks)
        rows = self._kept.get(key)
        if rows is None:
            rows = self._kept[key] = RowAdapters([adapter for adapter, count in key for _ in range(count)])
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        self._current.rows = rows
        step.virtual = self._virtual_rows(step.chunks)
        if not self._installed:
            self._install_sites()

    def add_prompts(self, block: int, hidden_1TH: Tensor, virtual: Sequence[VirtualRows]) -> Tensor:
        """Hidden states as they enter a block, with the prompts of adapters that have some there."""
        prompts = self._prompts.get(block)
        if not prompts:
            return hidden_1TH
        changed = hidden_1TH.clone()
        for it in virtual:
            if (prompt_PH := prompts.get(it.adapter)) is not None:
                changed[0, it.row : it.row + it.num_rows] += prompt_PH[it.position : it.position + it.num_rows]
        return changed

    def _virtual_rows(self, chunks: Sequence[Chunk]) -> list[VirtualRows]:
        found, row = [], 0
        for chunk in chunks:
            length = self._attached[chunk.adapter].num_virtual if chunk.adapter >= 0 else 0
            if chunk.position < length:
                count = min(chunk.num_tokens, length - chunk.position)
                found.append(VirtualRows(row, chunk.position, count, chunk.adapter))
            row += chunk.num_tokens
        return found

    def _install_sites(self) -> None:
        for block in self._blocks.values():
            for site in block.sites:
                if site.used:
                    site.install()
        self._installed = True

    def _remove_sites(self) -> None:
        if self._installed:
            for block in self._blocks.values():
                for site in block.sites:
                    site.remove()
            self._installed = False

    def _kind(self, blocks: list[AdaptableBlock]) -> _Kind:
        linears = blocks[0].shape.linears
        paged = None
        attentions = [block.attention for block in blocks if block.attention is not None]
        if attentions:
            paged = PagedPool(linears, [it.memory for it in attentions], attentions[0].strips)
        kind = _Kind(blocks, paged, OwnPool(linears, len(blocks), self._like))
        _set_targets(kind)
        return kind

    def _attach_ranks(self, handle: int, kind: _Kind, linears: Sequence[Linears], pages: Sequence[int] | None) -> None:
        if pages is not None and kind.paged is not None:
            kind.paged.attach(handle, linears, pages)
        elif kind.own.attach(handle, linears):
            _set_targets(kind)
            self._kept.clear()

    def _attach_rest(self, handle: int, block: AdaptableBlock, delta: BlockDelta) -> None:
        for site in block.sites:
            vectors = _vectors(site, delta.linears, self._like.device)
            if vectors is not None:
                site.vectors[handle] = vectors
        if delta.prefix_k_PKD is not None and delta.prefix_v_PKE is not None:
            assert block.attention is not None
            block.attention.prefixes[handle] = (self._copy(delta.prefix_k_PKD), self._copy(delta.prefix_v_PKE))
        if delta.prompt_PH is not None:
            self._prompts.setdefault(block.index, {})[handle] = self._copy(delta.prompt_PH)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._like.device, self._like.dtype, copy=True)

    def _block(self, index: int) -> AdaptableBlock:
        block = self._blocks.get(index)
        if block is None:
            raise InvalidRequest(f"block {index} is not among {min(self._blocks)}:{max(self._blocks) + 1}")
        return block

    def _check(self, deltas: Mapping[int, BlockDelta]) -> int:
        """How many virtual positions an adapter has that fits these blocks.

        Raises:
            InvalidRequest: it doesn't fit; names what.
        """
        lengths = set()
        for index, delta in deltas.items():
            block = self._block(index)
            for path, linear in delta.linears.items():
                _check_linear(f"adapter, block {index}: {path}", linear, block.shape.linears.get(path))
            lengths |= {it.shape[0] for it in _check_virtual(block, delta)}
        if len(lengths) > 1:
            raise InvalidRequest(
                f"adapter has {min(lengths)} virtual positions in one place, {max(lengths)} in another"
            )
        return lengths.pop() if lengths else 0


def _linears(kind: _Kind, deltas: Mapping[int, BlockDelta]) -> list[Linears]:
    return [deltas[block.index].linears if block.index in deltas else {} for block in kind.blocks]


def _set_targets(kind: _Kind) -> None:
    """Show all sites where the rank rows of a kind lie now."""
    pools = [pool for pool in (kind.paged, kind.own) if pool is not None]
    for number, block in enumerate(kind.blocks):
        for site in block.sites:
            site.targets = [[pool.target(number, it.path, it.column) for it in site.members] for pool in pools]


def _vectors(site: Site, linears: Linears, device: torch.device) -> Vectors | None:
    """What an adapter does to a site beside its rank rows."""
    factors: dict[int, Tensor] = {}
    offsets: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for index, member in enumerate(site.members):
        linear = linears.get(member.path)
        if linear is None:
            continue
        if linear.input_scale_I is not None:
            scales[index] = linear.input_scale_I.to(device, torch.float32, copy=True)
        factor_O, offset_O = factor_and_offset(site, member, linear, device)
        if factor_O is not None:
            factors[index] = factor_O
        if offset_O is not None and offset_O.any():
            offsets[index] = offset_O
    if not factors and not offsets and not scales:
        return None
    return Vectors(
        factor_O=_joined(site, factors, 1.0, device),
        offset_O=_joined(site, offsets, 0.0, device),
        input_scales=scales,
    )


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
        factor_O = linear.output_scale_O.to(device, torch.float32, copy=True)
        offset_O = factor_O * (new_O - base_O)
    elif linear.magnitude_O is not None:
        factor_O = linear.magnitude_O.to(device, torch.float32) / _norms(site, columns, linear, device)
        offset_O = new_O - factor_O * base_O  # only the product is scaled
    elif linear.base_bias_O is not None:
        offset_O = new_O - base_O
    if linear.bias_O is not None:
        own_O = linear.bias_O.to(device, torch.float32)
        offset_O = own_O.clone() if offset_O is None else offset_O + own_O
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


def _vector_bytes(site: Site, linears: Linears) -> int:
    """What `_vectors` will take, at most."""
    mine = [(member, linears[member.path]) for member in site.members if member.path in linears]
    factor = any(it.output_scale_O is not None or it.magnitude_O is not None for _, it in mine)
    offset = any(it.bias_O is not None or it.base_bias_O is not None or it.magnitude_O is not None for _, it in mine)
    scales = sum(member.shape.num_inputs for member, it in mine if it.input_scale_I is not None)
    return 4 * (site.width * (factor + offset) + scales)


def _check_linear(where: str, linear: LinearDelta, shape: LinearShape | None) -> None:
    if shape is None:
        raise InvalidRequest(f"{where} is no linear here that adapters may change")
    inputs, outputs, rank = shape.num_inputs, shape.num_outputs, linear.rank
    expected = {
        "a_rI": (rank, inputs),
        "b_Or": (outputs, rank),
        "input_scale_I": (inputs,),
        **dict.fromkeys(("output_scale_O", "magnitude_O", "bias_O", "base_bias_O"), (outputs,)),
    }
    for name in LINEAR_TENSORS.values():
        tensor: Tensor | None = getattr(linear, name)
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise InvalidRequest(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
    if (linear.a_rI is None) != (linear.b_Or is None) or (linear.magnitude_O is not None and linear.a_rI is None):
        raise InvalidRequest(f"{where}: has only one of A and B, or a magnitude without them")


def _check_virtual(block: AdaptableBlock, delta: BlockDelta) -> list[Tensor]:
    """The tensors of virtual positions, of right shapes."""
    where = f"adapter, block {block.index}"
    k_PKD, v_PKE = delta.prefix_k_PKD, delta.prefix_v_PKE
    if (k_PKD is None) != (v_PKE is None):
        raise InvalidRequest(f"{where}: a prefix needs keys and values")
    if k_PKD is not None and v_PKE is not None:
        if block.shape.kv_shape is None or block.stateful:
            raise InvalidRequest(f"{where}: the block has no attention or a recurrent state, so it can have no prefix")
        heads, key_width, value_width = block.shape.kv_shape
        if tuple(k_PKD.shape[1:]) != (heads, key_width) or tuple(v_PKE.shape[1:]) != (heads, value_width):
            raise InvalidRequest(
                f"{where}: prefix of {tuple(k_PKD.shape)} and {tuple(v_PKE.shape)}, expected heads and widths "
                f"{(heads, key_width)} and {(heads, value_width)}"
            )
    if delta.prompt_PH is not None and tuple(delta.prompt_PH.shape[1:]) != (block.shape.hidden_size,):
        raise InvalidRequest(
            f"{where}: prompt of {tuple(delta.prompt_PH.shape)}, hidden size {block.shape.hidden_size}"
        )
    return [tensor for tensor in (k_PKD, v_PKE, delta.prompt_PH) if tensor is not None]
