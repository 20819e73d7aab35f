"""Rank rows of adapters in blocks that are laid out alike: where they lie, and how kernels are shown them.

    attach: A, B of each linear --place (rank_pages)--> row numbers, the same in all blocks --> a flat buffer per block
    run:    LoraTarget(buffer as rows of in, buffer as rows of out, ranks of all adapters)

`PagedPool` writes into pages of the blocks' KV pools ("unified paging": adapters and keys and values trade memory);
`OwnPool` into memory of its own that grows, for blocks without such pools. A mapping of ranks is shared by all blocks
of a pool, so that a step derives what it needs once and not per block. So an adapter's rank in a linear is the largest
that it has in any of the blocks; where it has less there are rows of zeros, which add nothing.

It does not know sessions, budgets or who owns pages.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.adapters.delta import LinearDelta
from swarm.adapters.layout import LinearShape
from swarm.kernels.lora import AdapterRanks, LoraTarget
from swarm.server.blocks.rank_pages import (
    Item,
    Segment,
    Strip,
    merged,
    page_segments,
    pages_missing,
    place,
    row_segments,
)

Linears = Mapping[str, LinearDelta]
"""What an adapter does to the linears of one block, by path."""


class _Wanted(NamedTuple):
    """What an adapter needs for one linear in all blocks of a pool."""

    path: str
    rank: int
    scale: float
    """1 where blocks have scales of their own: these are multiplied into B then."""


class RankPool:
    """See the module docstring.

    Args:
        linears: of each of the blocks.
        buffers: flat memory of each block, all of one size, dtype and device.
    """

    def __init__(self, linears: Mapping[str, LinearShape], buffers: Sequence[Tensor]):
        self._linears = linears
        self._ranks: dict[str, dict[int, AdapterRanks]] = {path: {} for path in linears}
        self._set_buffers(buffers)

    def target(self, block: int, path: str, column: int) -> LoraTarget:
        """One linear of one block.

        Args:
            block: its number in the pool.
            path: of the linear in the block.
            column: its first column of the product that it is a part of.
        """
        shape = self._linears[path]
        return LoraTarget(
            a_pool_RI=self._rows(block, shape.num_inputs),
            b_pool_RO=self._rows(block, shape.num_outputs),
            ranks=self._ranks[path],
            column=column,
        )

    def remove(self, handle: int) -> None:
        """Forget an adapter."""
        for ranks in self._ranks.values():
            ranks.pop(handle, None)

    def num_elements(self, blocks: Sequence[Linears]) -> int:
        """Numbers that an adapter takes in all blocks of the pool."""
        return len(self._buffers) * sum(item.width * item.num_rows for item in self._items(_wanted(blocks)))

    def _set_buffers(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = tuple(buffers)
        self._views: dict[tuple[int, int], Tensor] = {}

    def _rows(self, block: int, width: int) -> Tensor:
        """A block's buffer as rows of one width, the same object every time."""
        view = self._views.get((block, width))
        if view is None:
            buffer = self._buffers[block]
            count = buffer.numel() // width
            view = self._views[block, width] = buffer[: count * width].view(count, width)
        return view

    def _items(self, wanted: Sequence[_Wanted]) -> list[Item]:
        """A and B of each linear, in turn."""
        shapes = [(self._linears[it.path], it.rank) for it in wanted]
        return [Item(width, rank) for shape, rank in shapes for width in (shape.num_inputs, shape.num_outputs)]

    def _write(
        self, handle: int, blocks: Sequence[Linears], wanted: Sequence[_Wanted], rows: Sequence[Sequence[int]]
    ) -> None:
        for it, a_rows, b_rows in zip(wanted, rows[0::2], rows[1::2], strict=True):
            shape = self._linears[it.path]
            self._ranks[it.path][handle] = AdapterRanks(a_rows=a_rows, b_rows=b_rows, scale=it.scale)
            for number, linears in enumerate(blocks):
                delta = linears.get(it.path)
                a_rI, b_rO = (None, None) if delta is None else (delta.a_rI, None)
                if delta is not None and delta.b_Or is not None:
                    b_rO = delta.b_Or.t() if delta.scale == it.scale else delta.b_Or.t() * (delta.scale / it.scale)
                _copy_rows(self._rows(number, shape.num_inputs), a_rows, a_rI)
                _copy_rows(self._rows(number, shape.num_outputs), b_rows, b_rO)


class PagedPool(RankPool):
    """Rank rows in pages of KV pools.

    Args:
        linears: of each of the blocks.
        buffers: the memory of each block's KV pools.
        strips: where pages lie in a buffer.
    """

    def __init__(self, linears: Mapping[str, LinearShape], buffers: Sequence[Tensor], strips: Sequence[Strip]):
        super().__init__(linears, buffers)
        self._strips = tuple(strips)

    def pages_missing(self, blocks: Sequence[Linears], pages: Sequence[int]) -> int:
        """See rank_pages.pages_missing."""
        return pages_missing(self._items(_wanted(blocks)), self._strips, pages)

    def attach(self, handle: int, blocks: Sequence[Linears], pages: Sequence[int]) -> None:
        """Copy an adapter into pages that have room for it.

        Args:
            handle: its name from now on.
            blocks: what it does to each block of the pool.
            pages: owned by nobody else.
        """
        wanted = _wanted(blocks)
        placement = place(self._items(wanted), page_segments(pages, self._strips))
        assert placement is not None, "asked for before: pages_missing"
        self._write(handle, blocks, wanted, placement.rows)


class OwnPool(RankPool):
    """Rank rows in memory that is there for them alone.

    Args:
        linears: of each of the blocks.
        num_blocks: how many blocks.
        like: a tensor of the dtype and device of the rows.
    """

    def __init__(self, linears: Mapping[str, LinearShape], num_blocks: int, like: Tensor):
        super().__init__(linears, [like.new_empty(0) for _ in range(num_blocks)])
        self._free: list[Segment] = []

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def attach(self, handle: int, blocks: Sequence[Linears]) -> bool:
        """Copy an adapter in.

        Returns:
            Whether the buffers were replaced by larger ones, and targets with them.
        """
        wanted = _wanted(blocks)
        items = self._items(wanted)
        size = old_size = self._buffers[0].numel()
        placement = place(items, self._free)
        while placement is None:
            size += max(size, sum(item.width * item.num_rows for item in items))
            placement = place(items, merged([*self._free, (old_size, size)]))
        if size > old_size:
            grown = [buffer.new_empty(size) for buffer in self._buffers]
            for new, old in zip(grown, self._buffers, strict=True):
                new[:old_size] = old
            self._set_buffers(grown)
        self._free = placement.free
        self._write(handle, blocks, wanted, placement.rows)
        return size > old_size

    def detach(self, handle: int) -> bool:
        """Forget an adapter, whose rows others may have then; the last one takes all memory with it.

        Returns:
            Whether the buffers were replaced.
        """
        freed = list(self._free)
        for path, ranks in self._ranks.items():
            if (mine := ranks.get(handle)) is not None:
                freed += row_segments(mine.a_rows, self._linears[path].num_inputs)
                freed += row_segments(mine.b_rows, self._linears[path].num_outputs)
        self._free = merged(freed)
        self.remove(handle)
        if any(self._ranks.values()) or not self._buffers[0].numel():
            return False
        self._set_buffers([buffer.new_empty(0) for buffer in self._buffers])
        self._free = []
        return True


def _wanted(blocks: Sequence[Linears]) -> list[_Wanted]:
    """What an adapter needs so that each of the blocks has room for it."""
    wanted = []
    for path in dict.fromkeys(path for linears in blocks for path, delta in linears.items() if delta.rank):
        deltas = [linears[path] for linears in blocks if path in linears and linears[path].rank]
        scales = {delta.scale for delta in deltas}
        rank = max(delta.rank for delta in deltas)
        wanted.append(_Wanted(path, rank, scales.pop() if len(scales) == 1 else 1.0))
    return wanted


def _copy_rows(pool_RW: Tensor, rows: Sequence[int], content_rW: Tensor | None) -> None:
    """Put rows into a pool, and zeros into what they don't fill."""
    filled = 0 if content_rW is None else content_rW.shape[0]
    if content_rW is not None and filled:
        _assign(pool_RW, rows[:filled], content_rW.to(pool_RW.device, pool_RW.dtype))
    if filled < len(rows):
        _assign(pool_RW, rows[filled:], torch.zeros_like(pool_RW[:1]).expand(len(rows) - filled, -1))


def _assign(pool_RW: Tensor, rows: Sequence[int], content_rW: Tensor) -> None:
    if isinstance(rows, range):
        pool_RW[rows.start : rows.stop] = content_rW
    else:
        pool_RW.index_copy_(0, torch.tensor(rows, device=pool_RW.device), content_rW.contiguous())
