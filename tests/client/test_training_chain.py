"""A chain of training streams is open whole, or not at all."""

import asyncio

import pytest

from swarm.client.training_chain import HopFailed, open_chain
from swarm.errors import PeerBusy
from swarm.protocol import OpenTraining, TrainForget, TrainingOpened, TrainLink, TrainLinked
from swarm.types import BlockRange, Hop

HOPS = [Hop(peer_id="quick", blocks=BlockRange(0, 2)), Hop(peer_id="slow", blocks=BlockRange(2, 4))]


class FakeStream:
    """A server that opens a run when it likes, and then links as it is asked to, or says why not."""

    def __init__(self, answer: asyncio.Future) -> None:
        self.answer, self.is_closed = answer, False
        self.fault = ""
        self.asked: list[object] = []
        self.may_send = asyncio.Event()
        self.may_send.set()

    async def send(self, message: object, body: bytes = b"") -> None:
        await self.may_send.wait()
        self.asked.append(message)

    async def receive(self) -> tuple[object, bytes]:
        if isinstance(self.asked[-1], TrainForget):
            await asyncio.Future()
        if isinstance(self.asked[-1], TrainLink):
            return TrainLinked(fault=self.fault), b""
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


@pytest.fixture
async def ready():
    """Both servers open a run at once."""
    transport = FakeTransport()
    transport.streams["slow"].answer.set_result(TrainingOpened(max_tokens=8, good_tokens=8))
    return transport


async def test_a_hop_is_linked_to_the_run_of_the_next(ready):
    """By the key with which that run was opened."""
    chain = await open_chain(ready, HOPS, model="m", timeout_s=60.0)
    (first, link), (second,) = (ready.streams[hop.peer_id].asked for hop in HOPS)
    assert isinstance(first, OpenTraining) and isinstance(second, OpenTraining) and first.push_key != second.push_key
    assert link == TrainLink(peer_id="slow", push_key=second.push_key) and chain.links == {0}


async def test_hops_that_cannot_reach_each_other_are_used_all_the_same(ready):
    """What lies between them goes through the client; the caller is told of it."""
    ready.streams["quick"].fault = "the next server can't be reached"
    unlinked = []
    chain = await open_chain(ready, HOPS, model="m", timeout_s=60.0, on_unlinked=lambda *pair: unlinked.append(pair))
    assert not chain.links and unlinked == [tuple(HOPS)]
    apart = await open_chain(ready, HOPS, model="m", timeout_s=60.0, may_link=lambda *pair: False)
    assert not apart.links and len(ready.streams["quick"].asked) == 3  # and wasn't asked again


class FakeListener:
    """Waits for what goes out."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[tuple[int, object]] = asyncio.Queue()

    def on_message(self, index, message, body) -> None:
        """Nobody answers here but the opening."""

    def on_sent(self, index, message) -> None:
        self.sent.put_nowait((index, message))

    def on_failure(self, index, error) -> None:
        raise error


async def test_what_waits_for_the_line_counts_as_sent_when_it_has_gone_out(ready):
    """In order, and not before: the time until then is not the server's."""
    chain = await open_chain(ready, HOPS, model="m", timeout_s=60.0)
    for stream in ready.streams.values():
        stream.asked, stream.answer = [TrainForget(micro_batches=(), versions=())], asyncio.Future()
    listener, stream = FakeListener(), ready.streams["slow"]
    stream.may_send.clear()
    chain.start(listener)
    posted = [TrainForget(micro_batches=(number,), versions=()) for number in range(3)]
    chain.post(1, posted[0])
    chain.post(1, posted[1])
    chain.post(0, posted[2])
    assert await listener.sent.get() == (0, posted[2]) and listener.sent.empty()
    stream.may_send.set()
    assert [await listener.sent.get() for _ in range(2)] == [(1, posted[0]), (1, posted[1])]
    await chain.close()
