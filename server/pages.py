"""Who owns which page of the KV cache: a refcounting allocator and one page table per sequence.

Pure bookkeeping over integers. It does not know tensors, layers, sessions or time: whoever owns the pools executes the
(source, destination) copies that `PageTable.grow` returns, in order, before it writes the new tokens.

    PageTable.grow(length) --allocate/share/free--> PageAllocator <--keep/discard-- Keeper (prefix cache, ...)
         |                                            pages [0, num_pages), refcounts, free runs, idle pages
         +--> copies [(src, dst), ...]  (copy-on-write: no page is written that others own or keep)

A page without owners whose content somebody may want again is *idle*: it counts as free, and is taken back from its
keeper, least recently used first, when free pages run out. A sequence's pages are kept in one contiguous ascending run
where possible: then the CPU attention reads the cache as a view instead of gathering it.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from swarm.errors import InvalidRequest, PeerBusy

PAGE_SIZE = 16
"""Tokens per page."""


class OutOfPages(PeerBusy):
    """The pool has fewer free pages than a sequence needs; the message has both numbers."""


class Keeper(Protocol):
    """Who wants the content of pages that nobody owns, as long as there is room."""

    def evicted(self, page: int) -> None:
        """The page is needed and gone; its keeper may `discard` others that are worthless without it."""

    def moved(self, page: int, new: int) -> None:
        """What was in this page, which is in use, is in a new one from now on."""


class PageAllocator:
    """Refcounts of a fixed pool of pages, with the free pages kept as maximal runs.

    A new sequence starts in the middle of the largest free run (unless that run has no used page before it), so that
    it and its left neighbour both have room to grow in place.

    Args:
        num_pages: size of the pool.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise InvalidRequest(f"a page pool needs at least 1 page, not {num_pages}")
        self._references = [0] * num_pages
        self._starts = [0]
        self._ends = {0: num_pages}
        self._num_blank = num_pages
        self._keepers: dict[int, Keeper] = {}
        self._idle: OrderedDict[int, Keeper] = OrderedDict()

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages without owners, idle ones included."""
        return self._num_blank + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages without owners whose content is kept."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def references(self, page: int) -> int:
        """How many owners `page` has; 0 for a free page."""
        return self._references[page]

    def must_stay(self, page: int) -> bool:
        """Whether `page`, which has an owner, must not be written: others own it, or its content is kept."""
        return self._references[page] > 1 or page in self._keepers

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` pages, each then owned once.

        Args:
            count: pages wanted, >= 0.
            after: the last page that the sequence owns already; the run right behind it is preferred.

        Raises:
            OutOfPages: nothing is taken then.
        """
        if count > self.num_free:
            raise OutOfPages(f"need {count} pages, {self.num_free} free")
        while self._num_blank < count:
            self._evict(next(iter(self._idle)))
        pages: list[int] = []
        while len(pages) < count:
            behind = pages[-1] if pages else after
            first, length = self._place(count - len(pages), behind)
            self._take(first, length)
            pages.extend(range(first, first + length))
        return pages

    def allocate_run(self, count: int, *, may_evict: bool = True) -> list[int] | None:
        """Take `count` >= 1 pages in one run, near the end of the pool, where they are least in the way of sequences.

        Args:
            count: pages wanted.
            may_evict: whether idle pages may go for it; of all runs, that whose idle pages are least recently used.

        Returns:
            The pages, each then owned once; None where there is no such run.
        """
        fitting = [start for start in self._starts if self._ends[start] - start >= count]
        if fitting:
            start = min(fitting, key=lambda start: (self._ends[start] - start, -start))
            first = self._ends[start] - count
        elif may_evict and (found := self._evictable_run(count)) is not None:
            first = found
            for page in range(first, first + count):
                if page in self._idle:
                    self._evict(page)
        else:
            return None
        self._take(first, count)
        return list(range(first, first + count))

    def clear_run(self, count: int, is_fixed: Callable[[int], bool]) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Take `count` >= 1 pages in one run although some are in use: these become others, where there is room.

        Args:
            count: pages wanted.
            is_fixed: whether a page that is in use must stay where it is.

        Returns:
            The pages, each then owned once, and (old, new) of those that were in use: their owners and keepers have the
            new ones now, and the owners must be told. None where there is no such run, or no room.
        """
        if count > self.num_free or (first := self._movable_run(count, is_fixed)) is None:
            return None
        pages = range(first, first + count)
        in_use = [page for page in pages if self._references[page]]
        for page in pages:
            if page in self._idle:
                self._evict(page)
        for start, length in _runs(page for page in pages if not self._references[page]):
            self._take(start, length)
        while self._num_blank < len(in_use):
            self._evict(next(iter(self._idle)))
        return list(pages), [(page, self._give_way(page)) for page in in_use]

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each of `pages`, all of which must be in use or idle."""
        for page in pages:
            if self._references[page] == 0 and self._idle.pop(page, None) is None:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Remove one owner from each of `pages`; a page without owners becomes idle or returns to the pool."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is freed more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                keeper = self._keepers.get(page)
                if keeper is not None:
                    self._idle[page] = keeper
                else:
                    self._release(page)

    def keep(self, page: int, keeper: Keeper) -> None:
        """Let a page in use become idle, and not blank, when its last owner has gone."""
        if self._references[page] == 0:
            raise ValueError(f"page {page} is free and cannot be kept")
        self._keepers[page] = keeper

    def discard(self, page: int) -> None:
        """Nobody wants the content of this page any more, but for its owners."""
        del self._keepers[page]
        if self._idle.pop(page, None) is not None:
            self._release(page)

    def take_over(self, page: int) -> None:
        """Its owner is about to write this page: where there is no other one, nobody keeps it any more."""
        if self._references[page] == 1 and page in self._keepers:
            self._evict(page)

    def trim(self, max_idle: int) -> None:
        """Take back the least recently used idle pages until no more than `max_idle` are left."""
        while len(self._idle) > max_idle:
            self._evict(next(iter(self._idle)))

    def _evict(self, page: int) -> None:
        keeper = self._keepers[page]
        self.discard(page)
        keeper.evicted(page)

    def _evictable_run(self, count: int) -> int | None:
        """First page of the run without owners whose most recently used page was used longest ago."""
        used_at = {page: number for number, page in enumerate(self._idle)}
        best, best_age = None, len(used_at)
        newest: deque[tuple[int, int]] = deque()  # (page, use) of the window, uses descending
        length = 0
        for page, references in enumerate(self._references):
            length = 0 if references else length + 1
            if not length:
                newest.clear()
                continue
            use = used_at.get(page, -1)
            while newest and newest[-1][1] <= use:
                newest.pop()
            newest.append((page, use))
            if newest[0][0] <= page - count:
                newest.popleft()
            if length >= count and newest[0][1] <= best_age:
                best, best_age = page - count + 1, newest[0][1]
        return best

    def _movable_run(self, count: int, is_fixed: Callable[[int], bool]) -> int | None:
        """First page of the run with the fewest pages in use, none of them fixed, nearest to the end."""
        best, best_cost, length, cost = None, count + 1, 0, 0
        for page, references in enumerate(self._references):
            if references and is_fixed(page):
                length = cost = 0
                continue
            length, cost = length + 1, cost + (references > 0)
            if length > count:
                cost -= self._references[page - count] > 0
            if length >= count and cost <= best_cost:
                best, best_cost = page - count + 1, cost
        return best

    def _give_way(self, page: int) -> int:
        """What is in this page will be in another one, in the smallest hole that there is; the page is owned once."""
        new = min(self._starts, key=lambda start: self._ends[start] - start)
        self._take(new, 1)
        self._references[new], self._references[page] = self._references[page], 1
        if (keeper := self._keepers.pop(page, None)) is not None:
            self._keepers[new] = keeper
            keeper.moved(page, new)
        return new

    def _place(self, count: int, behind: int | None) -> tuple[int, int]:
        """(first page, length <= count) of the best place for a run of `count` pages."""
        if behind is not None and behind + 1 in self._ends:
            first = behind + 1
            return first, min(count, self._ends[first] - first)
        first = max(self._starts, key=lambda start: self._ends[start] - start)
        room = self._ends[first] - first
        if room <= count:
            return first, room
        return (first + (room - count) // 2 if first > 0 else first), count

    def _take(self, first: int, length: int) -> None:
        """Cut pages [first, first + length) out of the free run that holds them."""
        start = self._starts[bisect_right(self._starts, first) - 1]
        end = self._ends.pop(start)
        self._starts.remove(start)
        for piece_start, piece_end in ((start, first), (first + length, end)):
            if piece_start < piece_end:
                insort(self._starts, piece_start)
                self._ends[piece_start] = piece_end
        for page in range(first, first + length):
            self._references[page] = 1
        self._num_blank -= length

    def _release(self, page: int) -> None:
        """Give one page back, merged with the free runs on both sides of it."""
        start, end = page, page + 1
        index = bisect_left(self._starts, page)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends.pop(self._starts.pop(index))
        if index > 0 and self._ends[self._starts[index - 1]] == page:
            start = self._starts.pop(index - 1)
        insort(self._starts, start)
        self._ends[start] = end
        self._num_blank += 1


class PageTable:
    """The pages of one sequence, in token order: token i lies in `pages[i // PAGE_SIZE]`.

    Args:
        allocator: the pool that the pages come from.
    """

    def __init__(self, allocator: PageAllocator):
        self._allocator = allocator
        self._pages: list[int] = []
        self._length = 0

    @property
    def pages(self) -> Sequence[int]:
        return self._pages

    @property
    def length(self) -> int:
        """Tokens that the sequence holds."""
        return self._length

    def pages_needed(self, length: int) -> int:
        """Free pages that `grow(length)` would take, copies included."""
        return max(0, _num_pages(length) - len(self._pages)) + self._must_copy(length)

    def grow(self, length: int) -> list[tuple[int, int]]:
        """Make room for tokens [self.length, length), all of which may then be written.

        Returns:
            Page copies (source, destination) to execute in order before the new tokens are written.

        Raises:
            InvalidRequest: if `length` is less than the present one.
            OutOfPages: the table is unchanged then.
        """
        if length < self._length:
            raise InvalidRequest(f"cannot grow a sequence from {self._length} to {length} tokens")
        needed = self.pages_needed(length)
        if needed > self._allocator.num_free:
            raise OutOfPages(f"need {needed} pages, {self._allocator.num_free} free")
        copies = [self._own_last_page()] if self._must_copy(length) else []
        missing = _num_pages(length) - len(self._pages)
        if missing > 0:
            self._pages += self._allocator.allocate(missing, after=self._pages[-1] if self._pages else None)
        self._length = length
        return copies

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, free the pages that held nothing else, and take over a partial one.

        Raises:
            InvalidRequest: if `length` is negative or more than the present one.
        """
        if not 0 <= length <= self._length:
            raise InvalidRequest(f"cannot truncate a sequence of {self._length} tokens to {length}")
        keep = _num_pages(length)
        self._allocator.free(reversed(self._pages[keep:]))
        del self._pages[keep:]
        self._length = length
        if length % PAGE_SIZE:
            self._allocator.take_over(self._pages[-1])

    def fork(self) -> "PageTable":
        """A second sequence with the same tokens. Pages are shared until one of the two grows into its last page."""
        other = PageTable(self._allocator)
        self._allocator.share(self._pages)
        other._pages = list(self._pages)
        other._length = self._length
        return other

    def adopt(self, pages: Sequence[int]) -> None:
        """Add full pages that hold the next tokens of this sequence already, each then with one owner more.

        Raises:
            InvalidRequest: the last page of the sequence is not full.
        """
        if self._length % PAGE_SIZE:
            raise InvalidRequest(f"a sequence of {self._length} tokens ends within a page")
        self._allocator.share(pages)
        self._pages += pages
        self._length += len(pages) * PAGE_SIZE

    def free(self) -> None:
        """Give all pages back; the table is empty afterwards."""
        self.truncate(0)

    def evacuate(self) -> None:
        """Give all pages back but remember the length; until `restore` the table can only be freed."""
        self._allocator.free(reversed(self._pages))
        self._pages = []

    def expect(self, length: int) -> None:
        """An empty table becomes one that has given its pages back: `restore` brings those of `length` tokens.

        Raises:
            InvalidRequest: the sequence has tokens.
        """
        if self._length:
            raise InvalidRequest(f"the sequence has {self._length} tokens already")
        self._length = length

    def restore(self, pages: Sequence[int]) -> None:
        """Hold these pages, each then with one owner more, in place of those given back."""
        self._allocator.share(pages)
        self._pages = list(pages)

    def relocate(self, moved: Mapping[int, int]) -> None:
        """Some pages have become others; the allocator knows it."""
        self._pages = [moved.get(page, page) for page in self._pages]

    def _must_copy(self, length: int) -> bool:
        """Whether growing to `length` writes into a last page that others own or want, too."""
        writes_last = length > self._length and self._length % PAGE_SIZE != 0
        return writes_last and self._allocator.must_stay(self._pages[-1])

    def _own_last_page(self) -> tuple[int, int]:
        shared = self._pages[-1]
        (own,) = self._allocator.allocate(1, after=self._pages[-2] if len(self._pages) > 1 else None)
        self._allocator.free([shared])
        self._pages[-1] = own
        return shared, own


def _runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of each run of ascending pages."""
    first = last = None
    for page in pages:
        if last is None or page != last + 1:
            if first is not None and last is not None:
                yield first, last + 1 - first
            first = page
        last = page
    if first is not None and last is not None:
        yield first, last + 1 - first


def _num_pages(length: int) -> int:
    return -(-length // PAGE_SIZE)
