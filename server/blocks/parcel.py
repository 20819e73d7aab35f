"""What a session has in the blocks of a span, as plain bytes and back: how it travels to another server.

    keys and values of its pages ─┐                                                  ┌─► BlockSpan.write_pages
    recurrent state of each row ──┴─ pack ─► bytes ~~~~► unpack, by the same Layout ─┴─► SequenceState

Nothing in the bytes says what they are: both sides know the layout from their own blocks, and the length must be
exactly what that asks for. Pages come block by block, keys before values, then row by row the states' tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from swarm.errors import InvalidRequest
from swarm.server.pages import PAGE_SIZE

SavedPages = Sequence[tuple[Tensor, Tensor]]
"""What `BlockSpan.read_pages` gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What there is for each page and each row, in the blocks of one session."""

    dtype: torch.dtype
    """Of keys and values."""
    kv_shapes: tuple[tuple[int, int, int], ...]
    """(kv heads, key width, value width) of each block with attention."""
    states: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shapes and dtypes of a row's recurrent state."""

    def num_bytes(self, num_pages: int, num_states: int) -> int:
        """Size of the parcel of so many pages and rows with a state."""
        widths = sum(heads * (key + value) for heads, key, value in self.kv_shapes)
        per_state = sum(prod(shape) * dtype.itemsize for shape, dtype in self.states)
        return num_pages * PAGE_SIZE * widths * self.dtype.itemsize + num_states * per_state


def pack(layout: Layout, pages: SavedPages, states: Iterable[Sequence[Tensor]]) -> bytearray:
    """The bytes of these pages, and of the states of rows.

    Raises:
        InvalidRequest: a state is not what the layout says.
    """
    rows = list(states)
    for tensors in rows:
        if (found := tuple((tuple(it.shape), it.dtype) for it in tensors)) != layout.states:
            raise InvalidRequest(f"recurrent state of {len(found)} tensors, not the {len(layout.states)} expected")
    parts = [*(it for pair in pages for it in pair), *(it for tensors in rows for it in tensors)]
    packed, at = bytearray(sum(it.nbytes for it in parts)), 0
    for part in parts:
        if part.nbytes:
            raw = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
            packed[at : at + part.nbytes] = raw.numpy().data
            at += part.nbytes
    return packed


def unpack(
    layout: Layout, data: memoryview | bytearray, num_pages: int, num_states: int
) -> tuple[SavedPages, list[list[Tensor]]]:
    """Pages and the states of rows, without a copy: they are views of the bytes, which must be writable.

    Raises:
        InvalidRequest: another length than the layout asks for.
    """
    expected = layout.num_bytes(num_pages, num_states)
    if len(data) != expected:
        raise InvalidRequest(f"{len(data)} bytes of {num_pages} pages and {num_states} states, expected {expected}")
    reader = _Reader(data)
    pages = [
        (
            reader.next((heads, num_pages, PAGE_SIZE * key), layout.dtype),
            reader.next((heads, num_pages, PAGE_SIZE * value), layout.dtype),
        )
        for heads, key, value in layout.kv_shapes
    ]
    return pages, [[reader.next(shape, dtype) for shape, dtype in layout.states] for _ in range(num_states)]


class _Reader:
    def __init__(self, data: Any):
        self._data, self._at = data, 0

    def next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        start = self._at
        self._at += count * dtype.itemsize
        if start % dtype.itemsize:  # behind tensors of narrower types
            copied = bytearray(self._data[start : self._at])
            return torch.frombuffer(copied, dtype=dtype).view(shape)
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=start).view(shape)
