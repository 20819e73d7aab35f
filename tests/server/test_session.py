"""Sessions of real handlers on real transports, with the blocks alone made up."""

import asyncio
import os

import pytest
import torch

from swarm.codec import torch_dtype
from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected, PeerError, PeerTimeout, PeerUnreachable
from swarm.identity import Identity
from swarm.network import Node
from swarm.protocol import (
    PUSH_SERVICE,
    DType,
    Encoding,
    Forwarding,
    LinkDown,
    LinkFault,
    Probe,
    ProbeResult,
    PushAccepted,
    PushHello,
    Waiting,
)
from swarm.server.handler import Handler
from swarm.server.loopback import LocalStream
from tests.server.conftest import chain_of
from tests.server.fakes import HIDDEN, Chain, eventually, failure_of, make_step, through, tokens, until_free

pytestmark = pytest.mark.asyncio(loop_scope="module")


# -- the chain ------------------------------------------------------------------------------------------------------


async def test_a_step_passes_three_servers_and_the_client_sends_and_gets_it_once(nodes: list[Node]):
    """One message up and one down per decoded token; servers push to each other, and each is in the trace."""
    async with chain_of(nodes) as chain:
        first, middle, last = hops = await chain.open_route(0, 1, 2)
        inputs = tokens(12)
        await first.step(0, [inputs[:10]], positions=[0], outputs_from=[9])
        [out] = await last.results(0, [10])
        torch.testing.assert_close(out, through(inputs, 10, 20, 30)[9:10], rtol=0, atol=0)
        for step in (1, 2):
            await first.step(step, [inputs[9 + step : 10 + step]], positions=[9 + step])
            [out] = await last.results(step, [10 + step])
            torch.testing.assert_close(out, through(inputs, 10, 20, 30)[9 + step : 10 + step], rtol=0, atol=0)
        assert last.num_results == 3
        assert len(last.last_result.trace) == 3 and all(hop.compute_us == 2000 for hop in last.last_result.trace)
        await first.expect(Forwarding)
        await middle.expect(Forwarding)
        assert not first.stream._inbox and not middle.stream._inbox
        for hop in hops:
            await hop.stream.close()
        await until_free(chain)


async def test_a_prompt_streams_through_the_chain_batch_by_batch(nodes: list[Node]):
    """The second server has outputs of a prompt's first batches while the first server still has its last ones."""
    async with chain_of(nodes, 2) as chain:
        first, last = await chain.open_route(0, 1)
        first_device, second_device = chain.executors
        inputs = tokens(64)
        run_batch = first_device._run_batch

        def run_two_batches(session):
            run_batch(session)
            if first_device.num_tokens_run >= 16:
                first_device.hold()

        first_device._run_batch = run_two_batches
        await first.step(0, [inputs], positions=[0], outputs_from=[63])
        await eventually(lambda: second_device.num_tokens_run == 16, "two batches at the second server")
        first_device._run_batch = run_batch
        first_device.release()
        [out] = await last.results(0, [64])
        torch.testing.assert_close(out, through(inputs, 10, 20)[63:], rtol=0, atol=0)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
async def test_outputs_travel_as_the_step_came(nodes: list[Node], dtype: DType, encoding: Encoding):
    """Dtype and encoding of the client's step are kept from hop to hop and back."""
    async with chain_of(nodes, 2) as chain:
        first, last = await chain.open_route(0, 1)
        await first.step(0, [tokens(3)], positions=[0], dtype=torch_dtype(dtype), encoding=encoding)
        await last.results(0, [3])
        spec = last.last_result.hidden_states
        assert (spec.dtype, spec.encoding) == (dtype, encoding)


async def test_rows_are_reordered_rolled_back_and_extended_unevenly(nodes: list[Node]):
    """Beam order, rollback and rows without new tokens arrive at every hop as the client meant them."""
    async with chain_of(nodes) as chain:
        first, _, last = await chain.open_route(0, 1, 2, rows=2)
        a, b = tokens(9, 1), tokens(9, 2)
        await first.step(0, [a[:5], b[:3]], positions=[0, 0], outputs_from=[4, 2])
        await last.results(0, [5, 3])
        # row 0 becomes what row 1 was; row 1 what row 0 was, cut to 4 tokens
        await first.step(1, [b[3:5], a[4:4]], positions=[3, 4], order=[1, 0])
        out, _ = await last.results(1, [5, 0])
        torch.testing.assert_close(out, through(b[:5], 10, 20, 30)[3:], rtol=0, atol=0)
        await first.step(2, [b[5:6], a[4:9]], positions=[5, 4], outputs_from=[5, 8])
        out_b, out_a = await last.results(2, [6, 9])
        torch.testing.assert_close(out_b, through(b[:6], 10, 20, 30)[5:], rtol=0, atol=0)
        torch.testing.assert_close(out_a, through(a, 10, 20, 30)[8:], rtol=0, atol=0)


async def test_a_lost_middle_server_is_replaced_from_the_history_of_the_first(nodes: list[Node]):
    """The client sends nothing again: the first server feeds the new one all 12 tokens once, and that one the last."""
    async with chain_of(nodes, 4) as chain:
        first, middle, last = await chain.open_route(0, 1, 2)
        inputs = tokens(13)
        for step, (start, end) in enumerate([(0, 10), (10, 11), (11, 12)]):
            await first.step(step, [inputs[start:end]], positions=[start])
            await last.results(step, [end])
        await middle.stream.close()
        assert (await first.expect(Forwarding)).epoch == 0
        assert (await first.expect(LinkDown)).fault is LinkFault.UNREACHABLE
        before = [executor.num_tokens_run for executor in chain.executors]
        chain.executors[3].constant = 20  # the same blocks
        spare = await chain.open(3)
        await spare.forward(1, last, held=[12], as_of=2)
        await first.forward(2, spare, held=[0], as_of=2)
        assert (await first.expect(Forwarding)).epoch == 2
        await first.step(3, [inputs[12:]], positions=[12])
        [out] = await last.results(3, [13])
        torch.testing.assert_close(out, through(inputs, 10, 20, 30)[12:], rtol=0, atol=0)
        run = [now - then for now, then in zip((e.num_tokens_run for e in chain.executors), before, strict=True)]
        assert run == [1, 0, 1, 13]


async def test_a_history_that_is_gone_is_said_to_be(nodes: list[Node]):
    """With no memory for history a Forward to an empty replacement is answered HISTORY_LOST; with some, it works."""
    for history_bytes, expected in ((0, LinkDown), (1 << 20, Forwarding)):
        async with chain_of(nodes, 3, history_bytes=history_bytes) as chain:
            first, last = await chain.open_route(0, 1)
            await first.step(0, [tokens(4)], positions=[0])
            await last.results(0, [4])
            await first.expect(Forwarding)
            spare = await chain.open(2, is_last=True)
            await first.forward(7, spare, held=[0], as_of=0)
            answer = await first.expect(expected)
            assert answer.epoch == 7 and getattr(answer, "fault", LinkFault.HISTORY_LOST) is LinkFault.HISTORY_LOST


async def test_a_session_may_feed_another_on_the_same_server(nodes: list[Node]):
    """A route that passes a server twice works, and neither session can outlive its own client stream."""
    async with chain_of(nodes, 1) as chain:
        first, last = await chain.open_route(0, 0)
        inputs = tokens(30)
        await first.step(0, [inputs], positions=[0])
        [out] = await last.results(0, [30])
        torch.testing.assert_close(out, through(inputs, 10, 10), rtol=0, atol=0)
        await first.expect(Forwarding)
        await last.stream.close()
        assert (await first.expect(LinkDown)).fault is LinkFault.UNREACHABLE
        await first.stream.close()
        await until_free(chain)


async def test_outputs_wait_for_the_first_forward_and_may_go_through_the_client(nodes: list[Node]):
    """A hop that is not the last keeps its outputs; a Forward with an empty peer id brings them all to the client."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0)
        inputs = tokens(20)
        await hop.step(0, [inputs], positions=[0], outputs_from=[19])
        await eventually(lambda: chain.executors[0].num_tokens_run == 20)
        await hop.forward(3, None, held=[0], as_of=0)
        assert (await hop.expect(Forwarding)).epoch == 3
        [out] = await hop.results(0, [20])
        torch.testing.assert_close(out, through(inputs, 10), rtol=0, atol=0)


async def test_a_newer_forward_replaces_the_older_and_ends_its_stream(nodes: list[Node]):
    """Outputs go to the second target only; the first one's session lives on without a push stream."""
    async with chain_of(nodes, 3) as chain:
        first, old = await chain.open_route(0, 1)
        await first.step(0, [tokens(2)], positions=[0])
        await old.results(0, [2])
        assert chain.handlers[1].pushes._targets[old.push_key]._pushes
        new = await chain.open(2, is_last=True)
        await first.forward(1, new, held=[0], as_of=0)
        await first.step(1, [tokens(1)], positions=[2])
        await new.results(1, [3])
        await eventually(lambda: not chain.handlers[1].pushes._targets[old.push_key]._pushes, "end of the old stream")
        assert not old.stream._inbox and chain.executors[1].sessions


# -- push streams ---------------------------------------------------------------------------------------------------


async def test_a_push_stream_may_come_before_its_session(nodes: list[Node]):
    """It is accepted as soon as the client has opened the session with its key."""
    async with chain_of(nodes, 2) as chain:
        key = os.urandom(16)
        stream = await chain.transports[1].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
        await stream.send(PushHello(push_key=key))
        await eventually(lambda: chain.handlers[0].pushes._awaited)
        hop = await chain.open(0, is_last=True, push_key=key)
        assert isinstance((await stream.receive(10))[0], PushAccepted)
        await stream.send(*make_step(0, [tokens(3)], positions=[0]))
        await hop.results(0, [3])


async def test_what_is_at_an_address_is_not_for_the_client(nodes: list[Node], monkeypatch: pytest.MonkeyPatch):
    """It may name a peer of its own making, to learn from the failure what listens inside the server's network."""

    async def fail(*args: object, **kwargs: object) -> None:
        raise PeerUnreachable("10.0.0.7 port 22: no peer of a private swarm (WRONG_VERSION_NUMBER)")

    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0)
        monkeypatch.setattr("swarm.server.sender.greet", fail)
        await hop.forward(5, None, peer_id=Identity.generate().peer_id)
        assert (await hop.expect(LinkDown)).text == "the next server can't be reached"


async def test_a_push_stream_with_a_wrong_key_is_refused_and_the_hop_says_so(nodes: list[Node]):
    """After a while; too many that wait are refused at once; nothing stays behind."""
    async with chain_of(nodes, 2, early_push_timeout_s=0.05, max_early_pushes=1) as chain:
        hop, target = await chain.open(0), await chain.open(1, is_last=True)
        await hop.forward(5, target, push_key=bytes(16))
        down = await hop.expect(LinkDown)
        assert down.epoch == 5 and down.fault is LinkFault.UNREACHABLE and "push_key" in down.text
    async with chain_of(nodes, 2, max_early_pushes=1) as chain:
        streams = [await chain.client.open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10) for _ in range(2)]
        await streams[0].send(PushHello(push_key=bytes(16)))
        await streams[1].send(PushHello(push_key=bytes(16)))
        assert isinstance(await failure_of(streams[1]), PeerBusy)


async def test_a_peer_that_is_nobody_makes_the_link_go_down(nodes: list[Node]):
    """Neither nonsense nor an unknown peer id ends the session."""
    async with chain_of(nodes, 2, push_open_timeout_s=2.0) as chain:
        hop, target = await chain.open(0), await chain.open(1, is_last=True)
        await hop.forward(1, target, peer_id="nonsense")
        assert (await hop.expect(LinkDown)).epoch == 1
        await hop.step(0, [tokens(3)], positions=[0])
        await hop.forward(2, target, held=[0], as_of=-1)
        assert (await hop.expect(Forwarding)).epoch == 2
        await target.results(0, [3])


async def test_a_bad_pushed_step_ends_the_push_stream_and_not_the_session(nodes: list[Node]):
    """The session goes on with another feeder, even with the client itself."""
    async with chain_of(nodes, 2) as chain:
        hop = await chain.open(0, is_last=True)
        stream = await chain.transports[1].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
        await stream.send(PushHello(push_key=hop.push_key))
        await stream.send(*make_step(0, [tokens(2)], positions=[5], base=[0]))
        assert isinstance(await failure_of(stream), InvalidRequest)
        for message in (Probe(nonce=1), PushHello(push_key=hop.push_key)):
            stream = await chain.transports[1].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
            await stream.send(PushHello(push_key=hop.push_key))
            await stream.send(message)
            assert isinstance(await failure_of(stream), InvalidRequest)
        await hop.step(0, [tokens(2)], positions=[0])
        await hop.results(0, [2])


async def test_too_many_pushers_end_the_oldest(nodes: list[Node]):
    """A session has a bounded number of push streams."""
    async with chain_of(nodes, 2, max_pushes=2) as chain:
        hop = await chain.open(0, is_last=True)
        streams = []
        for _ in range(3):
            stream = await chain.transports[1].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
            await stream.send(PushHello(push_key=hop.push_key))
            assert isinstance((await stream.receive(10))[0], PushAccepted)
            streams.append(stream)
        assert isinstance(await failure_of(streams[0]), PeerBusy)
        await streams[2].send(*make_step(0, [tokens(2)], positions=[0]))
        await hop.results(0, [2])


async def test_a_push_key_is_used_once(nodes: list[Node]):
    """A second session with a live key is refused; the first is not disturbed."""
    async with chain_of(nodes, 1) as chain:
        hop = await chain.open(0, is_last=True)
        with pytest.raises(InvalidRequest, match="push_key"):
            await chain.open(0, is_last=True, push_key=hop.push_key)
        await hop.step(0, [tokens(2)], positions=[0])
        await hop.results(0, [2])


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


# -- pressure -------------------------------------------------------------------------------------------------------


async def test_a_client_that_never_reads_is_not_buffered_for(nodes: list[Node]):
    """The server stops computing once outputs wait, stops reading, and gives the client up in the end."""
    limits = {"max_step_tokens": 256, "max_pending_bytes": 4096, "send_timeout_s": 0.5}
    async with chain_of(nodes, 1, executor={"budget": 256}, **limits) as chain:
        [executor] = chain.executors
        executor.span.hidden_size = 4096
        run = executor._run_batch
        executor._run_batch = lambda session: widen(executor, run, session)
        hop = await chain.open(0, is_last=True, max_length=4000)

        async def send_all() -> PeerError:
            try:
                for start in range(0, 3840, 256):
                    step = make_step(0, [torch.zeros(256, 4096)], positions=[start], base=[0], outputs_from=[0])
                    await hop.stream.send(*step)
            except PeerError as error:
                return error
            return await failure_of(hop.stream)

        async with asyncio.timeout(20):
            assert isinstance(await send_all(), PeerError)
        # at most: window of 4 MiB (one message), one that is being sent, and the room of two messages
        assert executor.num_tokens_run <= 6 * 256
        await until_free(chain)


def widen(executor, run, session) -> None:
    """Let the fake, whose rows are narrow, run wide inputs."""
    session.rows = [row if row.shape[1] == 4096 else torch.zeros(0, 4096) for row in session.rows]
    run(session)


async def test_a_probe_is_answered_while_steps_wait(nodes: list[Node]):
    """Queued, pending and running steps do not stand in its way; it tells how far the session is."""
    async with chain_of(nodes, 1, max_step_tokens=8) as chain:
        hop = await chain.open(0, is_last=True)
        inputs = tokens(80)
        chain.executors[0].hold()
        for start in range(0, 80, 8):
            await hop.step(4, [inputs[start : start + 8]], positions=[start], base=[0], outputs_from=[0])
        await hop.stream.send(Probe(nonce=77))
        answer = await hop.expect(ProbeResult)
        assert (answer.nonce, answer.step_id, answer.produced, answer.is_waiting) == (77, 4, (0,), False)
        assert 0 < answer.received[0] <= 24
        chain.executors[0].sessions[0].listener.waiting(4, 3.0)
        assert (await hop.expect(Waiting)).expected_s == 3.0
        await hop.stream.send(Probe(nonce=78))
        assert (await hop.expect(ProbeResult)).is_waiting
        chain.executors[0].release()
        [out] = await hop.results(4, [80])
        torch.testing.assert_close(out, through(inputs, 10), rtol=0, atol=0)
        await hop.stream.send(Probe(nonce=79))
        answer = await hop.expect(ProbeResult)
        assert answer.produced == answer.received == (80,) and not answer.is_waiting


async def test_a_slow_next_server_slows_the_first_down(nodes: list[Node]):
    """What waits between two servers is bounded, and a Probe and a new Forward still come through."""
    limits = {"max_step_tokens": 64, "max_length": 2048}
    async with chain_of(nodes, 3, executor={"budget": 64}, max_step_tokens=limits["max_step_tokens"]) as chain:
        first, last = await chain.open_route(0, 1)
        await first.expect(Forwarding)
        inputs = tokens(1920)
        chain.executors[1].hold()
        for start in range(0, 1920, 64):
            await first.step(0, [inputs[start : start + 64]], positions=[start], base=[0], outputs_from=[1919])
        await eventually(lambda: chain.executors[0].num_tokens_run > 128)
        await first.stream.send(Probe(nonce=1))
        await first.expect(ProbeResult)
        spare = await chain.open(2, is_last=True)
        await first.forward(1, spare, held=[0], as_of=-1)
        assert (await first.expect(Forwarding)).epoch == 1
        [out] = await spare.results(0, [1920])
        torch.testing.assert_close(out, through(inputs, 10, 30)[1919:], rtol=0, atol=0)
        assert not last.stream._inbox


async def test_64_sessions_at_once_from_one_client(nodes: list[Node]):
    """Through two servers, each with its own tokens; afterwards nothing is held."""
    async with chain_of(nodes, 2, executor={"budget": 64}) as chain:

        async def one(seed: int) -> None:
            first, last = await chain.open_route(0, 1)
            inputs = tokens(20, seed)
            await first.step(0, [inputs[:16]], positions=[0])
            await last.results(0, [16])
            for position in range(16, 20):
                await first.step(position, [inputs[position : position + 1]], positions=[position])
                [out] = await last.results(position, [position + 1])
            torch.testing.assert_close(out, through(inputs, 10, 20)[19:], rtol=0, atol=0)
            await first.stream.close()
            await last.stream.close()

        await asyncio.gather(*(one(seed) for seed in range(64)))
        await until_free(chain)


# -- ends -----------------------------------------------------------------------------------------------------------


async def end_by_fin(chain: Chain, hop) -> None:
    await hop.stream.close()


async def end_by_lost_connection(chain: Chain, hop) -> None:
    for connection in list(chain.client._connections):
        connection.transport.abort()


async def end_by_a_stream_that_timed_out(chain: Chain, hop) -> None:
    """As after a send for which the client made no room."""
    session = chain.handlers[0].pushes._targets[hop.push_key]
    await session._stream.abort(PeerTimeout("made no room"))


async def end_by_executor(chain: Chain, hop) -> None:
    cache = next(c for c in chain.executors[0].sessions)
    cache.listener.failed(0, PeerError("the blocks failed on this batch"))
    assert "blocks failed" in str(await failure_of(hop.stream))


async def end_by_shutdown(chain: Chain, hop) -> None:
    await chain.transports[0].close()
    assert isinstance(await failure_of(hop.stream), PeerDisconnected)


@pytest.mark.parametrize(
    "end", [end_by_fin, end_by_lost_connection, end_by_a_stream_that_timed_out, end_by_executor, end_by_shutdown]
)
async def test_whatever_ends_a_session_frees_pages_history_and_push_streams(nodes: list[Node], end):
    """In the middle of a step, too."""
    async with chain_of(nodes, 2) as chain:
        first, last = await chain.open_route(0, 1)
        await first.step(0, [tokens(20)], positions=[0])
        await last.results(0, [20])
        assert chain.pages and chain.handlers[0].history.used_bytes
        target = chain.handlers[1].pushes._targets[last.push_key]
        assert target._pushes
        chain.executors[0].hold()
        await first.step(1, [tokens(20)], positions=[20])
        await end(chain, first)
        await eventually(lambda: not chain.executors[0].sessions and not target._pushes, "the end")
        await last.stream.close()
        await until_free(chain)


async def test_a_silent_session_is_closed_and_a_pushed_one_is_not(nodes: list[Node]):
    """What comes over push streams counts as a sign of life."""
    async with chain_of(nodes, 2, idle_timeout_s=1.0) as chain:
        silent = await chain.open(0, is_last=True)
        fed = await chain.open(0, is_last=True)
        stream = await chain.transports[1].open(chain.peer_id(0), PUSH_SERVICE, timeout_s=10)
        await stream.send(PushHello(push_key=fed.push_key))
        ending = asyncio.create_task(failure_of(silent.stream))
        position = 0
        while not ending.done():
            await stream.send(*make_step(position, [tokens(1)], positions=[position]))
            position += 1
            await fed.results(position - 1, [position])
            await asyncio.wait([ending], timeout=0.05)
        error = await ending
        assert isinstance(error, PeerTimeout) and "silence" in str(error)
        await eventually(lambda: len(chain.executors[0].sessions) == 1)


async def test_history_over_the_budget_is_dropped_and_counted(nodes: list[Node]):
    """The older session loses it; both go on."""
    async with chain_of(nodes, 2, history_bytes=40 * 4 * HIDDEN) as chain:
        handler: Handler = chain.handlers[0]
        routes = [await chain.open_route(0, 1) for _ in range(2)]
        for first, last in routes:
            await first.step(0, [tokens(30)], positions=[0])
            await last.results(0, [30])
            await first.expect(Forwarding)
        assert handler.history.num_dropped == 1 and handler.history.used_bytes <= handler.history.limit_bytes
        first, last = routes[0]
        await first.step(1, [tokens(1)], positions=[30])
        await last.results(1, [31])
        await first.forward(1, last, held=[0], as_of=1)
        assert (await first.expect(LinkDown)).fault is LinkFault.HISTORY_LOST
        first, last = routes[1]
        await first.forward(1, last, held=[0], as_of=0)
        await first.expect(Forwarding)
