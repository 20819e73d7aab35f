"""Where the rank rows of an adapter lie in flat memory: pure bookkeeping over integers.

    pages of the KV pools --page_segments--> free segments --place(items)--> row numbers of each item, what stays free
                                                                  `--> None: pages_missing says how many more would do

A pool that holds rows of several widths is one flat buffer, and the rows of width W are those at multiples of W: row j
is [j W, (j + 1) W). So `buffer.view(-1, W)` is a pool of rank rows in the sense of kernels/lora.py, for each width, and
no two rows overlap as long as each one lies within a segment that was free. A page of keys and values is not one piece
of that buffer but a strip of each head; pages that follow each other are one segment per strip.

It knows no tensors, no models and no sessions.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

Segment = tuple[int, int]
"""Elements [start, end)."""


class Strip(NamedTuple):
    """One head's part of a pool of keys or values, page after page."""

    start: int
    """Element of page 0."""
    page_elements: int


class Item(NamedTuple):
    """Rank rows that belong together: an A or a B of one linear."""

    width: int
    num_rows: int


class Placement(NamedTuple):
    """Where all items lie."""

    rows: tuple[Sequence[int], ...]
    """Row numbers of each item, ascending; a range where they are a run."""
    free: list[Segment]
    """What is left, ascending."""


def place(items: Sequence[Item], free: Sequence[Segment]) -> Placement | None:
    """Find room for all rows of all items; None if there isn't enough.

    Items are kept in one run where possible, the largest first, each in the smallest segment that holds it.
    """
    left = sorted(segment for segment in free if segment[0] < segment[1])
    rows: list[Sequence[int]] = [()] * len(items)
    for index in sorted(range(len(items)), key=lambda i: -items[i].width * items[i].num_rows):
        found = _place_one(items[index], left)
        if found is None:
            return None
        rows[index] = found
    return Placement(tuple(rows), left)


def page_segments(pages: Iterable[int], strips: Sequence[Strip]) -> list[Segment]:
    """The elements of these pages, ascending."""
    runs = _runs(sorted(pages))
    segments = [
        (strip.start + first * strip.page_elements, strip.start + end * strip.page_elements)
        for strip in strips
        for first, end in runs
    ]
    return merged(segments)


def row_segments(rows: Sequence[int], width: int) -> list[Segment]:
    """The elements of these rows, ascending."""
    return [(first * width, end * width) for first, end in _runs(sorted(rows))]


def merged(segments: Iterable[Segment]) -> list[Segment]:
    """The same elements in as few segments as possible, ascending; no two of them may overlap."""
    result: list[Segment] = []
    for start, end in sorted(segments):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def pages_missing(items: Sequence[Item], strips: Sequence[Strip], pages: Sequence[int]) -> int:
    """How many pages more are needed if they follow the last of `pages` (or stand anywhere, if there are none).

    Where a run of pages begins decides how much of it is lost to alignment, so ask again once they are known.
    """
    if not items or place(items, page_segments(pages, strips)) is not None:
        return 0
    total = sum(item.width * item.num_rows for item in items)
    have = len(pages) * sum(strip.page_elements for strip in strips)
    next_page = pages[-1] + 1 if pages else 1
    low = max(1, -(-(total - have) // sum(strip.page_elements for strip in strips)))
    high = low
    while not _fits(items, strips, pages, next_page, high):
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _fits(items, strips, pages, next_page, middle):
            high = middle
        else:
            low = middle + 1
    return high


def _fits(items: Sequence[Item], strips: Sequence[Strip], pages: Sequence[int], next_page: int, count: int) -> bool:
    more = range(next_page, next_page + count)
    return place(items, page_segments({*pages, *more}, strips)) is not None


def _place_one(item: Item, left: list[Segment]) -> Sequence[int] | None:
    """Take the item's rows out of the segments that are left."""
    width, count = item
    if width * count == 0:
        return ()
    fitting = [segment for segment in left if _rows_in(segment, width) >= count]
    if fitting:
        segment = min(fitting, key=lambda it: (it[1] - it[0], it[0]))
        return _take(segment, width, count, left)
    rows: list[int] = []
    for segment in sorted(left, key=lambda it: (it[0] - it[1], it[0])):
        mine = min(count - len(rows), _rows_in(segment, width))
        if mine > 0:
            rows += _take(segment, width, mine, left)
        if len(rows) == count:
            return sorted(rows)
    return None


def _rows_in(segment: Segment, width: int) -> int:
    return segment[1] // width - -(-segment[0] // width)


def _take(segment: Segment, width: int, count: int, left: list[Segment]) -> range:
    first = -(-segment[0] // width)
    at = left.index(segment)
    rest = [(segment[0], first * width), ((first + count) * width, segment[1])]
    left[at : at + 1] = [piece for piece in rest if piece[0] < piece[1]]
    return range(first, first + count)


def _runs(numbers: Sequence[int]) -> list[Segment]:
    """[first, end) of each run of ascending numbers."""
    if not numbers:
        return []
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    return [(numbers[start], numbers[end - 1] + 1) for start, end in pairwise(cuts)]
