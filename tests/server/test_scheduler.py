"""Batches under a token budget and a page limit: every step gets its own outputs, whatever shares the batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import PeerBusy
from swarm.protocol import DType, Step, TensorSpec
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.scheduler import PAGE_WAIT_S, Batch, CachedSequence, CachedSession, Job, Scheduler
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 2)


def make_session(allocator: PageAllocator, rows: int = 1) -> CachedSession:
    return CachedSession(
        blocks=BLOCKS, rows=[CachedSequence(table=PageTable(allocator), state=None) for _ in range(rows)]
    )


def make_job(session: CachedSession, counts, *, positions=None, outputs=None, order=None, value=0.0) -> Job:
    positions = positions if positions is not None else [0] * len(counts)
    step = Step(
        step_id=0,
        positions=tuple(positions),
        num_tokens=tuple(counts),
        num_outputs=tuple(counts if outputs is None else outputs),
        order=order,
        hidden_states=TensorSpec(DType.FLOAT32, (sum(counts), 1)),
    )
    hidden = torch.arange(sum(counts), dtype=torch.float32).view(-1, 1) + value
    return Job(session=session, step=step, hidden_states=hidden, arrived=0.0)


def run(scheduler: Scheduler, batch: Batch) -> list[Job]:
    """Stands for the blocks: outputs are inputs plus one."""
    return scheduler.finish(batch, [chunk.hidden_states + 1 for chunk in batch.chunks], compute_s=0.5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_step_gets_its_own_outputs_and_no_page_is_lost(data):
    """Any mix of steps of any sizes is run to its end within the budget, and closing frees every page."""
    allocator = PageAllocator(64)
    budget = data.draw(st.integers(1, 9))
    scheduler = Scheduler(allocator, token_budget=budget)
    jobs = []
    for index in range(data.draw(st.integers(1, 6))):
        counts = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(sum))
        outputs = [data.draw(st.integers(0, count)) for count in counts]
        job = make_job(make_session(allocator, len(counts)), counts, outputs=outputs, value=100.0 * index)
        jobs.append(job)
        scheduler.submit(job)
    done: list[Job] = []
    while scheduler.num_jobs:
        batch = scheduler.schedule(now=0.0)
        assert 0 < batch.num_tokens <= budget
        assert not batch.refused
        done += run(scheduler, batch)
    assert {id(job) for job in done} == {id(job) for job in jobs}
    for job in jobs:
        pieces = zip(job.hidden_states.split(list(job.step.num_tokens)), job.step.num_outputs, strict=True)
        expected = torch.cat([piece[len(piece) - wanted :] + 1 for piece, wanted in pieces])
        if len(expected):
            assert torch.equal(job.result(), expected)
        scheduler.cancel(job.session)
    assert allocator.num_used == 0


def test_decode_steps_go_before_a_prompt_and_share_its_batch():
    """A prompt that came first fills only what decoding leaves of the budget."""
    allocator = PageAllocator(64)
    scheduler = Scheduler(allocator, token_budget=8)
    prompt = make_job(make_session(allocator), [20])
    decodes = [make_job(make_session(allocator), [1]) for _ in range(3)]
    for job in (prompt, *decodes):
        scheduler.submit(job)
    batch = scheduler.schedule(now=0.0)
    assert [(row.job is prompt, len(row.chunk.hidden_states)) for row in batch.rows] == [
        (False, 1),
        (False, 1),
        (False, 1),
        (True, 5),
    ]
    assert {id(job) for job in run(scheduler, batch)} == {id(job) for job in decodes}


def test_a_step_without_pages_waits_and_runs_when_pages_are_freed():
    """Nothing is scheduled while the pool is full; closing another session lets the step run."""
    allocator = PageAllocator(2)
    scheduler = Scheduler(allocator)
    first, second = make_session(allocator), make_session(allocator)
    scheduler.submit(make_job(first, [2 * PAGE_SIZE]))
    run(scheduler, scheduler.schedule(now=0.0))
    scheduler.submit(make_job(second, [1]))
    assert not scheduler.schedule(now=1.0).rows and not scheduler.can_progress
    scheduler.cancel(first)
    assert scheduler.can_progress and len(scheduler.schedule(now=2.0).rows) == 1


def test_a_step_that_waits_too_long_is_refused_with_both_numbers():
    """After PAGE_WAIT_S without a page the step ends with PeerBusy that names pages needed and free."""
    allocator = PageAllocator(2)
    scheduler = Scheduler(allocator)
    scheduler.submit(make_job(make_session(allocator), [2 * PAGE_SIZE]))
    run(scheduler, scheduler.schedule(now=0.0))
    late = make_job(make_session(allocator), [PAGE_SIZE + 1])
    scheduler.submit(late)
    assert scheduler.schedule(now=5.0).refused == ()
    assert scheduler.next_deadline() == 5.0 + PAGE_WAIT_S
    assert scheduler.schedule(now=5.0 + PAGE_WAIT_S - 0.1).refused == ()
    ((job, error),) = scheduler.schedule(now=5.0 + PAGE_WAIT_S).refused
    assert job is late and isinstance(error, PeerBusy) and "need 2 pages, 0 free" in str(error)
    assert scheduler.num_jobs == 0


def test_beams_share_pages_and_copy_only_the_last_one():
    """Two rows that continue the same one share its full pages; the partial page is copied before it is written."""
    allocator = PageAllocator(16)
    scheduler = Scheduler(allocator)
    session = make_session(allocator, rows=2)
    scheduler.submit(make_job(session, [PAGE_SIZE + 3, 1]))
    run(scheduler, scheduler.schedule(now=0.0))
    scheduler.submit(make_job(session, [1, 1], positions=[PAGE_SIZE + 3] * 2, order=(0, 0)))
    batch = scheduler.schedule(now=0.0)
    first, second = (row.chunk.pages for row in batch.rows)
    assert first[0] == second[0] and first[1] != second[1]
    assert len(batch.copies) == 1 and allocator.num_used == 3
    run(scheduler, batch)
    scheduler.cancel(session)
    assert allocator.num_used == 0


def test_decode_rows_of_many_leave_a_share_to_a_waiting_prompt():
    """However many rows decode, a prompt makes progress in every batch; without one they get the whole budget."""
    allocator = PageAllocator(64)
    scheduler = Scheduler(allocator, token_budget=8)
    many = make_session(allocator, rows=20)
    scheduler.submit(make_job(many, [1] * 20))
    assert scheduler.schedule(now=0.0).num_tokens == 8
    prompt = make_job(make_session(allocator), [20])
    scheduler.submit(prompt)
    batch = scheduler.schedule(now=0.0)
    assert sum(len(row.chunk.hidden_states) for row in batch.rows if row.job is prompt) == 2


def test_a_prompt_that_waits_for_its_turn_is_not_refused():
    """Only a want of pages has a deadline; a long queue has none."""
    allocator = PageAllocator(64)
    scheduler = Scheduler(allocator, token_budget=4)
    for _ in range(3):
        scheduler.submit(make_job(make_session(allocator), [8]))
    now = 0.0
    while scheduler.num_jobs:
        batch = scheduler.schedule(now)
        assert not batch.refused
        run(scheduler, batch)
        now += PAGE_WAIT_S


class Unforkable:
    """A recurrent state for whose copy there is no memory."""

    def fork(self):
        raise MemoryError("no room")


def test_a_step_whose_states_cannot_be_copied_fails_alone():
    """The step is refused, nobody else's, and no page is lost."""
    allocator = PageAllocator(8)
    scheduler = Scheduler(allocator)
    session = make_session(allocator, rows=2)
    scheduler.submit(make_job(session, [1, 1]))
    run(scheduler, scheduler.schedule(now=0.0))
    session.rows[0].state = Unforkable()
    bad = make_job(session, [1, 1], positions=[1, 1], order=(0, 0))
    good = make_job(make_session(allocator), [1])
    for job in (bad, good):
        scheduler.submit(job)
    batch = scheduler.schedule(now=0.0)
    assert [job for job, _ in batch.refused] == [bad] and [row.job for row in batch.rows] == [good]
    scheduler.cancel(session)
    scheduler.cancel(good.session)
    assert allocator.num_used == 0
