"""Page bookkeeping: no page is lost or given away twice, and sequences never share what they write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from swarm.errors import InvalidRequest, PeerBusy
from swarm.server.pages import PAGE_SIZE, OutOfPages, PageAllocator, PageTable

NUM_PAGES = 24


class PagesMachine(RuleBasedStateMachine):
    """Random growth, truncation, forks and frees against a model in which each sequence is a list of its own tokens."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.cells = [[None] * PAGE_SIZE for _ in range(NUM_PAGES)]
        self.tokens = {}
        self.counter = 0

    @rule(target=tables)
    def open(self):
        table = PageTable(self.allocator)
        self.tokens[table] = []
        return table

    @rule(table=tables, extra=st.integers(0, 5 * PAGE_SIZE))
    def grow(self, table, extra):
        length = table.length + extra
        needed, free, before = table.pages_needed(length), self.allocator.num_free, list(table.pages)
        if needed > free:
            with pytest.raises(OutOfPages, match=f"need {needed} pages, {free} free"):
                table.grow(length)
            assert (self.allocator.num_free, list(table.pages)) == (free, before)
            return
        for source, destination in table.grow(length):
            self.cells[destination] = list(self.cells[source])
        assert self.allocator.num_free == free - needed
        for position in range(len(self.tokens[table]), length):
            self.counter += 1
            self.cells[table.pages[position // PAGE_SIZE]][position % PAGE_SIZE] = self.counter
            self.tokens[table].append(self.counter)

    @rule(table=tables, data=st.data())
    def truncate(self, table, data):
        length = data.draw(st.integers(0, table.length))
        table.truncate(length)
        del self.tokens[table][length:]

    @rule(target=tables, table=tables)
    def fork(self, table):
        other = table.fork()
        self.tokens[other] = list(self.tokens[table])
        return other

    @rule(table=consumes(tables))
    def close(self, table):
        table.free()
        assert not table.pages
        del self.tokens[table]

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for table, tokens in self.tokens.items():
            assert table.length == len(tokens)
            assert tokens == [self.cells[table.pages[i // PAGE_SIZE]][i % PAGE_SIZE] for i in range(len(tokens))]

    @invariant()
    def pages_are_free_or_owned_exactly_as_counted(self):
        owners = [0] * NUM_PAGES
        for table in self.tokens:
            assert len(set(table.pages)) == len(table.pages) == -(-table.length // PAGE_SIZE)
            for page in table.pages:
                owners[page] += 1
        assert owners == [self.allocator.references(page) for page in range(NUM_PAGES)]
        assert self.allocator.num_free == owners.count(0)
        assert self.allocator.num_free + self.allocator.num_used == NUM_PAGES

    @precondition(lambda self: not self.tokens)
    @invariant()
    def an_empty_pool_is_one_run_again(self):
        if self.allocator.num_free == NUM_PAGES:
            pages = self.allocator.allocate(NUM_PAGES)
            assert pages == list(range(NUM_PAGES))
            self.allocator.free(pages)


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPages = PagesMachine.TestCase


def test_two_growing_sequences_stay_contiguous():
    """Token-by-token growth of neighbours leaves each in one run, so that attention reads views."""
    allocator = PageAllocator(64)
    tables = [PageTable(allocator) for _ in range(3)]
    for length in range(1, 12 * PAGE_SIZE):
        for table in tables:
            table.grow(length)
    for table in tables:
        assert list(table.pages) == list(range(table.pages[0], table.pages[0] + len(table.pages)))


def test_a_scattered_pool_still_gives_all_its_pages():
    """Fragmentation costs contiguity, never capacity."""
    allocator = PageAllocator(16)
    pages = allocator.allocate(16)
    allocator.free(pages[::2])
    assert sorted(allocator.allocate(8)) == pages[::2]
    assert allocator.num_free == 0


def test_running_out_says_both_numbers_and_is_a_busy_peer():
    """The typed reply of a full pool needs no translation on its way to the client."""
    allocator = PageAllocator(2)
    with pytest.raises(PeerBusy, match="need 3 pages, 2 free"):
        allocator.allocate(3)


class Keeper:
    """Notes what was taken from it."""

    def __init__(self):
        self.evictions = []

    def evicted(self, page):
        self.evictions.append(page)


def test_kept_pages_count_as_free_and_are_taken_back_oldest_first():
    """Whoever keeps pages beyond their owners is told when they are needed."""
    allocator, keeper = PageAllocator(4), Keeper()
    pages = allocator.allocate(3)
    for page in pages:
        allocator.keep(page, keeper)
    allocator.free([pages[1], pages[0]])
    assert (allocator.num_free, allocator.num_idle, allocator.num_used) == (3, 2, 1)
    allocator.allocate(2)
    assert keeper.evictions == [pages[1]]
    allocator.share([pages[0]])
    assert allocator.num_free == 0
    with pytest.raises(OutOfPages, match="need 1 pages, 0 free"):
        allocator.allocate(1)


def test_a_keeper_may_give_up_a_group_when_one_page_of_it_is_taken():
    """What consists of several pages is worthless without one of them."""
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)

    class Group:
        def evicted(self, page):
            for other in set(pages) - {page}:
                allocator.discard(other)

    group = Group()
    for page in pages:
        allocator.keep(page, group)
    allocator.free(pages)
    assert len(allocator.allocate(2)) == 2
    assert (allocator.num_idle, allocator.num_free) == (0, 2)


def test_a_rollback_into_a_kept_page_takes_it_from_its_keeper():
    """Its only owner may write it then, without a copy."""
    allocator, keeper = PageAllocator(4), Keeper()
    table = PageTable(allocator)
    table.grow(PAGE_SIZE)
    (page,) = table.pages
    allocator.keep(page, keeper)
    table.truncate(3)
    assert keeper.evictions == [page] and table.pages_needed(4) == 0
    assert table.grow(4) == [] and list(table.pages) == [page]
    table.free()
    assert allocator.num_idle == 0


def test_a_kept_page_of_two_owners_is_copied_after_a_rollback():
    """The other one and the keeper still want what is in it, and the keeper alone, too."""
    allocator, keeper = PageAllocator(4), Keeper()
    table = PageTable(allocator)
    table.grow(PAGE_SIZE)
    (page,) = table.pages
    allocator.keep(page, keeper)
    other = table.fork()
    table.truncate(3)
    other.free()
    assert not keeper.evictions and table.pages_needed(4) == 1
    assert table.grow(4) == [(page, table.pages[0])]
    assert allocator.num_idle == 1


def test_only_whole_pages_can_be_adopted():
    """The tokens in them must be the next ones of the sequence."""
    allocator = PageAllocator(4)
    first, second = PageTable(allocator), PageTable(allocator)
    first.grow(2 * PAGE_SIZE)
    second.adopt(list(first.pages))
    assert second.length == 2 * PAGE_SIZE and allocator.num_used == 2
    second.grow(2 * PAGE_SIZE + 1)
    with pytest.raises(InvalidRequest, match="ends within a page"):
        second.adopt([first.pages[0]])


def test_an_evacuated_table_keeps_its_length_until_it_is_restored():
    """Its pages are free meanwhile."""
    allocator = PageAllocator(4)
    table = PageTable(allocator)
    table.grow(20)
    table.evacuate()
    assert (table.length, allocator.num_used) == (20, 0)
    pages = allocator.allocate(2)
    table.restore(pages)
    allocator.free(pages)
    assert (table.length, list(table.pages), allocator.num_used) == (20, pages, 2)


def test_freeing_twice_is_refused():
    """A double free would give one page to two sequences later, so it is an error at once."""
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.free(pages)
    with pytest.raises(ValueError, match="freed more often"):
        allocator.free(pages)


@pytest.mark.parametrize("change", [lambda t: t.grow(3), lambda t: t.truncate(9), lambda t: t.truncate(-1)])
def test_a_length_in_the_wrong_direction_is_refused(change):
    """Growing down and truncating up are caller mistakes."""
    table = PageTable(PageAllocator(2))
    table.grow(8)
    with pytest.raises(InvalidRequest):
        change(table)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.integers(1, 6))
def test_a_run_is_found_wherever_there_is_one(states, count):
    """Pages in use stay; of the runs without any, the one with the least recently used idle pages is taken."""

    class Keeps:
        def evicted(self, page):
            gone.append(page)

    gone, allocator = [], PageAllocator(len(states))
    pages = allocator.allocate(len(states))
    idle = [page for page, state in zip(pages, states, strict=True) if state == 1]
    for page in idle:
        allocator.keep(page, Keeps())
    allocator.free(idle)
    allocator.free([page for page, state in zip(pages, states, strict=True) if state == 0])
    windows = [range(start, start + count) for start in range(len(states) - count + 1)]
    possible = [window for window in windows if all(states[page] < 2 for page in window)]
    found = allocator.allocate_run(count)
    assert (found is None) == (not possible)
    if found is not None:
        assert range(found[0], found[-1] + 1) in possible and gone == [page for page in found if states[page] == 1]
        assert max(gone, default=-1) == min(max([p for p in it if states[p] == 1], default=-1) for it in possible)
        assert all(allocator.references(page) == 1 for page in found)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.integers(1, 6))
def test_pages_in_use_make_room_for_a_run(states, count):
    """What was in use is in other pages, with its owners and keepers; as few as can be move, and none that is fixed."""

    class Keeps:
        def evicted(self, page):
            gone.append(page)

        def moved(self, page, new):
            kept[new] = kept.pop(page)

    gone, kept, allocator = [], {}, PageAllocator(len(states))
    pages = allocator.allocate(len(states))
    by_state = [[page for page in pages if states[page] == state] for state in range(4)]
    allocator.share(by_state[2][::2])  # some have two owners
    for page in by_state[1] + by_state[2][1::2]:
        allocator.keep(page, Keeps())
    kept.update({page: page for page in by_state[2][1::2]})
    allocator.free(by_state[1] + by_state[0])
    owners = {page: allocator.references(page) for page in by_state[2]}
    windows = [range(start, start + count) for start in range(len(states) - count + 1)]
    costs = [sum(states[page] == 2 for page in it) for it in windows if all(states[page] < 3 for page in it)]
    found = allocator.clear_run(count, lambda page: states[page] == 3)
    assert (found is None) == (not costs or count > len(by_state[0]) + len(by_state[1]))
    if found is None:
        return
    run, moved = found
    assert run == list(range(run[0], run[0] + count)) and len(moved) == min(costs)
    places = {page: page for page in owners} | dict(moved)
    assert len({*places.values(), *run, *by_state[3]}) == len(places) + count + len(by_state[3])
    assert all(allocator.references(places[page]) == number for page, number in owners.items())
    assert all(allocator.references(page) == 1 for page in run) and kept == {places[old]: old for old in kept.values()}
    assert allocator.num_used == len(owners) + count + len(by_state[3])
