"""What the device thread keeps of a session: its rows in the cache, and the work that waits for them.

    CachedSession ── rows ─► CachedSequence: pages, recurrent state, keys of its pages
                  ├─ jobs ─► Job: one Work and how far it has come; the first is the one that runs
                  └─ swapped ─► its pages are in host memory

Bookkeeping of one session; the scheduler decides whose turn it is, and `server.memory` who gets pages.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.errors import SwarmError
from swarm.server.host_pages import Swapped
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.prefix_cache import PageKeys
from swarm.server.work import SessionListener, Work
from swarm.types import BlockRange


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSequence:
    """One row of a session on this server."""

    table: PageTable
    state: Any = None
    """What `BlockSpan.new_state` gave: recurrent state, where the span has any."""
    keys: PageKeys | None = None
    """Keys of its full pages; None where prefixes aren't shared."""
    tail: torch.Tensor | None = None
    """Outputs of the tokens in its last page, as far as the page is to be cached with them."""

    def fork(self) -> "CachedSequence":
        """A second sequence with the same tokens."""
        state = None if self.state is None else self.state.fork()  # first: there may be no memory for it
        keys = None if self.keys is None else self.keys.fork()
        return CachedSequence(table=self.table.fork(), state=state, keys=keys, tail=self.tail)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, where there are any, and the keys of those that never ran."""
        if length < self.table.length:
            self.table.truncate(length)
            self.tail = None
        if self.keys is not None:
            self.keys.truncate(self.table.length)


class Job:
    """One piece of work and how far it has come."""

    __slots__ = ("allowance", "inputs", "is_decode", "is_started", "left", "num_left", "ready_since", "work")

    def __init__(self, work: Work, now: float):
        counts = work.num_tokens
        self.work = work
        self.ready_since = now
        """Since when it could run, but for others."""
        self.is_started = False
        """Whether its step's order and base have been applied."""
        self.is_decode = max(counts) <= 1
        self.left = list(counts)
        """Tokens of each row that did not run yet."""
        self.num_left = sum(counts)
        self.allowance = 0
        """Tokens that the pages allow in the batch that is being made."""
        hidden = work.hidden_states
        self.inputs: Sequence[torch.Tensor] = (hidden,) if len(counts) == 1 else hidden.split(list(counts))

    def take(self, row: int, count: int) -> torch.Tensor:
        """The next inputs of a row, which count as run from now on."""
        inputs, left = self.inputs[row], self.left[row]
        self.left[row] = left - count
        self.num_left -= count
        if count == left == len(inputs):
            return inputs
        done = len(inputs) - left
        return inputs[done : done + count]


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSession:
    """The cache and the work of one session; see the module."""

    blocks: BlockRange
    client: str
    """Who is served with it, for fairness."""
    listener: SessionListener
    rows: list[CachedSequence]
    adapters: tuple[str | None, ...] = ()
    """The adapter of each row; empty where no row has one."""
    share: float = 1.0
    """Part of the span's blocks that it runs."""
    jobs: deque[Job] = field(default_factory=deque)
    swapped: Swapped | None = None
    error: SwarmError | None = None
    """Why its cache can't be used any more."""
    starved_since: float | None = None
    """Since when it has wanted pages and got none."""
    told_at: float = 0.0
    """When its listener was told so."""
    last_used: float = 0.0
    turn_tokens: int = 0
    """Tokens that ran since it got its first pages, or got them back."""
    holds_adapters: bool = False
    """Whether its adapters are kept on the device for it; `server.residency` says so."""
    last_step: int = -1
    """Step of the latest work; the loop's own."""
    held_back: list[Work] | None = None
    """Work that waits for its adapters to be in host memory; the loop's own."""
    is_closed: bool = False
    """Whether its listener wants to hear nothing any more; the loop's own."""

    @property
    def job(self) -> Job:
        return self.jobs[0]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(row.table.length for row in self.rows)

    @property
    def has_pages(self) -> bool:
        return any(row.table.pages for row in self.rows)

    def start(self) -> None:
        """Apply the order and the rollback of the first job's step, if that is still to be done."""
        job = self.job
        if job.is_started:
            return
        work = job.work
        if work.order is not None:
            self._reorder(work.order)
        if work.base is not None:
            for row, base in zip(self.rows, work.base, strict=True):
                row.truncate(base)
        job.is_started = True
        for row, inputs in zip(self.rows, job.inputs, strict=True):
            if row.keys is not None:
                if job.is_decode:
                    row.keys.stop()
                else:
                    row.keys.extend(inputs)

    def free(self) -> None:
        """Give everything back."""
        self.jobs.clear()
        self.swapped = None
        for row in self.rows:
            row.table.free()
            row.state = row.tail = None

    def pages(self) -> list[int]:
        """The different pages of all rows."""
        return list(dict.fromkeys(page for row in self.rows for page in row.table.pages))

    def num_own_pages(self, allocator: PageAllocator) -> int:
        """Pages that would be free if it gave up its own."""
        counts: dict[int, int] = {}
        for row in self.rows:
            for page in row.table.pages:
                counts[page] = counts.get(page, 0) + 1
        return sum(allocator.references(page) == count for page, count in counts.items())

    def swap_out(self, num_bytes: int) -> list[int]:
        """Give the pages back, to be restored later; returns those whose content must be saved before."""
        pages = self.pages()
        index = {page: number for number, page in enumerate(pages)}
        layouts = tuple(tuple(index[page] for page in row.table.pages) for row in self.rows)
        self.swapped = Swapped(num_pages=len(pages), layouts=layouts, num_bytes=num_bytes)
        for row in self.rows:
            row.table.evacuate()
        return pages

    def swap_in(self, allocator: PageAllocator) -> list[int]:
        """Take pages again; returns those into which the saved content goes."""
        assert self.swapped is not None
        pages = allocator.allocate(self.swapped.num_pages)
        for row, layout in zip(self.rows, self.swapped.layouts, strict=True):
            row.table.restore([pages[number] for number in layout])
        allocator.free(pages)  # the rows own them now
        self.swapped, self.turn_tokens = None, 0
        return pages

    def _reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row `order[i]` was."""
        kept: set[int] = set()
        rows: list[CachedSequence] = []
        forks: list[CachedSequence] = []
        try:
            for old in order:
                if old in kept:
                    forks.append(self.rows[old].fork())
                rows.append(forks[-1] if old in kept else self.rows[old])
                kept.add(old)
        except BaseException:  # out of memory for a recurrent state
            for fork in forks:
                fork.table.free()
            raise
        for index, row in enumerate(self.rows):
            if index not in kept:
                row.table.free()
        self.rows = rows


def pages_to_grow(sequence: CachedSequence, count: int) -> int:
    """Pages that `count` more tokens of a row take."""
    table = sequence.table
    return table.pages_needed(table.length + count)


def tokens_within(sequence: CachedSequence, num_pages: int) -> int:
    """Tokens that a row can take with so many more pages."""
    table = sequence.table
    room = -table.length % PAGE_SIZE
    must_copy = room > 0 and table.pages_needed(table.length + 1) > 0
    if must_copy:
        if not num_pages:
            return 0
        num_pages -= 1
    return room + num_pages * PAGE_SIZE
