"""Pages found by content: the same inputs find the same page, anything else finds none, and memory stays bounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.prefix_cache import PrefixCache


def inputs(count, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def outputs(seed=0):
    return inputs(PAGE_SIZE, seed)


@pytest.fixture
def allocator():
    return PageAllocator(16)


@pytest.fixture
def cache(allocator):
    return PrefixCache(allocator)


def fill(cache, allocator, rows, *, entry=0, exit=4):
    """A table with these rows whose full pages are all in the cache, and their keys."""
    keys, table = cache.keys(entry, exit), PageTable(allocator)
    keys.extend(rows)
    table.grow(len(rows))
    for number in range(len(keys)):
        cache.insert(keys[number], table.pages[number], outputs(number))
    return keys, table


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_keys_do_not_depend_on_how_the_inputs_come(counts):
    """One long prompt and the same in pieces have the same keys."""
    cache = PrefixCache(PageAllocator(4))
    rows = inputs(sum(counts))
    whole, pieces = cache.keys(0, 4), cache.keys(0, 4)
    whole.extend(rows)
    for piece in rows.split(counts):
        pieces.extend(piece)
    assert len(whole) == len(pieces) == len(rows) // PAGE_SIZE
    assert [whole[i] for i in range(len(whole))] == [pieces[i] for i in range(len(pieces))]


@given(st.integers(17, 60), st.integers(0, 60), st.integers(0, 40))
def test_keys_after_a_rollback_are_those_of_the_new_content(length, kept, more):
    """Or there are none, where the inputs of a page that was cut are not known any more; never wrong ones."""
    cache = PrefixCache(PageAllocator(4))
    kept = min(kept, length)
    rows, others = inputs(length), inputs(more, seed=1)
    keys, fresh = cache.keys(0, 4), cache.keys(0, 4)
    keys.extend(rows)
    keys.truncate(kept)
    keys.extend(others)
    fresh.extend(torch.cat([rows[:kept], others]))
    assert len(keys) <= len(fresh)
    assert [keys[i] for i in range(len(keys))] == [fresh[i] for i in range(len(keys))]
    if kept % PAGE_SIZE == 0 or kept >= length // PAGE_SIZE * PAGE_SIZE:
        assert len(keys) == len(fresh)


def test_keys_differ_with_everything_that_a_page_depends_on(cache):
    """Earlier tokens, blocks, adapter, and how the bytes are to be read."""
    rows = inputs(2 * PAGE_SIZE)
    other_start = torch.cat([inputs(PAGE_SIZE, 5), rows[PAGE_SIZE:]])
    found = set()
    for own, options in (
        (rows, (0, 4)),
        (rows, (0, 3)),
        (rows, (1, 4)),
        (rows, (0, 4, "adapter")),
        (other_start, (0, 4)),
        (rows.view(torch.int32), (0, 4)),
    ):
        keys = cache.keys(*options)
        keys.extend(own)
        found.add(keys[1])
    assert len(found) == 6


def test_another_process_has_other_keys():
    """Nobody can prepare contents for a cache whose secret it does not know."""
    rows = inputs(PAGE_SIZE)
    first, second = (PrefixCache(PageAllocator(4)).keys(0, 4) for _ in range(2))
    first.extend(rows)
    second.extend(rows)
    assert first[0] != second[0]


def test_a_page_is_found_while_it_is_used_and_after(cache, allocator):
    """With its outputs; pages that only the cache wants count as free."""
    keys, table = fill(cache, allocator, inputs(40))
    pages = list(table.pages)
    assert cache.find(keys[1], with_outputs=True)[0] == pages[1]
    table.free()
    assert allocator.num_free == 16 and allocator.num_idle == 2
    page, found = cache.find(keys[0], with_outputs=True)
    assert page == pages[0] and torch.equal(found, outputs(0))
    other = PageTable(allocator)
    other.adopt([page])
    assert other.length == PAGE_SIZE and allocator.num_used == 1


def test_pages_that_are_needed_are_taken_back_the_last_of_a_prefix_first(cache, allocator):
    """What is left of the prefix can still be found from its start."""
    keys, table = fill(cache, allocator, inputs(64))
    table.free()
    big = PageTable(allocator)
    big.grow(14 * PAGE_SIZE)
    assert [cache.find(keys[i], with_outputs=False) is not None for i in range(4)] == [True, True, False, False]
    assert cache.output_bytes == 2 * outputs().nbytes


def test_the_least_recently_used_prefix_goes_first(cache, allocator):
    """A prefix that somebody has used since stays."""
    first, table = fill(cache, allocator, inputs(32, 1))
    table.free()
    second, other = fill(cache, allocator, inputs(32, 2))
    other.free()
    again = PageTable(allocator)
    again.adopt([cache.find(first[i], with_outputs=True)[0] for i in range(2)])
    again.free()
    PageTable(allocator).grow(14 * PAGE_SIZE)
    assert cache.find(first[0], with_outputs=False) and not cache.find(second[0], with_outputs=False)


def test_a_cached_page_that_its_only_owner_will_overwrite_is_found_no_more(cache, allocator):
    """A rollback into it makes it the owner's again; if somebody else has it, the owner gets a copy."""
    keys, table = fill(cache, allocator, inputs(32))
    shared = table.pages[1]
    other = table.fork()
    table.truncate(20)
    ((source, destination),) = table.grow(22)
    assert (source, table.pages[1]) == (shared, destination)
    assert cache.find(keys[1], with_outputs=True)[0] == shared
    other.truncate(20)
    assert other.grow(22) == [] and cache.find(keys[1], with_outputs=False) is None
    assert cache.output_bytes == outputs().nbytes


def test_outputs_have_a_budget(allocator):
    """Beyond it the oldest go; their pages serve those who do not want the outputs, until these come again."""
    cache = PrefixCache(allocator, output_bytes=2 * outputs().nbytes)
    keys, table = fill(cache, allocator, inputs(48))
    assert cache.output_bytes == 2 * outputs().nbytes
    assert cache.find(keys[0], with_outputs=True) is None
    assert cache.find(keys[0], with_outputs=False) == (table.pages[0], None)
    cache.insert(keys[0], table.pages[0], outputs(0))
    assert cache.find(keys[0], with_outputs=True) is not None
    assert cache.output_bytes == 2 * outputs().nbytes


def test_the_second_with_a_content_does_not_replace_the_first(cache, allocator):
    """Both have computed it at the same time; the page of the second is its own and is blank when it leaves."""
    keys, first = fill(cache, allocator, inputs(16))
    _, second = fill(cache, allocator, inputs(16))
    assert cache.find(keys[0], with_outputs=True)[0] == first.pages[0]
    second.free()
    assert allocator.num_idle == 0


def test_idle_pages_leave_part_of_the_pool_blank(cache, allocator):
    """So that sequences find long runs to grow in."""
    _, table = fill(cache, allocator, inputs(16 * PAGE_SIZE))
    table.free()
    cache.trim()
    assert allocator.num_idle == 8 and allocator.num_free == 16
