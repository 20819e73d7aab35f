"""A sleeper wakes when it is rung for, and in time when it is not."""

import asyncio

import pytest

from swarm.client.alarm import Alarm

pytestmark = pytest.mark.asyncio


async def test_it_rings_for_a_sleeper_and_not_for_the_next():
    """What rang before somebody sleeps is not remembered."""
    alarm = Alarm()
    alarm.ring()
    sleeping = asyncio.create_task(alarm.wait(60.0))
    await asyncio.sleep(0)
    assert not sleeping.done()
    alarm.ring()
    alarm.ring()
    await sleeping


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.01])
async def test_nobody_sleeps_for_ever(timeout_s: float):
    """Also where the time has passed already."""
    await Alarm().wait(timeout_s)


async def test_a_sleeper_may_be_cancelled():
    """The next one sleeps and wakes as ever."""
    alarm = Alarm()
    sleeping = asyncio.create_task(alarm.wait(60.0))
    await asyncio.sleep(0)
    sleeping.cancel()
    await asyncio.gather(sleeping, return_exceptions=True)
    alarm.ring()
    again = asyncio.create_task(alarm.wait(60.0))
    await asyncio.sleep(0)
    alarm.ring()
    await again
