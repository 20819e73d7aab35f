"""A chain of training streams is open whole, or not at all."""

import asyncio

import pytest

from swarm.client.training_chain import HopFailed, open_chain
from swarm.errors import PeerBusy
from swarm.protocol import TrainingOpened
from swarm.session import Hop
from swarm.types import BlockRange

HOPS = [Hop(peer_id="quick", blocks=BlockRange(0, 2)), Hop(peer_id="slow", blocks=BlockRange(2, 4))]


class FakeStream:
    def __init__(self, answer: asyncio.Future) -> None:
        self.answer, self.is_closed = answer, False

    async def send(self, message: object) -> None:
        pass

    async def receive(self) -> tuple[object, bytes]:
        return await self.answer, b""

    async def close(self) -> None:
        self.is_closed = True


class FakeTransport:
    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.streams = {hop.peer_id: FakeStream(loop.create_future()) for hop in HOPS}
        self.streams["quick"].answer.set_result(TrainingOpened(max_tokens=8, good_tokens=8))
        self.num_open = 0
        self.all_open = asyncio.Event()

    async def open(self, peer_id: str, service: str, *, timeout_s: float) -> FakeStream:
        self.num_open += 1
        if self.num_open == len(HOPS):
            self.all_open.set()
        return self.streams[peer_id]


async def test_who_gives_up_while_it_opens_leaves_no_stream_open():
    """Each would be a run that its server holds for us; the one that was open and the one that was not yet."""
    transport = FakeTransport()
    opening = asyncio.create_task(open_chain(transport, HOPS, model="m", timeout_s=60.0))
    await transport.all_open.wait()
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert all(stream.is_closed for stream in transport.streams.values())


async def test_a_hop_that_refuses_ends_the_others():
    transport = FakeTransport()
    transport.streams["slow"].answer.set_exception(PeerBusy("full"))
    with pytest.raises(HopFailed, match="full"):
        await open_chain(transport, HOPS, model="m", timeout_s=60.0)
    assert all(stream.is_closed for stream in transport.streams.values())
