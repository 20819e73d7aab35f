"""What a server admits: limits for all peers together, and a share for each; and what it says of itself."""

import asyncio

import pytest

from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy
from swarm.network import Node
from swarm.server.handler import Handler
from swarm.types import ServerState
from tests.server.conftest import chain_of
from tests.server.fakes import FakeExecutor, eventually, make_handler, tokens


def handler_of(*, stateful: bool = False, hidden_size: int = 64, **limits) -> Handler:
    executor = FakeExecutor(stateful=stateful, num_pages=1 << 16)
    executor.span.hidden_size = hidden_size
    return make_handler(executor, None, **limits)


def test_one_peer_gets_half_and_the_others_the_rest():
    """A peer with half of the sessions is refused another, while a second peer is let in."""
    handler = handler_of(max_sessions=8)
    for _ in range(4):
        handler._admit_rows(1, "greedy")
        handler._count("greedy", 1, 1)
    with pytest.raises(PeerBusy, match="you have 4 sessions"):
        handler._admit_rows(1, "greedy")
    handler._admit_rows(1, "other")
    for _ in range(4):
        handler._count("greedy", -1, -1)
    handler._admit_rows(1, "greedy")
    assert not handler._sessions_of and not handler._rows_of


def test_rows_with_recurrent_states_are_fewer():
    """Each has memory of its own that no page accounts for."""
    handler_of()._admit_rows(512, "a")
    with pytest.raises(PeerBusy, match="rows open"):
        handler_of(stateful=True)._admit_rows(512, "a")


def test_a_step_of_a_wide_model_fits_into_one_message():
    """Steps are limited in bytes, too: 1024 tokens of 65536 floats would not fit."""
    assert handler_of()._max_step_tokens == 1024
    assert handler_of(hidden_size=65536)._max_step_tokens * 65536 * 4 < 64 << 20


def test_its_repr_says_what_an_operator_wants_to_know():
    """State, sessions, speed and load in one line."""
    handler = handler_of()
    handler._count("a", 2, 3)
    assert repr(handler) == "<Handler ONLINE | 2 sessions, 3 rows | 0 tokens/s | load 0.00>"


@pytest.mark.asyncio(loop_scope="module")
async def test_what_it_does_not_serve_is_refused_by_name(nodes: list[Node]):
    """Another checkpoint, other blocks, too long, too many rows, or not now."""
    async with chain_of(nodes, 1) as chain:
        [handler] = chain.handlers
        with pytest.raises(CheckpointMismatch):
            await chain.open(0, model="cd" * 32)
        with pytest.raises(PeerBusy, match="blocks"):  # it may have gone from there: the client looks elsewhere
            await chain.open(0, start=7, end=9)
        with pytest.raises(InvalidRequest, match="positions"):
            await chain.open(0, max_length=4097)
        with pytest.raises(PeerBusy, match="pages"):
            await chain.open(0, rows=1001)
        for state in (ServerState.DRAINING, ServerState.OFFLINE):
            handler.state = state
            with pytest.raises(PeerBusy, match=state.name):
                await chain.open(0)
        assert handler.num_sessions == 0 and not chain.executors[0].sessions


@pytest.mark.asyncio(loop_scope="module")
async def test_it_tells_what_it_does(nodes: list[Node]):
    """Info has load, speed and counts of now; a session that somebody ends is no failure, one that errs is."""
    async with chain_of(nodes, 2) as chain:
        first, _ = chain.handlers
        hops = await chain.open_route(0, 1)
        await hops[0].step(0, [tokens(4)], positions=[0])
        await hops[1].results(0, [4])
        info = first.describe()
        assert (info.num_sessions, info.num_rows, info.num_opened, info.num_tokens) == (1, 1, 1, 4)
        assert info.queue_us == 1000 and info.step_us == 2000 and info.tokens_per_s > 0
        assert info.hidden_size == 4 and info.uptime_s >= 0 and 0 < info.load <= 1
        await hops[0].stream.close()
        await eventually(lambda: first.num_sessions == 0)
        assert first.meter.ended == {"done": 1} and first.describe().num_failed == 0
        bad = await chain.open(0, is_last=True)
        await bad.step(0, [tokens(4)], positions=[7])
        await eventually(lambda: first.describe().num_failed == 1)
        assert first.meter.ended["InvalidRequest"] == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_it_knows_round_trips_to_those_it_sends_to_only(nodes: list[Node]):
    """Whoever connected to us may be a client, whose identity is nobody's business."""
    async with chain_of(nodes, 2) as chain:
        first, second = chain.handlers
        await chain.open_route(0, 1)
        next_peer = chain.peer_id(1)
        await eventually(lambda: first.describe().pings != ())
        assert [ping.peer_id for ping in first.describe().pings] == [next_peer]
        assert first.describe().pings[0].rtt_us > 0 and second.describe().pings == ()


@pytest.mark.asyncio(loop_scope="module")
async def test_refusals_takeovers_and_lost_links_are_counted(nodes: list[Node]):
    """What an operator looks for when somebody complains."""
    async with chain_of(nodes, 2) as chain:
        first, second = chain.handlers
        with pytest.raises(CheckpointMismatch):
            await chain.open(0, model="cd" * 32)
        assert first.meter.refused == {"CheckpointMismatch": 1}
        hops = await chain.open_route(0, 1)
        await eventually(lambda: first.meter.num_hops == 1)
        await hops[0].step(3, [tokens(5)], positions=[0])
        await hops[1].results(3, [5])
        assert (first.meter.num_replays, first.meter.num_replayed) == (1, 5)
        assert second.meter.num_replays == 1
        await hops[1].stream.close()
        await eventually(lambda: first.meter.links_down == {"UNREACHABLE": 1})


@pytest.mark.asyncio(loop_scope="module")
async def test_load_comes_from_running_sessions_and_waiting_steps(nodes: list[Node]):
    """It rises with each session that runs, is full while somebody waits for pages, and falls at the end."""
    async with chain_of(nodes, 1) as chain:
        [handler] = chain.handlers
        assert handler.load == 0.0
        hops = [await chain.open(0, is_last=True) for _ in range(4)]
        await asyncio.gather(*(hop.step(0, [tokens(4)], positions=[0]) for hop in hops))
        for hop in hops:
            await hop.results(0, [4])
        assert 4 / 32 <= handler.load < 1.0 and handler.tokens_per_s > 0
        chain.executors[0].num_waiting = 1
        assert handler.load == 1.0
        chain.executors[0].num_waiting = 0
        for hop in hops:
            await hop.stream.close()
        await eventually(lambda: handler.num_sessions == 0)
