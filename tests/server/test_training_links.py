"""The streams of a training run to its neighbours: what breaks is told, and leaves nothing behind."""

import asyncio

import pytest

from swarm.errors import PeerDisconnected, PeerUnreachable
from swarm.protocol import TrainForget, TrainLink
from swarm.server.loopback import LocalStream
from swarm.server.training_links import MESSAGE_BYTES, TrainingLinks


class Run:
    """A run that takes whatever comes."""

    def __init__(self, open_push=None):
        self.faults, self.num_sent = [], 0
        self.has_fault = asyncio.Event()
        self.links = TrainingLinks(
            open_push or self.unreachable,
            take_forward=self.take,
            take_backward=lambda message, body: None,
            on_fault=self.fault,
            on_sent=self.sent,
            open_timeout_s=1.0,
            send_timeout_s=60.0,
        )

    async def take(self, message, body):
        pass

    async def unreachable(self, peer_id):
        raise PeerUnreachable("nobody there")

    def fault(self, text):
        self.faults.append(text)
        self.has_fault.set()

    def sent(self):
        self.num_sent += 1


async def test_what_a_lost_neighbour_had_not_taken_takes_no_room():
    """And whoever waits for room is told: nobody else would tell it."""
    run = Run()
    near, far = LocalStream.pair("before")
    serving = asyncio.create_task(run.links.receive_pushes(far))
    await near.receive()
    while near.send_now(TrainForget(micro_batches=(), versions=()), bytes(1 << 20)):
        pass  # what it sends is no forward: its end of the stream fails
    run.links.previous.post(TrainForget(micro_batches=(), versions=()), bytes(8))
    assert run.links.num_bytes == 8 + MESSAGE_BYTES
    before = run.num_sent
    with pytest.raises(Exception, match="expected TrainForward"):
        await serving
    assert run.links.previous is None and run.links.num_bytes == 0 and run.num_sent > before
    assert not run.faults  # the server before tells the client


async def test_a_next_server_that_cannot_be_reached_is_told_to_the_client():
    """It has no link then, and the client decides what follows."""
    run = Run()
    run.links.open(TrainLink(peer_id="far", push_key=bytes(16)), on_open=lambda: None)
    await run.has_fault.wait()
    assert run.faults == ["the next server can't be reached"] and run.links.next is None
    await run.links.close()


async def test_a_run_that_has_ended_takes_no_link():
    run = Run()
    await run.links.close()
    _, far = LocalStream.pair("before")
    with pytest.raises(PeerDisconnected, match="has ended"):
        await run.links.receive_pushes(far)
