"""Rank rows lie where there is room, whole and apart from each other, however the free memory is cut up."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.server.blocks.rank_pages import Item, Strip, merged, page_segments, pages_missing, place, row_segments

items = st.lists(st.builds(Item, st.integers(1, 40), st.integers(0, 6)), max_size=6)
strips = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(
    lambda sizes: [Strip(64 * sum(sizes[:number]), size) for number, size in enumerate(sizes)]
)
"""Strips of 64 pages each, one behind the other, as heads of keys and of values lie in a buffer."""
pages = st.lists(st.integers(0, 63), unique=True, max_size=64)


def elements(segments):
    return [element for start, end in segments for element in range(start, end)]


@given(items=items, strips=strips, pages=pages)
def test_rows_lie_in_the_pages_and_never_overlap(items, strips, pages):
    """Each row at a multiple of its width, inside the elements of the pages; the rest is what stays free."""
    room = elements(page_segments(pages, strips))
    assert len(room) == len(set(room)) == len(pages) * sum(strip.page_elements for strip in strips)
    placement = place(items, page_segments(pages, strips))
    if placement is None:
        return
    used = []
    for item, rows in zip(items, placement.rows, strict=True):
        assert len(rows) == item.num_rows and list(rows) == sorted(rows)
        used += elements(row_segments(rows, item.width))
    assert sorted([*used, *elements(placement.free)]) == sorted(room)


@given(items=items, strips=strips, pages=pages, first=st.integers(0, 63))
def test_the_pages_that_are_missing_are_enough(items, strips, pages, first):
    """Pages that follow those given make room, and one less would not; asked again, nothing is missing."""
    count = pages_missing(items, strips, pages)
    following = range(pages[-1] + 1, pages[-1] + 1 + count) if pages else range(1, 1 + count)
    all_pages = list(dict.fromkeys([*pages, *following]))
    assert pages_missing(items, strips, all_pages) == 0
    assert place(items, page_segments(all_pages, strips)) is not None
    elsewhere = [first + page for page in range(count)]
    if not pages and count and (again := pages_missing(items, strips, elsewhere)):
        assert again <= 2 + max(item.width for item in items) // min(strip.page_elements for strip in strips)


@given(
    width=st.integers(1, 40), count=st.integers(1, 6), segments=st.lists(st.integers(0, 300), unique=True, max_size=8)
)
def test_an_item_is_a_run_where_any_segment_has_room_for_it(width, count, segments):
    """Kernels read runs as views; only where no segment is long enough an item is cut."""
    cuts = sorted(segments)
    free = list(zip(cuts[0::2], cuts[1::2], strict=False))
    placement = place([Item(width, count)], free)
    if any(end // width - -(-start // width) >= count for start, end in free):
        assert placement is not None and isinstance(placement.rows[0], range)


def test_rows_wider_than_a_page_need_pages_in_a_run():
    """Single pages of a head are too short for them, however many there are."""
    strips = [Strip(0, 16), Strip(1024, 16)]
    assert place([Item(48, 2)], page_segments(range(0, 60, 2), strips)) is None
    in_a_run = place([Item(48, 2)], page_segments(range(6), strips))
    assert in_a_run is not None and list(in_a_run.rows[0]) == [0, 1]
    assert pages_missing([Item(48, 2)], strips, list(range(0, 60, 2))) > 0


def test_segments_that_touch_become_one():
    """What was given back in pieces can be taken as a whole."""
    assert merged([(5, 7), (0, 3), (3, 5), (9, 12)]) == [(0, 7), (9, 12)]
