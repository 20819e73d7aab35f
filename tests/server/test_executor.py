"""The device thread: what fails there fails the steps concerned, and never leaves anybody waiting."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from swarm.errors import PeerBusy, PeerError
from swarm.protocol import DType, Step, TensorSpec
from swarm.server.executor import Executor
from swarm.types import BlockRange


class FakeSpan(SimpleNamespace):
    """Adds 1 to hidden states, unless told to fail."""

    num_pages = 8
    failure: Exception | None = None

    def new_state(self):
        return None

    def copy_pages(self, pairs):
        pass

    def run(self, chunks):
        if self.failure is not None:
            raise self.failure
        return [chunk.hidden_states + 1 for chunk in chunks]


STEP = Step(
    step_id=1,
    positions=(0,),
    num_tokens=(2,),
    num_outputs=(2,),
    order=None,
    hidden_states=TensorSpec(DType.FLOAT32, (2, 1)),
)


@pytest.fixture
async def executor():
    executor = Executor(FakeSpan(), asyncio.get_running_loop())
    executor.start()
    yield executor
    await executor.stop()


async def run(executor: Executor):
    session = executor.open(BlockRange(0, 1), 1)
    try:
        return await executor.run(session, STEP, torch.zeros(2, 1))
    finally:
        executor.close(session)


async def test_a_step_runs_and_its_pages_return(executor):
    """Outputs come back to the loop, and closing the session frees what it held."""
    job = await run(executor)
    assert torch.equal(job.result(), torch.ones(2, 1))
    assert await executor.pages_in_use() == 0


async def test_blocks_that_fail_fail_the_step_and_not_the_thread(executor, caplog):
    """The caller gets a PeerError that tells nothing of our insides; the next step runs."""
    executor.span.failure = RuntimeError("secret detail")
    with pytest.raises(PeerError) as caught:
        await run(executor)
    assert "secret" not in str(caught.value) and "secret" in caplog.text
    executor.span.failure = None
    assert (await run(executor)).is_done


async def test_when_the_thread_fails_nobody_waits_for_ever(executor, monkeypatch, caplog):
    """A defect in the scheduler fails the waiting steps, sets `died`, and later steps are refused."""

    def defect(now):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(executor._scheduler, "schedule", defect)
    async with asyncio.timeout(10):
        with pytest.raises(PeerError, match="device thread"):
            await run(executor)
        await executor.died.wait()
    with pytest.raises(PeerBusy):
        await run(executor)


async def test_stopping_fails_the_steps_that_wait(executor):
    """A step without pages to run on ends with PeerBusy when the server stops."""
    full = executor.open(BlockRange(0, 1), 1)
    executor._allocator.allocate(8)
    waiting = asyncio.create_task(executor.run(full, STEP, torch.zeros(2, 1)))
    assert await executor.pages_in_use() == 8
    await executor.stop()
    with pytest.raises(PeerBusy, match="stopping"):
        await waiting
