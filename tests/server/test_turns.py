"""One at a time, and the client that has had least of it first."""

import asyncio

from swarm.server.turns import Turns


class Clock:
    """Time that passes when somebody works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def work(turns, clock, done, client, seconds=1.0):
    async with turns.turn(client):
        assert not clock.is_busy
        clock.is_busy = True
        await asyncio.sleep(0)
        clock.now += seconds
        done.append(client)
        clock.is_busy = False


async def test_one_who_brings_much_does_not_keep_another_waiting():
    """Of two clients, each has every other turn, in whatever order they came; nobody works beside another."""
    clock, done = Clock(), []
    clock.is_busy = False
    turns = Turns(clock)
    async with asyncio.TaskGroup() as group:
        for client in "a" * 10 + "b" * 3:
            group.create_task(work(turns, clock, done, client))
    assert done.count("a") == 10 and done[:7].count("b") == 3


async def test_time_counts_and_not_turns():
    """Who works for longer has fewer turns."""
    clock, done = Clock(), []
    clock.is_busy = False
    turns = Turns(clock)
    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(work(turns, clock, done, "slow", 4.0))
        for _ in range(6):
            group.create_task(work(turns, clock, done, "quick"))
    assert done.index("quick") <= 1 and done[:9].count("quick") == 6


async def test_who_was_cancelled_just_now_is_passed_over():
    """Its future is cancelled at once, and it hears of it only when the loop comes round."""
    clock, done = Clock(), []
    clock.is_busy = False
    turns = Turns(clock)
    async with asyncio.timeout(5):
        async with turns.turn("a"):
            tasks = [asyncio.create_task(work(turns, clock, done, client)) for client in "bc"]
            await asyncio.sleep(0)
            tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert done == ["c"] and tasks[0].cancelled()
        async with turns.turn("d"):
            pass


async def test_who_gives_up_leaves_no_gap():
    """Waiting or at the very moment when its turn comes."""
    clock, done = Clock(), []
    clock.is_busy = False
    turns = Turns(clock)
    tasks = []
    async with turns.turn("a"):
        tasks = [asyncio.create_task(work(turns, clock, done, client)) for client in "bcd"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
    tasks[0].cancel()  # it was passed on to this one just now
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == ["d"]
    async with asyncio.timeout(5), turns.turn("e"):
        pass
