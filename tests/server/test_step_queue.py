"""Steps that come before there is room wait in order and in bounds, and so does whoever reads."""

import asyncio

import pytest

from swarm.errors import PeerDisconnected, PeerTimeout
from swarm.network import Node
from swarm.protocol import Probe, Step
from swarm.server import step_queue
from swarm.server.step_queue import STEP_BYTES, StepQueue
from swarm.transport.limits import Budget
from tests.server.conftest import chain_of
from tests.server.fakes import eventually, make_step, tokens, until_free

pytestmark = pytest.mark.asyncio(loop_scope="module")


class FakeClient:
    """A session stream that may be over."""

    def __init__(self) -> None:
        self.is_over = False


class Desk:
    """A queue in front of a desk with room for so many steps; a step is known by its number."""

    def __init__(self, room: int, *, max_bytes: int = 10_000, budget: Budget | None = None):
        self.room, self.taken, self.client = room, list[int](), FakeClient()
        self.budget = budget or Budget(1 << 20)
        self.queue = StepQueue(
            self.client,  # type: ignore[arg-type]
            has_room=lambda: self.room > 0,
            take=self._take,
            max_bytes=max_bytes,
            budget=self.budget,
        )

    def _take(self, step: Step, body: memoryview) -> None:
        self.room -= 1
        self.taken.append(step.step_id)

    async def put(self, number: int) -> bool:
        step, body = make_step(number, [tokens(1)], positions=[0])
        return await self.queue.put(step, body)

    def make_room(self, room: int) -> None:
        self.room += room
        self.queue.advance()


async def test_steps_are_taken_in_order_as_room_comes():
    """The first goes through, the others wait, counted, and none overtakes another."""
    desk = Desk(1)
    for number in range(4):
        assert await desk.put(number)
    assert desk.taken == [0] and desk.budget.used > 3 * STEP_BYTES
    desk.make_room(2)
    assert desk.taken == [0, 1, 2]
    desk.make_room(2)
    assert await desk.put(4)
    assert desk.taken == [0, 1, 2, 3, 4] and desk.budget.used == 0


@pytest.mark.parametrize(("max_bytes", "limit"), [(10, 1 << 20), (1 << 20, 10)])
async def test_no_more_is_read_while_too_much_waits(max_bytes: int, limit: int):
    """Too much of this session's, or anything where all sessions together have too much."""
    desk = Desk(0, max_bytes=max_bytes, budget=Budget(limit))
    reading = asyncio.create_task(desk.put(0))
    await asyncio.sleep(0)
    assert not reading.done()
    desk.make_room(1)
    assert await reading and desk.taken == [0]


async def test_a_pushed_step_has_its_turn_behind_what_waits():
    """Room alone is not enough: the client's steps came first."""
    desk = Desk(0)
    await desk.put(0)
    turn = asyncio.create_task(desk.queue.turn())
    await asyncio.sleep(0)
    desk.make_room(1)
    await asyncio.sleep(0)
    assert desk.taken == [0] and not turn.done()
    desk.make_room(1)
    await turn


async def test_the_end_of_a_session_frees_what_waits_and_whoever_waits():
    """Readers of pushes learn why, the client's goes on to find its stream at an end, nothing stays counted."""
    desk = Desk(0, max_bytes=10)
    turn, reading = asyncio.create_task(desk.queue.turn()), asyncio.create_task(desk.put(0))
    await asyncio.sleep(0)
    assert desk.budget.used
    desk.queue.close()
    assert desk.budget.used == 0 and await reading and desk.taken == []
    with pytest.raises(PeerDisconnected):
        await turn
    desk.queue.close()
    assert desk.budget.used == 0


async def test_a_client_that_leaves_while_its_stream_is_not_read_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Nothing else would tell: whoever reads the stream waits for room."""
    monkeypatch.setattr(step_queue, "END_CHECK_S", 0.01)
    desk = Desk(0, max_bytes=10)
    desk.client.is_over = True
    assert not await desk.put(0)


# -- with real handlers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"max_pending_bytes": 64}, {"max_total_pending_bytes": 64}])
async def test_a_session_that_reads_no_more_still_notices_its_end(nodes: list[Node], limits: dict[str, int]):
    """The client leaves while its steps wait and its stream is not read: all is freed soon."""
    async with chain_of(nodes, 1, max_step_tokens=8, **limits) as chain:
        chain.executors[0].hold()
        hop = await chain.open(0, is_last=True)
        for start in range(0, 64, 8):
            await hop.step(0, [tokens(8)], positions=[start], base=[0])
        await eventually(lambda: chain.handlers[0]._pending.used)
        await hop.stream.send(Probe(nonce=1))
        with pytest.raises(PeerTimeout):
            await hop.stream.receive(0.05)
        await hop.stream.close()
        await until_free(chain)
