"""One step's rows, as the layers see them: where each row belongs, its position, and its rotary embeddings.

    [Chunk, ...] --entry/exit--> [Segment, ...] --per segment--> Step (rows of the chunks that are active there)

A `Step` is a plain object that the attention of every layer of a span holds a reference to; the runner changes what
it says between segments. It knows neither transformers nor weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swarm.errors import InvalidRequest
from swarm.kernels.paged_attention import PagedBatch, RowSpan
from swarm.kernels.ragged_attention import RaggedBatch
from swarm.server.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """New tokens of one sequence and the way they take through the span."""

    hidden_states: Tensor
    """[n, H]: hidden states of n >= 1 new tokens that enter at block `entry`."""
    position: int
    """Absolute position of the first of them: tokens [0, position) are cached already."""
    pages: Sequence[int]
    """Page table of the sequence, covering position + n tokens. The pages of two chunks of a step are disjoint
    (but for pages that neither writes)."""
    entry: int
    """First block to run, a global index."""
    exit: int
    """The block after the last one to run."""
    state: Any = None
    """What `BlockSpan.new_state` gave for this sequence; None where the span is not stateful."""
    adapter: int = -1
    """What `BlockSpan.attach` gave for the adapter of this sequence; -1 for none."""

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    def split(self) -> "list[Chunk]":
        """The same tokens, one by one."""
        return [
            replace(self, hidden_states=self.hidden_states[i : i + 1], position=self.position + i)
            for i in range(self.num_tokens)
        ]


class VirtualRows(NamedTuple):
    """Rows at positions that an adapter has put before a sequence."""

    row: int
    """The first one."""
    position: int
    """Of the first one."""
    num_rows: int
    adapter: int


class Segment(NamedTuple):
    """Blocks [start, end) that are run by the same chunks."""

    start: int
    end: int
    active: tuple[int, ...]
    """Indices of the chunks, ascending."""


def segments(batch: Sequence[Chunk]) -> list[Segment]:
    """Cut the blocks where any chunk enters or leaves; stretches that no chunk runs are left out."""
    first = batch[0]
    if all(chunk.entry == first.entry and chunk.exit == first.exit for chunk in batch):
        return [Segment(first.entry, first.exit, tuple(range(len(batch))))]
    edges = sorted({edge for chunk in batch for edge in (chunk.entry, chunk.exit)})
    cut = []
    for start, end in pairwise(edges):
        active = tuple(i for i, chunk in enumerate(batch) if chunk.entry <= start and end <= chunk.exit)
        if active:
            cut.append(Segment(start, end, active))
    return cut


class WholeRows:
    """Whole sequences from position 0 on, whose attention needs no cache and passes gradients.

    Args:
        lengths: of the sequences, in row order.
        device: of the rows.
    """

    __slots__ = ("batch", "positions_1T", "prefix")

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.batch = RaggedBatch(lengths, device)
        positions = [position for length in lengths for position in range(length)]
        self.positions_1T = torch.tensor([positions]).to(device)
        self.prefix: Prefix | None = None
        """What adapters have for the block that runs now."""


class Prefix(NamedTuple):
    """Keys and values that take the place of those of some rows."""

    rows: Tensor
    """[N] int64."""
    k_NKD: Tensor
    v_NKE: Tensor

    def put(self, k_TKD: Tensor, v_TKE: Tensor) -> tuple[Tensor, Tensor]:
        """The same with these; differentiable in both."""
        keys = k_TKD.index_copy(0, self.rows, self.k_NKD.to(k_TKD.dtype))
        return keys, v_TKE.index_copy(0, self.rows, self.v_NKE.to(v_TKE.dtype))


class Step:
    """The rows that are being run now; see the module docstring."""

    __slots__ = ("batch", "chunks", "memo", "positions_1T", "virtual", "whole")

    def __init__(self) -> None:
        self.chunks: Sequence[Chunk] = ()
        self.batch: PagedBatch
        self.positions_1T: Tensor
        self.memo: dict[Any, Any] = {}
        """What layers derive from the positions, kept for the other layers."""
        self.whole: WholeRows | None = None
        """Set while whole sequences run without a cache (`training_pass`); then there are no chunks and no batch."""
        self.virtual: Sequence[VirtualRows] = ()

    def set(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        """Describe `chunks`, in row order."""
        spans: list[RowSpan] = []
        positions: list[int] = []
        row = 0
        for chunk in chunks:
            count = chunk.num_tokens
            spans.append(RowSpan(row, count, chunk.position, chunk.pages))
            positions += range(chunk.position, chunk.position + count)
            row += count
        self.chunks = chunks
        self.batch = PagedBatch(spans, PAGE_SIZE, device)
        self.positions_1T = torch.tensor([positions]).to(device, non_blocking=True)
        self.memo = {}
        self.whole = None
        self.virtual = ()

    def set_whole(self, whole: WholeRows) -> None:
        """Describe whole sequences, in row order."""
        self.chunks = ()
        self.positions_1T = whole.positions_1T
        self.memo = {}
        self.virtual = ()
        self.whole = whole


def check_chunk(chunk: Chunk, *, start: int, end: int, hidden_size: int, num_pages: int, stateful: bool) -> None:
    """Refuse what would read or write outside the span's memory.

    Raises:
        InvalidRequest: with the number that is wrong and the one that would be right.
    """
    shape = tuple(chunk.hidden_states.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size:
        raise InvalidRequest(f"hidden states have shape {shape}, expected (at least 1, {hidden_size})")
    if not start <= chunk.entry < chunk.exit <= end:
        raise InvalidRequest(f"blocks {chunk.entry}:{chunk.exit} are outside this span, {start}:{end}")
    if chunk.position < 0:
        raise InvalidRequest(f"position {chunk.position} is negative")
    needed = -(-(chunk.position + shape[0]) // PAGE_SIZE)
    if len(chunk.pages) < needed:
        raise InvalidRequest(f"{chunk.position + shape[0]} tokens need {needed} pages, {len(chunk.pages)} given")
    if min(chunk.pages) < 0 or max(chunk.pages) >= num_pages:
        raise InvalidRequest(f"pages {min(chunk.pages)}..{max(chunk.pages)} are outside the pool of {num_pages}")
    if stateful and chunk.state is None:
        raise InvalidRequest("this span has recurrent blocks: a chunk needs the state of its sequence")
