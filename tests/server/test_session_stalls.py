"""What could make a session stand still or stay behind: no receiver, no memory, odd messages; with real handlers."""

import asyncio

import pytest
import torch

from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected
from swarm.network import Node
from swarm.protocol import PUSH_SERVICE, Forwarding, LinkDown, Probe, ProbeResult, PushHello
from swarm.server.loopback import LocalStream
from tests.server.conftest import chain_of
from tests.server.fakes import eventually, failure_of, make_step, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("pushed", [False, True])
async def test_without_history_a_late_forward_sets_a_prompt_going_again(nodes: list[Node], pushed: bool):
    """Nothing runs any more when outputs for nobody fill the room; the Forward makes room, so the rest must follow."""
    async with chain_of(nodes, 3, max_step_tokens=8, history_bytes=0) as chain:
        hop, last = await chain.open(0), await chain.open(1, is_last=True)
        inputs = tokens(80)
        stream = hop.stream
        if pushed:
            stream = await chain.transports[2].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
            await stream.send(PushHello(push_key=hop.push_key))
        for start in range(0, 80, 8):
            await stream.send(*make_step(0, [inputs[start : start + 8]], positions=[start], base=[0]))
        await eventually(lambda: chain.executors[0].num_tokens_run >= 16)
        await hop.stream.send(Probe(nonce=1))
        await hop.expect(ProbeResult)
        assert chain.executors[0].num_tokens_run < 80
        await hop.forward(1, last, held=[0], as_of=-1)
        assert (await hop.expect(Forwarding)).epoch == 1
        async with asyncio.timeout(5):
            [out] = await last.results(0, [80])
        torch.testing.assert_close(out, run_blocks(run_blocks(inputs, 10), 20), rtol=0, atol=0)


async def test_outputs_that_nobody_takes_end_the_session_when_memory_is_full(nodes: list[Node]):
    """It would stand still for ever: after a while the client is told why, and everything is freed."""
    async with chain_of(nodes, 1, max_step_tokens=8, history_bytes=0, forward_timeout_s=0.2) as chain:
        hop = await chain.open(0)
        for start in range(0, 80, 8):
            await hop.step(0, [tokens(8)], positions=[start], base=[0])
        error = await failure_of(hop.stream)
        assert isinstance(error, PeerBusy) and "Forward" in str(error)
        await eventually(lambda: not chain.executors[0].sessions)
        assert chain.handlers[0].history.used_bytes == 0


async def test_a_session_whose_receiver_comes_in_time_lives_on(nodes: list[Node]):
    """The clock stops with the Forward."""
    async with chain_of(nodes, 1, max_step_tokens=8, history_bytes=0, forward_timeout_s=0.3) as chain:
        hop = await chain.open(0)
        for start in range(0, 40, 8):
            await hop.step(0, [tokens(8)], positions=[start], base=[0])
        await eventually(lambda: chain.executors[0].num_tokens_run >= 16)
        await hop.forward(1, None, held=[0], as_of=-1)
        await hop.expect(Forwarding)
        await hop.results(0, [40])
        await asyncio.sleep(0.5)
        await hop.step(1, [tokens(1)], positions=[40])
        await hop.results(1, [41])


async def test_outputs_that_were_sent_long_ago_can_not_be_asked_for(nodes: list[Node]):
    """They are not kept: a step wants outputs of its own tokens."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        await hop.step(0, [tokens(40)], positions=[0])
        await hop.results(0, [40])
        await hop.step(1, [tokens(1)], positions=[40], outputs_from=[0])
        error = await failure_of(hop.stream)
        assert isinstance(error, InvalidRequest) and "outputs wanted" in str(error)


async def test_a_waiting_step_that_is_taken_back_waits_no_more(nodes: list[Node]):
    """Or a probe would tell the client for ever to be patient."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        chain.executors[0].hold()
        await hop.step(0, [tokens(4)], positions=[0])
        await eventually(lambda: chain.executors[0].sessions[0].queue)
        chain.executors[0].sessions[0].listener._is_waiting = True
        await hop.step(1, [tokens(4)], positions=[0])
        await hop.stream.send(Probe(nonce=1))
        assert not (await hop.expect(ProbeResult)).is_waiting


async def test_a_push_stream_that_comes_when_the_session_ends_is_not_kept(nodes: list[Node]):
    """It would stay open for ever, since whoever ends the streams has been there already."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        session = chain.handlers[0].pushes._targets[hop.push_key]
        await hop.stream.close()
        await eventually(lambda: not chain.executors[0].sessions)
        near, far = LocalStream.pair("x")
        async with asyncio.timeout(5), near:
            with pytest.raises(PeerDisconnected):
                await session.receive_pushes(far)
        assert not session._pushes


async def test_a_client_can_not_make_a_server_call_others_without_end(nodes: list[Node]):
    """Each Forward opens a stream to a peer of the client's choice: how many, over all its sessions, is bounded."""
    async with chain_of(nodes, 1, max_forwards=4, forwards_per_s=0.0) as chain:
        for epoch in range(6):
            hop = await chain.open(0)
            target = await chain.open(0, is_last=True)
            await hop.forward(epoch, target, peer_id="nobody")
            down = await hop.expect(LinkDown)
            assert down.epoch == epoch and ("too many Forwards" in down.text) == (epoch >= 4)
