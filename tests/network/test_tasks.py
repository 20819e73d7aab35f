"""The set of background tasks: failures are logged, closing ends what is left."""

import asyncio
import logging

import pytest

from swarm.network.tasks import TaskSet


async def test_a_failing_task_is_logged_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture):
    """One task's exception reaches the log, and its neighbour runs on."""
    tasks, gate = TaskSet(), asyncio.Event()

    async def fail() -> None:
        raise ValueError("boom")

    other = tasks.spawn(gate.wait(), name="other")
    with caplog.at_level(logging.ERROR):
        await asyncio.wait({tasks.spawn(fail(), name="failing")})
        await asyncio.sleep(0)
    assert "failing" in caplog.text and "boom" in caplog.text
    assert len(tasks) == 1 and not other.done()
    gate.set()
    await other


async def test_close_cancels_and_waits():
    """After close no task is left, and each had the chance to clean up."""
    tasks, cleaned = TaskSet(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    for _ in range(3):
        tasks.spawn(work(), name="work")
    await asyncio.sleep(0)
    await tasks.close()
    assert len(cleaned) == 3 and len(tasks) == 0
