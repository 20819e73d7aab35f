"""The device thread: outputs go to whom they belong, and what fails there never leaves anybody waiting."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import torch

from swarm.errors import PeerBusy, PeerError
from swarm.server.executor import Executor
from swarm.server.pages import PAGE_SIZE
from swarm.server.work import Work
from tests.server.fake_span import BLOCKS, FakeSpan, expected, inputs


class Listener:
    """Collects what a session is told."""

    def __init__(self):
        self.produced_all = []
        self.errors = []
        self.waits = []
        self.changed = asyncio.Event()

    def produced(self, produced):
        self.produced_all.append(produced)
        self.changed.set()

    def failed(self, step_id, error):
        self.errors.append(error)
        self.changed.set()

    def waiting(self, step_id, expected_s):
        self.waits.append(expected_s)
        self.changed.set()

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def done(self, num_tokens):
        await self.until(lambda: self.errors or sum(it.num_tokens for it in self.produced_all) >= num_tokens)
        if self.errors:
            raise self.errors[0]

    def outputs(self, row=0):
        pieces = [it for produced in self.produced_all for it in produced.rows if it.row == row]
        return torch.cat([piece.hidden_states for piece in sorted(pieces, key=lambda piece: piece.position)])


@asynccontextmanager
async def running(span, **options):
    executor = Executor(span, asyncio.get_running_loop(), **options)
    executor.start()
    yield executor
    await executor.stop()


def work(tokens, *, step=0, base=0, outputs_from=0):
    return Work(
        step_id=step,
        order=None,
        base=None if base is None else (base,),
        num_tokens=(len(tokens),),
        outputs_from=(outputs_from,),
        hidden_states=inputs(tokens),
    )


def open_session(executor, client="a", rows=1):
    listener = Listener()
    return executor.open(BLOCKS, rows, client=client, listener=listener), listener


TOKENS = torch.arange(3.0, 43.0)


async def test_a_prompt_streams_batch_by_batch_and_its_pages_return():
    """Outputs come as batches finish, only those that are wanted; closing frees what the session held."""
    async with running(FakeSpan(), token_budget=16) as executor:
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS, outputs_from=20))
        await listener.done(len(TOKENS))
        assert [it.num_tokens for it in listener.produced_all] == [16, 16, 8]
        assert [len(it.rows) for it in listener.produced_all] == [0, 1, 1]
        assert torch.equal(listener.outputs(), expected(TOKENS, BLOCKS)[20:])
        assert await executor.pages_in_use() == 3
        executor.close(session)
        assert await executor.pages_in_use() == 0


async def test_queued_works_of_a_session_run_in_order():
    """Several steps given at once, one of which rolls back, end as if they had come one by one."""
    async with running(FakeSpan(), token_budget=16) as executor:
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS[:30]))
        executor.submit(session, work(TOKENS[30:], base=None))
        executor.submit(session, work(TOKENS[:3], step=1, base=20, outputs_from=20))
        await listener.done(43)
        last = [it for it in listener.produced_all if it.step_id == 1]
        tokens = torch.cat([TOKENS[:20], TOKENS[:3]])
        assert torch.equal(last[-1].rows[0].hidden_states, expected(tokens, BLOCKS)[20:])
        executor.close(session)
        assert await executor.pages_in_use() == 0


async def test_small_outputs_do_not_keep_a_large_batch_alive():
    """A row of a batch is stored for a long time by whoever sends it on; it owns just its own memory."""
    async with running(FakeSpan()) as executor:
        pairs = [open_session(executor, client) for client in "abc"]
        for session, _ in pairs:
            executor.submit(session, work(TOKENS, outputs_from=39))
        for _, listener in pairs:
            await listener.done(40)
            tensor = listener.produced_all[-1].rows[0].hidden_states
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


async def test_dropped_work_is_not_run():
    """What is queued of an abandoned step vanishes; the next step begins where it began."""
    span = FakeSpan()
    async with running(span) as executor:
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS))
        executor.submit(session, work(TOKENS, step=1, base=40))
        executor.drop_queued(session)
        executor.submit(session, work(TOKENS[:5], step=2, base=0))
        await listener.until(lambda: any(it.step_id == 2 for it in listener.produced_all))
        assert torch.equal(listener.produced_all[-1].rows[0].hidden_states, expected(TOKENS[:5], BLOCKS))


async def test_blocks_that_fail_fail_the_session_and_not_the_thread(caplog):
    """The listener gets a PeerError that tells nothing of our insides; another session runs."""
    span = FakeSpan()
    async with running(span) as executor:
        span.failure = RuntimeError("secret detail")
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS))
        with pytest.raises(PeerError) as caught:
            await listener.done(1)
        assert "secret" not in str(caught.value) and "secret" in caplog.text
        span.failure = None
        executor.submit(session, work(TOKENS, step=1))
        await listener.until(lambda: len(listener.errors) == 2)
        other, other_listener = open_session(executor)
        executor.submit(other, work(TOKENS))
        await other_listener.done(40)
        executor.close(session)
        executor.close(other)
        assert await executor.pages_in_use() == 0


async def test_a_listener_that_raises_harms_no_other():
    """Two sessions in one batch, the first of which has a defect."""
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    async with running(FakeSpan()) as executor:
        (bad, bad_listener), (good, good_listener) = open_session(executor), open_session(executor)
        bad_listener.produced = lambda produced: 1 / 0
        executor.submit(bad, work(TOKENS))
        executor.submit(good, work(TOKENS))
        await good_listener.done(40)
        assert len(failures) == 1


async def test_when_the_thread_fails_nobody_waits_for_ever(monkeypatch, caplog):
    """A defect in the scheduler fails all sessions, sets `died`, and later work is refused."""
    async with running(FakeSpan()) as executor:

        def defect(now):
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(executor._scheduler, "schedule", defect)
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS))
        with pytest.raises(PeerError, match="device thread"):
            await listener.done(1)
        assert executor.died.is_set()
        executor.submit(session, work(TOKENS, step=1))
        await listener.until(lambda: len(listener.errors) == 2)


async def test_stopping_fails_the_work_that_waits():
    """Work without pages to run on ends with PeerBusy when the server stops."""
    async with running(FakeSpan(2), host_bytes=0) as executor:
        holder, holds = open_session(executor)
        executor.submit(holder, work(TOKENS[: 2 * PAGE_SIZE]))
        await holds.done(2 * PAGE_SIZE)
        session, listener = open_session(executor)
        executor.submit(session, work(TOKENS[:2] + 1))
        await listener.until(lambda: listener.waits)
        assert executor.num_waiting == 1
    with pytest.raises(PeerBusy, match="stopping"):
        await listener.done(1)


async def test_a_client_that_leaves_while_it_waits_leaves_nothing():
    """Starved work vanishes with its session at once, and who waited behind it gets the pages."""
    async with running(FakeSpan(4), host_bytes=0) as executor:
        holder, holds = open_session(executor, "holder")
        executor.submit(holder, work(TOKENS[:32]))
        await holds.done(32)
        gone, listener = open_session(executor, "gone")
        executor.submit(gone, work(torch.arange(60.0) + 100))
        await listener.until(lambda: listener.waits or listener.produced_all)
        executor.close(holder)
        executor.close(gone)
        assert await executor.pages_in_use() == 0
        assert executor.num_waiting == 0 and executor.free_tokens == 64
        told = len(listener.produced_all)
        last, last_listener = open_session(executor, "last")
        executor.submit(last, work(torch.arange(64.0)))
        await last_listener.done(64)
        assert len(listener.produced_all) == told


async def test_an_idle_session_makes_room_and_is_back_when_it_is_needed(monkeypatch):
    """Two sessions, each as large as the cache, run by turns through host memory, as if each were alone."""
    monkeypatch.setattr("swarm.server.admission.IDLE_S", 0.0)
    async with running(FakeSpan(4)) as executor:
        pairs = [open_session(executor, client) for client in "ab"]
        tokens = [torch.arange(64.0) + 7 * number for number in range(2)]
        for start in range(0, 64, 8):
            for (session, listener), own in zip(pairs, tokens, strict=True):
                executor.submit(session, work(own[start : start + 8], step=start, base=start, outputs_from=start))
                await listener.done(start + 8)
        for (session, listener), own in zip(pairs, tokens, strict=True):
            assert torch.equal(listener.outputs(), expected(own, BLOCKS))
            executor.close(session)
        assert await executor.pages_in_use() == 0


async def test_a_batch_waits_as_long_as_the_scheduler_says():
    """What comes meanwhile joins it."""
    async with running(FakeSpan()) as executor:
        scheduler = executor._scheduler
        scheduler.wait_until = lambda now: now if scheduler.num_ready == 2 else now + 60.0
        for session, _ in (opened := [open_session(executor), open_session(executor)]):
            executor.submit(session, work(torch.ones(1)))
        for _, listener in opened:
            await listener.until(lambda listener=listener: listener.produced_all)
            assert [it.batch_tokens for it in listener.produced_all] == [2]
