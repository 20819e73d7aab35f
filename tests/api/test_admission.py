"""Everybody gets a turn: rows are bounded, accounts share them, and what is too much is told when to come back."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.api.admission import Admission, Queue, Ticket
from swarm.api.errors import ApiError

events = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)) | st.integers(0, 20), max_size=40)


@given(events=events, max_waiting=st.integers(0, 6))
def test_rows_and_waiting_requests_are_bounded(events: list[tuple[str, int] | int], max_waiting: int) -> None:
    """Whoever comes and goes; and nobody is sent away while an account with more requests keeps all of its own."""
    queue = Queue(max_rows=4, max_waiting=max_waiting)
    for event in events:
        if isinstance(event, tuple):
            before = Counter(ticket.account for ticket in queue.waiting) + Counter([event[0]])
            gone = queue.arrive(Ticket(account=event[0], rows=event[1]))
            assert gone is None or before[gone.account] == max(before.values())
        elif queue.running:
            queue.leave(queue.running[event % len(queue.running)])
        while (ticket := queue.next) is not None:
            queue.start(ticket)
        assert queue.free_rows >= 0
        assert len(queue.waiting) <= max_waiting


@given(events=events)
def test_nobody_waits_without_a_reason(events: list[tuple[str, int] | int]) -> None:
    """While somebody waits, the one who is next doesn't fit; and everything ends when rows are given back."""
    queue = Queue(max_rows=4, max_waiting=100)
    for event in events:
        if isinstance(event, tuple):
            queue.arrive(Ticket(account=event[0], rows=event[1]))
        while (ticket := queue.next) is not None:
            queue.start(ticket)
        assert not queue.waiting or queue.free_rows < 4
    while queue.running:
        queue.leave(queue.running[0])
        while (ticket := queue.next) is not None:
            queue.start(ticket)
    assert not queue.waiting


def test_the_account_with_the_fewest_rows_is_next() -> None:
    """A flood of one account doesn't delay another by more than one turn."""
    queue = Queue(max_rows=2, max_waiting=10)
    flood = [Ticket(account="flood", rows=1) for _ in range(6)]
    for ticket in flood:
        queue.arrive(ticket)
        if queue.next is ticket:
            queue.start(ticket)
    late = Ticket(account="late", rows=1)
    queue.arrive(late)
    queue.leave(flood[0])
    assert queue.next is late


def test_a_full_queue_loses_the_last_of_whoever_waits_most() -> None:
    """So a flood can't keep others out."""
    queue = Queue(max_rows=1, max_waiting=2)
    tickets = [Ticket(account=name, rows=1) for name in ("flood", "flood", "flood")]
    for ticket in tickets:
        assert queue.arrive(ticket) is None
        if queue.next is ticket:
            queue.start(ticket)
    late = Ticket(account="late", rows=1)
    assert queue.arrive(late) is tickets[-1]
    assert late in queue.waiting


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    """Smaller ones for which there is room wait behind it."""
    queue = Queue(max_rows=2, max_waiting=10)
    first, large, small = (Ticket(account="a", rows=rows) for rows in (1, 2, 1))
    for ticket in (first, large, small):
        queue.arrive(ticket)
        if queue.next is ticket:
            queue.start(ticket)
    assert queue.running == [first]
    queue.leave(first)
    assert queue.next is large


def make(**settings: float) -> Admission:
    return Admission(**{"max_rows": 1, "max_waiting": 1, "max_wait_s": 60.0, **settings})  # type: ignore[arg-type]


async def test_a_turn_comes_when_another_ends() -> None:
    """And only then."""
    admission, order = make(), []

    async def one(name: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        async with admission.hold(name, 1):
            order.append(name)
            entered.set()
            await leave.wait()

    entered = [asyncio.Event(), asyncio.Event()]
    leave = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(one("a", entered[0], leave))
        await entered[0].wait()
        tasks.create_task(one("b", entered[1], leave))
        await asyncio.sleep(0)
        assert order == ["a"]
        leave.set()
    assert order == ["a", "b"]
    assert admission.queue.free_rows == 1


async def test_too_many_are_sent_away_with_a_time() -> None:
    """429, Retry-After."""
    admission = make(max_waiting=0)
    async with admission.hold("a", 1):
        with pytest.raises(ApiError) as caught:
            async with admission.hold("b", 1):
                pass
    assert caught.value.status == 429
    assert int(caught.value.headers["retry-after"]) >= 1


async def test_waiting_has_an_end() -> None:
    """A client would rather know."""
    admission = make(max_wait_s=0.0)
    async with admission.hold("a", 1):
        with pytest.raises(ApiError, match="come back later"):
            async with admission.hold("b", 1):
                pass
    assert admission.queue.waiting == [] and admission.queue.free_rows == 1


async def test_one_who_gives_up_leaves_no_trace() -> None:
    """The next one gets the turn."""
    admission = make()

    async def wait() -> None:
        async with admission.hold("b", 1):
            pass

    async with admission.hold("a", 1):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert len(admission.queue.waiting) == 1
        waiting.cancel()
        await asyncio.wait([waiting])
    assert admission.queue.waiting == [] and admission.queue.free_rows == 1


async def test_what_never_fits_is_refused_at_once() -> None:
    """Rather than waiting for ever."""
    with pytest.raises(ApiError, match="2 answers at once, at most 1"):
        async with make().hold("a", 2):
            pass
