"""Who is to blame for silence, nonsense, refusals and waiting, and who is not; with scripted servers."""

import asyncio
import logging
import time

import pytest
import torch

from swarm.codec import encode_tensor
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy, PeerDisconnected, PeerTimeout, RouteNotFound
from swarm.protocol import Message, OpenSession, Probe, ProbeResult, SessionOpened, Step, StepResult, Waiting
from swarm.types import BlockRange
from tests.client.fake_server import HIDDEN, FakeSession
from tests.client.scripted_swarm import CHAIN, PATIENT, Text, at, dying, refusing, stopped

pytestmark = pytest.mark.asyncio(loop_scope="module")


# -- silence, and ways that carry nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
async def test_a_stopped_hop_is_found_by_asking(make_swarm, index):
    """Connected and silent: the step is late, the others answer, this one does not."""
    swarm = await make_swarm(*CHAIN, CHAIN[index])
    text = Text(swarm.session(late_s=0.2, probe_timeout_s=2.0))
    await text.step(5)
    await text.decode(2)
    swarm.servers[index].script = stopped
    await text.decode(2)
    assert swarm.peers.failures == [swarm.servers[index].peer_id]


async def test_a_hop_that_lives_but_does_nothing_is_replaced_later(make_swarm):
    """It answers, but swallows what it is given: after the step's deadline its work goes elsewhere."""

    async def idle(session: FakeSession, message: Message) -> bool:
        return isinstance(message, Step)

    swarm = await make_swarm("0:6", "0:6")
    session = swarm.session(late_s=0.05, probe_timeout_s=PATIENT, step_timeout_s=0.5)
    text = Text(session)
    swarm.servers[0].script = idle
    await text.step(5)
    assert swarm.peers.failures == [swarm.servers[0].peer_id] and session.told["ProbeResult"] >= 1


async def test_a_client_that_slept_past_all_deadlines_goes_on(make_swarm):
    """The only server is silent, and stuck, at the same moment: it is replaced once."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(Step, lambda session: stopped(session, None))
    session = swarm.session(late_s=0.05, probe_timeout_s=0.3, step_timeout_s=0.5)
    running = asyncio.create_task(Text(session).step(5))
    async with asyncio.timeout(20):
        while not any(hop.probe_sent_at for hop in session._hops):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    time.sleep(1.0)  # noqa: ASYNC251
    await running
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_a_way_between_two_hops_that_carries_nothing_is_given_up(make_swarm):
    """Pushed steps vanish though both servers answer: the client stands in between, and remembers."""
    swarm = await make_swarm("0:3", "3:6")
    first, second = swarm.servers

    async def swallow(session: FakeSession, message: Message) -> bool:
        return isinstance(message, Step) and not second.received["Step"]

    second.script = swallow
    session = swarm.session(late_s=0.05, probe_timeout_s=PATIENT, step_timeout_s=1.0)
    text = Text(session)
    await text.step(5)
    await text.decode(2)
    assert swarm.peers.failures == []
    assert swarm.peers.pairs_without_push == {(first.peer_id, second.peer_id)}


async def test_servers_that_cannot_reach_each_other_are_connected_by_the_client(make_swarm):
    """Outputs stay the same, nobody is blamed, the other pair still pushes, and the next session knows beforehand."""
    swarm = await make_swarm(*CHAIN)
    first, second, _ = swarm.servers
    first.unreachable = {second.peer_id}
    session = swarm.session()
    text = Text(session)
    await text.step(5)
    await text.decode(3)
    assert swarm.peers.failures == [] and session.machine.num_pushes == 1 and session.machine.num_replays == 0
    assert swarm.peers.pairs_without_push == {(first.peer_id, second.peer_id)}
    assert first.sessions[0].forwarded == [second.peer_id, ""]
    await session.close()
    later = swarm.session()
    await Text(later).step(4)
    assert first.sessions[-1].forwarded == [""] and later.told["LinkDown"] == 0


async def test_a_link_that_breaks_in_mid_session_falls_back_to_the_client(make_swarm):
    """Both servers live: what is missing comes from the first one's history."""
    swarm = await make_swarm(*CHAIN)
    text = Text(swarm.session())
    await text.step(5)
    await swarm.servers[1].sessions[0].lose_link()
    await text.decode(3)
    assert swarm.peers.failures == [] and len(swarm.peers.pairs_without_push) == 1


async def test_a_link_to_a_stopped_server_blames_the_server(make_swarm):
    """The one before says that it can't send: the next one is asked, and replaced when it is silent."""
    swarm = await make_swarm("0:3", "3:6", "3:6")
    first, second = swarm.servers[:2]
    text = Text(swarm.session(probe_timeout_s=0.5))
    await text.step(5)
    second.script = stopped
    await first.sessions[0].lose_link()
    await text.decode(2)
    assert swarm.peers.failures == [second.peer_id] and swarm.peers.pairs_without_push == frozenset()


async def test_a_probe_is_not_needed_where_steps_are_on_time(make_swarm):
    """Asking costs nothing as long as nothing is late."""
    swarm = await make_swarm(*CHAIN)
    text = Text(swarm.session())
    await text.step(4)
    await text.decode(5)
    assert sum(server.received[Probe.__name__] for server in swarm.servers) == 0


# -- whom to blame ------------------------------------------------------------------------------------------------


async def test_a_refusal_of_the_step_itself_is_not_retried(make_swarm):
    """InvalidRequest for a step of ours is our own fault: it is raised at once, and no other server is asked."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(Step, refusing(InvalidRequest("bad")))
    text = Text(swarm.session())
    with pytest.raises(InvalidRequest, match="bad"):
        await text.step(2)
    assert swarm.peers.failures == [] and not swarm.servers[1].received
    await text.step(2)


async def test_a_refusal_to_open_leads_to_another_server(make_swarm):
    """A server that moved on refuses what its old record promised; the next one is asked."""
    swarm = await make_swarm("0:6", "0:6")
    swarm.servers[0].script = at(OpenSession, refusing(InvalidRequest("runs 0:2")))
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_when_everybody_refuses_to_open_the_reason_is_raised(make_swarm):
    """Not an endless search: the refusal itself, after a few attempts."""
    swarm = await make_swarm("0:6")

    async def refuse(session: FakeSession, message: Message) -> None:
        raise CheckpointMismatch("other")

    swarm.servers[0].script = refuse
    with pytest.raises(CheckpointMismatch, match="other"):
        await Text(swarm.session()).step(1)
    assert swarm.servers[0].received["OpenSession"] == 4


def result(
    step_id: int = 0, positions: int = 0, num_tokens: int = 2, rows: int = 1, width: int = HIDDEN, dtype=torch.float32
) -> tuple[Message, memoryview]:
    spec, payload = encode_tensor(torch.zeros(num_tokens, width, dtype=dtype))
    return (
        StepResult(
            step_id=step_id,
            positions=(positions,) * rows,
            num_tokens=(num_tokens,) + (0,) * (rows - 1),
            hidden_states=spec,
            trace=(),
        ),
        payload,
    )


MISBEHAVIOUR = {
    "too wide": result(width=HIDDEN + 1),
    "a step that was not begun": result(step_id=7),
    "another type": result(dtype=torch.float16),
    "another number of rows": result(rows=2),
    "beyond what was asked": result(num_tokens=3),
    "a gap": result(positions=1, num_tokens=1),
    "a body that is too short": (result()[0], memoryview(bytes(3))),
    "another message": (SessionOpened(max_step_tokens=1, can_rollback=True), memoryview(b"")),
}


@pytest.mark.parametrize("lie", MISBEHAVIOUR)
async def test_a_malformed_answer_blames_the_server(make_swarm, lie):
    """Results that can't be what was asked for, other messages: the server is replaced."""
    swarm = await make_swarm("0:6", "0:6")

    async def lying(session: FakeSession) -> bool:
        await session.stream.send(*MISBEHAVIOUR[lie])
        return True

    swarm.servers[0].script = at(Step, lying)
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_a_server_that_ends_the_session_is_replaced(make_swarm):
    """An orderly end of the stream is a failure, too."""
    swarm = await make_swarm("0:6", "0:6")

    async def end(session: FakeSession) -> bool:
        await session.stream.close()
        return True

    swarm.servers[0].script = at(Step, end)
    await Text(swarm.session()).step(2)
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


async def test_the_same_result_again_and_again_is_no_progress(make_swarm):
    """A server that repeats part of the outputs for ever is found out like one that says nothing."""
    swarm = await make_swarm("0:6", "0:6")

    async def repeat(session: FakeSession) -> bool:
        while not session.stream.is_over:
            await session.stream.send(*result(num_tokens=1))
            await asyncio.sleep(0)
        return True

    swarm.servers[0].script = at(Step, repeat)
    session = swarm.session(late_s=0.05, probe_timeout_s=0.5)
    await session.step(torch.zeros(2, HIDDEN), positions=[0], num_tokens=[2])
    assert swarm.peers.failures == [swarm.servers[0].peer_id]


# -- patience -----------------------------------------------------------------------------------------------------


async def test_patience_ends_with_the_last_error(make_swarm):
    """When every server keeps failing, the caller gets the reason after max_wait_s, not never."""
    swarm = await make_swarm("0:6")

    async def fail(session: FakeSession, message: Message) -> None:
        raise PeerDisconnected("gone")

    swarm.servers[0].script = fail
    with pytest.raises(PeerDisconnected, match="gone"):
        await Text(swarm.session(max_wait_s=0.3)).step(1)


async def test_catching_up_takes_as_long_as_it_takes(make_swarm):
    """A second failure, after a replay that took longer than max_wait_s and got ahead, does not end the step."""
    swarm = await make_swarm(*CHAIN, CHAIN[1], CHAIN[1], max_step_tokens=4)
    first, slow = swarm.servers[1], swarm.servers[3]
    session = swarm.session(max_wait_s=2.5, late_s=0.02, probe_timeout_s=PATIENT)
    text = Text(session)
    await text.step(60)

    async def crawl(session: FakeSession, message: Message) -> None:
        if isinstance(message, Step):
            await asyncio.sleep(0.25)
            if slow.received["push:Step"] > 12:
                dying(session)

    slow.script = crawl
    first.kill()
    await text.decode(2)
    assert {first.peer_id, slow.peer_id} == set(swarm.peers.failures) and slow.received["push:Step"] == 13


async def test_a_server_that_fails_at_the_same_token_every_time_is_given_up(make_swarm):
    """The outputs before that token come each time, but only the first time are they new."""
    swarm = await make_swarm("0:6", max_step_tokens=4)

    async def fail(session: FakeSession, message: Message) -> None:
        if isinstance(message, Step) and message.positions[0] >= 8:
            raise PeerBusy("full")

    swarm.servers[0].script = fail
    async with asyncio.timeout(20):
        with pytest.raises(PeerBusy, match="full"):
            await Text(swarm.session(max_wait_s=0.3)).step(16)


async def test_a_server_that_only_says_when_asked_that_it_waits_is_not_waited_for_without_end(make_swarm):
    """Its word holds off the search for who is stuck, but not the caller's limit."""
    swarm = await make_swarm("0:6")

    async def wait(session: FakeSession, message: Message) -> bool:
        if isinstance(message, Probe):
            await session.stream.send(
                ProbeResult(nonce=message.nonce, step_id=0, received=(2,), produced=(0,), is_waiting=True)
            )
        return isinstance(message, Probe | Step)

    swarm.servers[0].script = wait
    async with asyncio.timeout(20):
        with pytest.raises(PeerBusy, match="no room"):
            await Text(swarm.session(max_wait_s=0.3, late_s=0.02)).step(2)


async def test_a_session_outlives_the_last_replica(make_swarm):
    """Nobody left: the step waits up to the caller's limit, then fails; when a server is back, the session goes on."""
    swarm = await make_swarm("0:3", "3:6")
    lost = swarm.servers[1]
    text = Text(swarm.session(max_wait_s=0.3))
    await text.step(6)
    await text.decode(2)
    lost.kill()
    swarm.peers.servers.remove(lost)
    for _ in range(2):
        with pytest.raises(RouteNotFound, match="block 3"):
            await text.decode(1)
    lost.revive()
    swarm.peers.servers.append(lost)
    await text.decode(3)
    assert swarm.servers[0].num_tokens <= 6 + 5 + 2  # its part was not lost


async def test_missing_blocks_are_waited_for(make_swarm):
    """A server that appears in time is used."""
    swarm = await make_swarm("0:6")
    late = swarm.peers.servers.pop()
    asked = []

    def appear(blocks: BlockRange) -> None:
        asked.append(blocks)
        if len(asked) == 3:
            swarm.peers.servers.append(late)

    swarm.peers.on_route = appear
    await Text(swarm.session()).step(2)
    assert len(asked) == 3


async def test_a_lookup_that_fails_is_tried_again(make_swarm):
    """A DHT that does not answer costs a pause, not the session."""
    swarm = await make_swarm("0:6")
    failures = [PeerTimeout("DHT search did not end")]

    def fail_once(blocks: BlockRange) -> None:
        if failures:
            raise failures.pop()

    swarm.peers.on_route = fail_once
    await Text(swarm.session()).step(2)


async def test_a_server_without_room_is_waited_for_and_shown(make_swarm, caplog):
    """Waiting keeps a step alive beyond its deadline, is logged once a second at most, and shown while it lasts."""
    swarm = await make_swarm("0:6")
    seen = []

    async def wait(session: FakeSession) -> None:
        client.heard.clear()
        for _ in range(4):
            await session.stream.send(Waiting(step_id=0, expected_s=7.0))
        await client.heard.wait()
        seen.append((client.waiting.peer_id, client.waiting.expected_s, repr(client)))

    swarm.servers[0].script = at(Step, wait)
    client = swarm.session()
    with caplog.at_level(logging.INFO, "swarm.client.supervisor"):
        await Text(client).step(2)
    name = swarm.servers[0].peer_id[-8:]
    assert seen == [
        (swarm.servers[0].peer_id, 7.0, f"<RemoteSession 1 hops | position 2/1048576 | waits 7 s for {name}>")
    ]
    assert client.waiting is None and swarm.peers.failures == []
    assert sum("no room" in record.message for record in caplog.records) == 1


async def test_waiting_for_room_ends_with_the_callers_limit(make_swarm):
    """A server that says for ever that it has no room yet: PeerBusy, and the session can be tried again."""
    swarm = await make_swarm("0:6")

    async def wait(session: FakeSession) -> bool:
        while not session.stream.is_over:
            await session.stream.send(Waiting(step_id=0, expected_s=7.0))
            await asyncio.sleep(0)
        return True

    swarm.servers[0].script = at(Step, wait)
    text = Text(swarm.session(max_wait_s=0.2))
    with pytest.raises(PeerBusy, match="no room") as caught:
        await text.step(2)
    assert caught.value.retry_after_s == 7.0 and caught.value.peer_id == swarm.servers[0].peer_id
