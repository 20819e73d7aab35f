"""Work that a newer step takes back never runs, and all other work does; with real handlers."""

import pytest
import torch

from swarm.network import Node
from swarm.protocol import Probe, ProbeResult, Waiting
from tests.server.conftest import chain_of
from tests.server.fakes import eventually, through, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_abandoned_step_that_is_still_queued_never_runs(nodes: list[Node]):
    """The next step begins where the abandoned one began: its tokens are dropped, and its outputs do not count."""
    async with chain_of(nodes, 2) as chain:
        first, last = await chain.open_route(0, 1)
        inputs, other = tokens(4), tokens(30, 3)
        await first.step(0, [inputs], positions=[0])
        await last.results(0, [4])
        chain.executors[0].hold()
        for start in (0, 10, 20):
            await first.step(1, [other[start : start + 10]], positions=[4 + start], base=[4], outputs_from=[4])
        await first.step(2, [other[:2]], positions=[4], outputs_from=[5])
        await eventually(lambda: chain.executors[0].num_dropped == 3)
        chain.executors[0].release()
        [out] = await last.results(2, [6])
        torch.testing.assert_close(out, through(torch.cat([inputs, other[:2]]), 10, 20)[5:], rtol=0, atol=0)
        assert chain.executors[0].num_tokens_run == 6


async def test_a_replay_that_still_runs_when_the_next_step_comes_is_not_dropped(nodes: list[Node]):
    """A server that catches up gets the next step's token meanwhile; both count."""
    async with chain_of(nodes, 2) as chain:
        first, last = await chain.open_route(0, 1)
        inputs = tokens(21)
        chain.executors[0].hold()
        await first.step(0, [inputs[:20]], positions=[0])
        await first.step(1, [inputs[20:]], positions=[20])
        chain.executors[0].release()
        [out] = await last.results(1, [21])
        torch.testing.assert_close(out, through(inputs, 10, 20)[20:], rtol=0, atol=0)


async def test_a_waiting_step_that_is_taken_back_waits_no_more(nodes: list[Node]):
    """Or a probe would tell the client for ever to be patient."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        chain.executors[0].hold()
        await hop.step(0, [tokens(4)], positions=[0])
        await eventually(lambda: chain.executors[0].sessions[0].queue)
        chain.executors[0].sessions[0].listener.waiting(0, 3.0)
        await hop.expect(Waiting)
        await hop.step(1, [tokens(4)], positions=[0])
        await hop.stream.send(Probe(nonce=1))
        assert not (await hop.expect(ProbeResult)).is_waiting
