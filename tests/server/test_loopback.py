"""A stream to oneself behaves like one to others."""

import asyncio

import pytest

from swarm.errors import InvalidRequest, PeerBusy, PeerTimeout
from swarm.protocol import Probe
from swarm.server.loopback import WINDOW_BYTES, LocalStream
from swarm.transport import EndOfStream


async def test_messages_come_in_order_and_then_the_end():
    """What was sent before the end is still received."""
    near, far = LocalStream.pair("me")
    await near.send(Probe(nonce=1), b"body")
    await near.send(Probe(nonce=2))
    await near.close()
    message, body = await far.receive()
    assert message == Probe(nonce=1) and bytes(body) == b"body"
    assert (await far.receive())[0] == Probe(nonce=2)
    with pytest.raises(EndOfStream):
        await far.receive()
    with pytest.raises(InvalidRequest):
        await near.send(Probe(nonce=3))


async def test_a_sender_waits_for_room():
    """Beyond the window nothing is buffered; receiving makes room."""
    near, far = LocalStream.pair("me")
    await near.send(Probe(nonce=1), bytes(WINDOW_BYTES + 1))
    assert not near.send_now(Probe(nonce=2))
    sending = asyncio.create_task(near.send(Probe(nonce=2)))
    assert (await far.receive())[0] == Probe(nonce=1)
    await sending
    assert (await far.receive())[0] == Probe(nonce=2)
    await near.send(Probe(nonce=3), bytes(WINDOW_BYTES + 1))
    with pytest.raises(PeerTimeout):
        await near.send(Probe(nonce=4), timeout_s=0.01)


async def test_an_error_reaches_whoever_waits_at_the_other_end():
    """Aborting one end raises there, and in later calls here."""
    near, far = LocalStream.pair("me")
    receiving = asyncio.create_task(far.receive())
    await asyncio.sleep(0)
    await near.abort(PeerBusy("no room"))
    with pytest.raises(PeerBusy):
        await receiving
    with pytest.raises(PeerBusy):
        near.send_now(Probe(nonce=1))
    with pytest.raises(PeerTimeout):
        await LocalStream.pair("me")[0].receive(timeout_s=0.01)
