"""What comes from the network is taken once, and refused by name where it does not fit; with real handlers."""

import pytest
import torch

from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved
from swarm.network import Node
from swarm.protocol import Forward, Forwarding, LinkDown, PushAccepted
from tests.server.conftest import chain_of
from tests.server.fakes import HIDDEN, eventually, failure_of, make_step, through, tokens, until_free

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_duplicate_and_stale_steps_change_nothing(nodes: list[Node]):
    """A chunk may come twice, overlap what is there, or belong to a step that is over."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        inputs = tokens(8)
        await hop.step(0, [inputs[:4]], positions=[0])
        await hop.step(0, [inputs[:4]], positions=[0])
        await hop.results(0, [4])
        await hop.step(1, [inputs[2:7]], positions=[2], base=[4], outputs_from=[4])
        await hop.step(0, [tokens(3, 5)], positions=[1])
        await hop.step(1, [inputs[6:8]], positions=[6], base=[4], outputs_from=[4])
        [out] = await hop.results(1, [8])
        torch.testing.assert_close(out, through(inputs, 10)[4:], rtol=0, atol=0)
        assert chain.executors[0].num_tokens_run == 8


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (make_step(0, [tokens(2)], positions=[1]), "cannot continue at position 1"),
        (make_step(0, [tokens(2), tokens(1)], positions=[0, 0]), "the session has 1 rows"),
        (make_step(0, [tokens(2)], positions=[2047], base=[0]), "cannot continue"),
        (make_step(0, [tokens(2)], positions=[0], order=[1]), "order names row 1"),
        (make_step(0, [torch.zeros(2, HIDDEN + 1)], positions=[0]), "hidden states of shape"),
        (make_step(0, [tokens(33)], positions=[0]), "1 to 32 tokens"),
        (make_step(0, [tokens(0)], positions=[0]), "1 to 32 tokens"),
        ((make_step(0, [tokens(2)], positions=[0])[0], memoryview(b"short")), "bytes"),
        ((PushAccepted(), b""), "expected Step, Forward, Probe or HandOver"),
        ((make_step(0, [tokens(1)], positions=[0])[0], memoryview(bytes(16 * 64))), "bytes"),
        ((Forward(epoch=0, peer_id="", push_key=bytes(16), held=(0, 0), as_of=-1, max_step_tokens=1), b""), "1 rows"),
    ],
)
async def test_a_bad_message_ends_the_session_with_a_typed_error_and_frees_it(nodes: list[Node], step, text: str):
    """Whatever does not fit is refused by name before anything runs, and nothing stays behind."""
    async with chain_of(nodes, 1, max_step_tokens=32) as chain:
        hop, other = await chain.open(0, is_last=True), await chain.open(0, is_last=True)
        await hop.stream.send(*step)
        error = await failure_of(hop.stream)
        assert isinstance(error, InvalidRequest | PeerMisbehaved) and text in str(error), error
        await eventually(lambda: len(chain.executors[0].sessions) == 1)
        await other.step(0, [tokens(2)], positions=[0])
        await other.results(0, [2])
        await other.stream.close()
        await until_free(chain)


async def test_a_recurrent_model_refuses_to_roll_back(nodes: list[Node]):
    """Its state can't go back; going on is fine."""
    async with chain_of(nodes, 1, executor={"stateful": True}) as chain:
        hop = await chain.open(0, is_last=True)
        assert not hop.opened.can_rollback
        await hop.step(0, [tokens(3)], positions=[0])
        await hop.step(1, [tokens(1)], positions=[3])
        await hop.results(1, [4])
        await hop.step(2, [tokens(1)], positions=[2])
        assert isinstance(await failure_of(hop.stream), InvalidRequest)


async def test_what_the_cache_could_never_hold_is_refused_at_once(nodes: list[Node]):
    """Both numbers are in the message."""
    async with chain_of(nodes, 1, executor={"num_pages": 4}) as chain:
        hop = await chain.open(0, is_last=True, rows=2)
        await hop.step(0, [tokens(33), tokens(32)], positions=[0, 0])
        error = await failure_of(hop.stream)
        assert isinstance(error, PeerBusy) and "80" in str(error) and "64" in str(error)
        await until_free(chain)


async def test_what_is_pushed_and_could_never_be_held_ends_the_session(nodes: list[Node]):
    """The client, not the server before, has to look elsewhere: it is told so."""
    async with chain_of(nodes, 2) as chain:
        chain.executors[1].num_pages = 2
        first, last = await chain.open_route(0, 1)
        await first.step(0, [tokens(33)], positions=[0])
        assert isinstance(await failure_of(last.stream), PeerBusy)
        await first.expect(Forwarding)
        await first.expect(LinkDown)


async def test_outputs_that_were_sent_long_ago_can_not_be_asked_for(nodes: list[Node]):
    """They are not kept: a step wants outputs of its own tokens."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        await hop.step(0, [tokens(40)], positions=[0])
        await hop.results(0, [40])
        await hop.step(1, [tokens(1)], positions=[40], outputs_from=[0])
        error = await failure_of(hop.stream)
        assert isinstance(error, InvalidRequest) and "outputs wanted" in str(error)
