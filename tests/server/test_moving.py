"""Sessions between two handlers: what is handed over goes on exactly; what is hostile, late or too much is refused."""

import asyncio
import os

import msgspec
import pytest
import torch

from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected, PeerMisbehaved
from swarm.network import Node
from swarm.protocol import (
    STATE_SERVICE,
    HandedOver,
    HandOver,
    MoveAway,
    PushAccepted,
    PushHello,
    SessionState,
    StatePart,
    StateTaken,
)
from swarm.server import handler as handler_module
from swarm.server import session_moves as session_moves_module
from swarm.transport import Stream
from swarm.types import ServerState
from tests.server.conftest import chain_of
from tests.server.fakes import Chain, HopClient, eventually, failure_of, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def hand_over(old: HopClient, new: HopClient, nonce: int = 0) -> HandedOver:
    """Have a session handed over; what its server says of it."""
    peer_id, push_key = new.stream.peer_id, new.push_key
    await old.stream.send(HandOver(nonce=nonce, peer_id=peer_id, push_key=push_key))
    answer = await old.expect(HandedOver)
    assert answer.nonce == nonce
    return answer


async def say_nobody(old: HopClient) -> None:
    """The client knows nobody who would take the session."""
    await old.stream.send(HandOver(nonce=0, peer_id="", push_key=bytes(16)))


async def state_stream(chain: Chain, new: HopClient) -> Stream:
    """What another server would open to fill an empty session."""
    stream = await chain.client.open(new.stream.peer_id, STATE_SERVICE, timeout_s=10)
    await stream.send(PushHello(push_key=new.push_key))
    answer, _ = await stream.receive(10)
    assert isinstance(answer, PushAccepted)
    return stream


async def state_of(chain: Chain, row: torch.Tensor) -> tuple[SessionState, bytes]:
    """A good state of a session of one row, as it crosses the wire from server 0 to server 1."""
    old, new = await chain.open(0, is_last=True), await chain.open(1, is_last=True)
    await old.step(0, [row], positions=[0])
    await old.results(0, [len(row)])
    seen: list[tuple[object, bytes]] = []
    handler = chain.handlers[1]
    take = handler._moves.take

    async def watch(session, stream, client):
        receive = stream.receive

        async def receiving(timeout_s=None):
            message, body = await receive(timeout_s)
            seen.append((message, bytes(body)))
            return message, body

        stream.receive = receiving
        return await take(session, stream, client)

    handler._moves.take = watch
    assert (await hand_over(old, new)).is_done
    handler._moves.take = take
    for hop in (old, new):
        await hop.stream.close()
    await eventually(lambda: not chain.pages, "freed pages")
    state = seen[0][0]
    assert isinstance(state, SessionState)
    return state, b"".join(body for _, body in seen[1:])


async def test_a_session_that_was_handed_over_goes_on_elsewhere_and_is_done_here(nodes: list[Node]):
    """The client is told by both servers; the old one takes no steps any more, and ends the session after a while."""
    async with chain_of(nodes, 2, gone_timeout_s=0.2) as chain:
        chain.executors[1].constant = chain.executors[0].constant
        old, new = await chain.open(0, is_last=True), await chain.open(1, is_last=True)
        row = tokens(30)
        await old.step(0, [row], positions=[0])
        await old.results(0, [30])
        assert (await hand_over(old, new)) == HandedOver(nonce=0, is_done=True, text="")
        assert (await new.expect(StateTaken)) == StateTaken(step_id=0, received=(30,))
        await old.step(1, [tokens(1)], positions=[30])
        await new.step(1, [tokens(1)], positions=[30])
        (output,) = await new.results(1, [31])
        assert torch.equal(output, run_blocks(torch.cat([row, tokens(1)]), 10)[30:])
        assert [executor.num_tokens_run for executor in chain.executors] == [30, 1]
        await eventually(lambda: not chain.executors[0].pages, "the end of the old one")


async def test_what_the_client_is_to_get_comes_before_the_word_that_the_session_is_gone(nodes: list[Node]):
    """Results of what was taken are sent by the old server, in order."""
    async with chain_of(nodes, 2) as chain:
        old, new = await chain.open(0, is_last=True), await chain.open(1, is_last=True)
        chain.executors[0].hold()
        await old.step(0, [tokens(30)], positions=[0])
        await old.stream.send(HandOver(nonce=0, peer_id=new.stream.peer_id, push_key=new.push_key))
        await eventually(lambda: bool(chain.executors[0].sessions[0].queue), "work")
        chain.executors[0].release()
        assert len((await old.results(0, [30]))[0]) == 30
        assert (await old.expect(HandedOver)).is_done


@pytest.mark.parametrize("why", ["nobody there", "wrong key", "itself", "no room", "begun", "another model's rows"])
async def test_a_session_that_cannot_be_handed_over_goes_on_here(nodes: list[Node], why: str):
    """The client is told why, and steps that came meanwhile are taken."""
    limits = {"push_open_timeout_s": 0.5, "early_push_timeout_s": 0.1}
    async with chain_of(nodes, 2, executor={"num_pages": 8}, **limits) as chain:
        old = await chain.open(0, is_last=True)
        new = await chain.open(1, is_last=True, rows=2 if why.startswith("another") else 1)
        row = tokens(30)
        await old.step(0, [row], positions=[0])
        await old.results(0, [30])
        peer_id, key = new.stream.peer_id, new.push_key
        if why == "nobody there":
            peer_id = "12D3KooWGjqsJmJmVrVAmFMV3dvVvVbpXxWuH2yRhbeg9eYR7N2v"
        elif why == "wrong key":
            key = os.urandom(16)
        elif why == "itself":
            peer_id = old.stream.peer_id
        elif why == "no room":
            chain.executors[1].num_pages = 2
        elif why == "begun":
            await new.step(0, [tokens(1)], positions=[0])
            await new.results(0, [1])
        await old.stream.send(HandOver(nonce=3, peer_id=peer_id, push_key=key))
        await old.step(1, [tokens(1)], positions=[30])
        answer = None
        while not isinstance(answer, HandedOver):
            answer, _ = await old.stream.receive(10)
        assert answer.nonce == 3 and not answer.is_done and answer.text
        if why == "no room":
            assert "needs 3 pages, 2 are free" in answer.text
        await old.step(2, [tokens(1)], positions=[31])
        await old.results(2, [32])
        assert chain.executors[0].num_tokens_run == 32
        await old.stream.close()
        await new.stream.close()
        await eventually(lambda: not chain.pages, "freed pages")


@pytest.mark.parametrize("hostile", ["rows", "pages", "size", "page number", "part", "message", "cut", "too much"])
async def test_a_hostile_state_is_refused_and_the_session_stays_empty(nodes: list[Node], hostile: str):
    """Whoever knows the key can fill the session with what fits it, and do nothing else; it can still be used."""
    async with chain_of(nodes, 2, max_arriving_bytes=2000) as chain:
        state, body = await state_of(chain, tokens(30))
        new = await chain.open(1, is_last=True)
        stream = await state_stream(chain, new)
        changes = {
            "rows": {"lengths": (30, 1), "received": (30, 1)},
            "pages": {"num_pages": 1 << 20},
            "size": {"cache_bytes": 1 << 40},
        }
        state = msgspec.structs.replace(state, **changes.get(hostile, {}))
        if hostile == "too much":
            chain.handlers[1]._moves._arriving.used = 1900
        if hostile == "page number":
            body = b"\xff\xff\x00\x00" + body[4:]
        await stream.send(PushAccepted() if hostile == "message" else state)
        if hostile == "part":
            await stream.send(StatePart(offset=1), body)
        elif hostile == "cut":
            await stream.send(StatePart(offset=0), body[:-1])
            await stream.close()
            await eventually(lambda: not chain.handlers[1]._moves._arriving.used, "the end of it")
        elif hostile == "page number":
            await stream.send(StatePart(offset=0), body)
        if hostile != "cut":
            error = await failure_of(stream)
            assert isinstance(error, PeerBusy if hostile == "too much" else InvalidRequest | PeerMisbehaved), error
        await new.step(0, [tokens(3)], positions=[0])
        await new.results(0, [3])
        assert chain.handlers[1].meter.num_taken == 1
        await new.stream.close()
        await eventually(lambda: not chain.pages, "freed pages")


async def test_a_session_is_filled_once(nodes: list[Node]):
    """A second state, at the same time or later, is refused."""
    async with chain_of(nodes, 2) as chain:
        state, body = await state_of(chain, tokens(30))
        new = await chain.open(1, is_last=True)
        first = await state_stream(chain, new)
        second = await chain.client.open(new.stream.peer_id, STATE_SERVICE, timeout_s=10)
        await second.send(PushHello(push_key=new.push_key))
        assert "has begun" in str(await failure_of(second))
        await first.send(state)
        await first.send(StatePart(offset=0), body)
        answer, _ = await first.receive(10)
        assert answer == StateTaken(step_id=0, received=(30,)) == await new.expect(StateTaken)
        third = await chain.client.open(new.stream.peer_id, STATE_SERVICE, timeout_s=10)
        await third.send(PushHello(push_key=new.push_key))
        assert isinstance(await failure_of(third), InvalidRequest)


async def test_an_empty_session_is_filled_once_too(nodes: list[Node]):
    """With nothing in it: else each time would promise it pages anew."""
    async with chain_of(nodes, 2) as chain:
        state, _ = await state_of(chain, tokens(30))
        nothing = {"lengths": (0,), "received": (0,), "outputs_from": (0,), "num_pages": 0, "cache_bytes": 0}
        empty = msgspec.structs.replace(state, **nothing, step_id=-1, order=None, base=None, sent=None)
        new = await chain.open(1, is_last=True)
        first = await state_stream(chain, new)
        await first.send(empty)
        assert (await first.receive(10))[0] == StateTaken(step_id=-1, received=(0,))
        second = await chain.client.open(new.stream.peer_id, STATE_SERVICE, timeout_s=10)
        await second.send(PushHello(push_key=new.push_key))
        assert "has begun" in str(await failure_of(second))


async def test_room_is_promised_to_those_that_have_come_until_they_run(nodes: list[Node]):
    """Sessions that fit one by one are not all taken; once one has its pages, or has gone, others may come."""
    async with chain_of(nodes, 2) as chain:
        state, body = await state_of(chain, tokens(30))
        chain.executors[1].num_pages = 8

        async def arrive(new: HopClient) -> object:
            stream = await state_stream(chain, new)
            await stream.send(state)
            await stream.send(StatePart(offset=0), body)
            return (await stream.receive(10))[0]

        first, second, third = [await chain.open(1, is_last=True) for _ in range(3)]
        assert isinstance(await arrive(first), StateTaken) and isinstance(await arrive(second), StateTaken)
        chain.executors[1].sessions[0].rows = [torch.zeros(0, 4)]  # as on a real device: no pages before it runs
        chain.executors[1].sessions[1].rows = [torch.zeros(0, 4)]
        with pytest.raises(PeerBusy, match="needs 3 pages, 2 are free"):
            await arrive(third)
        await first.stream.close()
        await eventually(lambda: chain.handlers[1].num_sessions == 2, "the end of the first")
        assert isinstance(await arrive(third), StateTaken)
        for hop in (second, third):
            await hop.stream.close()
        await eventually(lambda: not chain.handlers[1].num_sessions, "the end of all")
        assert not chain.handlers[1]._moves._promised_pages


async def test_room_is_not_kept_for_long_for_a_session_that_takes_no_steps(nodes: list[Node], monkeypatch):
    """Else one client could keep all sessions of others out, by some that come and do nothing."""
    monkeypatch.setattr(session_moves_module, "PROMISE_S", 0.05)
    async with chain_of(nodes, 2) as chain:
        state, body = await state_of(chain, tokens(30))
        new, desk = await chain.open(1, is_last=True), chain.handlers[1]._moves
        stream = await state_stream(chain, new)
        await stream.send(state)
        await stream.send(StatePart(offset=0), body)
        assert isinstance((await stream.receive(10))[0], StateTaken)
        await eventually(lambda: not desk._promised_pages, "the end of the promise")
        assert chain.handlers[1].num_sessions == 1
        await new.stream.close()
        await eventually(lambda: not chain.handlers[1].num_sessions, "the end of the session")
        assert desk._promised_pages == 0


async def test_a_session_that_ends_while_it_is_filled_leaves_nothing(nodes: list[Node]):
    """Whoever sent the state is told, and what had come is forgotten."""
    async with chain_of(nodes, 2) as chain:
        state, body = await state_of(chain, tokens(30))
        new = await chain.open(1, is_last=True)
        stream = await state_stream(chain, new)
        await stream.send(state)
        await stream.send(StatePart(offset=0), body[:9])
        await new.stream.close()
        assert isinstance(await failure_of(stream), PeerDisconnected)
        await eventually(lambda: not chain.handlers[1].num_sessions, "the end of the session")
        assert not chain.pages and not chain.handlers[1]._moves._arriving.used
        assert not chain.handlers[1]._moves._promised_pages


async def test_a_server_that_drains_asks_everybody_and_lets_nobody_in(nodes: list[Node]):
    """Each session is asked; the drain ends when the last has gone, and new ones are refused at once."""
    async with chain_of(nodes, 1) as chain:
        hops = [await chain.open(0, is_last=True) for _ in range(3)]
        draining = asyncio.create_task(chain.handlers[0].drain(20.0))
        for hop in hops:
            assert 0 < (await hop.expect(MoveAway)).within_s <= 20.0
        assert chain.handlers[0].state is ServerState.DRAINING
        with pytest.raises(PeerBusy, match="DRAINING"):
            await chain.open(0, is_last=True)
        for hop in hops:
            assert not draining.done()
            await hop.stream.close()
        await draining


async def test_a_drain_ends_in_time_whoever_is_left(nodes: list[Node]):
    """A client that says nothing holds a server up no longer than it wants to wait."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        await chain.handlers[0].drain(0.3)
        assert chain.handlers[0].num_sessions == 1
        await hop.step(0, [tokens(3)], positions=[0])  # it still goes on
        await hop.expect(MoveAway)
        await hop.results(0, [3])


async def test_who_found_nobody_is_asked_again_while_the_server_drains(nodes: list[Node], monkeypatch):
    """A replica may come, or have room, a moment later: a session that does nothing gets that chance, too."""
    monkeypatch.setattr(session_moves_module, "FIRST_URGE_S", 0.01)
    monkeypatch.setattr(handler_module, "QUIET_S", 0.0)
    async with chain_of(nodes, 2) as chain:
        old = await chain.open(0, is_last=True)
        draining = asyncio.create_task(chain.handlers[0].drain(60.0))
        asked = await old.expect(MoveAway)
        for _ in range(2):
            await say_nobody(old)
            asked_again = await old.expect(MoveAway)
            assert asked_again.within_s < asked.within_s and not draining.done()
        new = await chain.open(1, is_last=True)
        assert (await hand_over(old, new)).is_done
        await old.stream.close()
        await draining
        assert chain.handlers[0].meter.num_given == 1


async def test_a_session_that_does_nothing_and_has_nowhere_to_go_is_left_in_the_end(nodes: list[Node], monkeypatch):
    """Whoever has left it open does not hold a server up for all of ten minutes."""
    monkeypatch.setattr(handler_module, "QUIET_S", 0.0)
    monkeypatch.setattr(handler_module, "QUIET_SHARE", 0.0)
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        draining = asyncio.create_task(chain.handlers[0].drain(600.0))
        await hop.expect(MoveAway)
        assert not draining.done(), "its client has not answered"
        await say_nobody(hop)
        async with asyncio.timeout(20):
            await draining
        assert chain.handlers[0].num_sessions == 1
