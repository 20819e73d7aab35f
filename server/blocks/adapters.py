"""Adapters of a span: attaching and detaching them, and making the rows of a step use them.

    attach: {block: BlockDelta} --checked--> rank rows into pools, vectors to sites, prefixes to attention
    step:   chunks --adapter of each row, kept for later steps--> sites installed, or removed if no row has an adapter

Each row of a step has an adapter of its own or none. A step without adapters runs through the blocks as if there were
no such thing. It does not know PEFT, digests, budgets or who owns pages; one thread calls it.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from swarm.adapters.delta import BlockDelta
from swarm.adapters.layout import BlockShape
from swarm.errors import InvalidRequest
from swarm.server.blocks.adapter_checks import AdaptableBlock, block_of, check_deltas
from swarm.server.blocks.adapter_vectors import put_vectors, vector_bytes
from swarm.server.blocks.rank_pool import Linears, OwnPool, PagedPool
from swarm.server.blocks.sites import Current, RowAdapters
from swarm.server.blocks.step import Chunk, Step, VirtualRows

_MAX_KEPT = 64
"""Compositions of steps whose derived data is kept."""


class _Kind(NamedTuple):
    """Blocks that are laid out alike."""

    blocks: list[AdaptableBlock]
    paged: PagedPool | None
    """None where blocks have no KV pools."""
    own: OwnPool


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
        self._num_virtual: dict[int, int] = {}
        """Virtual positions of each attached adapter."""
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
        return block_of(self._blocks, block).shape

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
            size += sum(vector_bytes(site, delta.linears) for site in block_of(self._blocks, index).sites)
        return size

    def attach(self, deltas: Mapping[int, BlockDelta], pages: Sequence[int] | None) -> int:
        """See BlockSpan.attach."""
        num_virtual = check_deltas(deltas, self._blocks)
        if pages is not None and (missing := self.pages_missing(deltas, pages)):
            raise InvalidRequest(f"{len(pages)} pages have no room for the adapter, it needs {missing} more")
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        for kind in self._kinds:
            self._attach_ranks(handle, kind, _linears(kind, deltas), pages)
        for index, delta in deltas.items():
            self._attach_rest(handle, self._blocks[index], delta)
        self._num_virtual[handle] = num_virtual
        self._remove_sites()
        return handle

    def detach(self, handle: int) -> None:
        """See BlockSpan.detach."""
        if self._num_virtual.pop(handle, None) is None:
            raise InvalidRequest(f"no adapter is attached as {handle}")
        for kind in self._kinds:
            if kind.paged is not None:
                kind.paged.remove(handle)
            if kind.own.detach(handle):
                _set_targets(kind)
                self._kept.clear()
        for block in self._blocks.values():
            for site in block.sites:
                site.forget(handle)
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
        if chunk.adapter != -1 and chunk.adapter not in self._num_virtual:
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
            length = self._num_virtual[chunk.adapter] if chunk.adapter >= 0 else 0
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
            put_vectors(handle, site, delta.linears, self._like.device)
        if delta.prefix_k_PKD is not None and delta.prefix_v_PKE is not None:
            assert block.attention is not None
            block.attention.prefixes[handle] = (self._copy(delta.prefix_k_PKD), self._copy(delta.prefix_v_PKE))
        if delta.prompt_PH is not None:
            self._prompts.setdefault(block.index, {})[handle] = self._copy(delta.prompt_PH)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._like.device, self._like.dtype, copy=True)


def _linears(kind: _Kind, deltas: Mapping[int, BlockDelta]) -> list[Linears]:
    return [deltas[block.index].linears if block.index in deltas else {} for block in kind.blocks]


def _set_targets(kind: _Kind) -> None:
    """Show all sites where the rank rows of a kind lie now."""
    pools = [pool for pool in (kind.paged, kind.own) if pool is not None]
    for number, block in enumerate(kind.blocks):
        for site in block.sites:
            site.targets = [[pool.target(number, it.path, it.column) for it in site.members] for pool in pools]
