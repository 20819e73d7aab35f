"""What could make a session stand still: no receiver, no memory; with real handlers."""

import asyncio

import pytest
import torch

from swarm.errors import PeerBusy
from swarm.network import Node
from swarm.protocol import PUSH_SERVICE, Forwarding, Probe, ProbeResult, PushHello
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
