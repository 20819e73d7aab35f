"""Sessions through real servers on a real DHT: right results, right refusals, nothing left behind."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.runtime import connect
from swarm.codec import encode_tensor
from swarm.errors import (
    CheckpointMismatch,
    InvalidRequest,
    PeerBusy,
    PeerMisbehaved,
    PeerUnreachable,
    RouteNotFound,
    SwarmError,
)
from swarm.protocol import INFO_SERVICE, SESSION_SERVICE, Info, InfoRequest, OpenSession, SessionOpened, Step
from swarm.registry import Registry, peer_tag
from swarm.server import loading as loading_module
from swarm.server.config import ServerConfig
from swarm.server.loading import LoadingStopped
from swarm.server.plan import make_plan
from swarm.server.server import Server
from swarm.types import ServerState

from .conftest import HIDDEN, NUM_BLOCKS, LocalSwarm, closing, save_tiny_llama


def embed(model, tokens: list[int]) -> torch.Tensor:
    return model.model.embed_tokens(torch.tensor(tokens)).detach()


def logits(model, hidden_states: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden_states)).detach()


def expected_logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def service(swarm: LocalSwarm):
    with closing(swarm.connect()) as service:
        yield service


def test_a_chain_of_servers_computes_what_transformers_computes(swarm, service, local_model):
    """A ragged batch of two rows, prompt then decode, equals the full model's logits, and frees its pages."""
    rows = [[5, 9, 44, 12, 7], [3, 8, 1]]
    with service.open_session(batch_size=2, max_length=16) as session:
        prompt = torch.cat([embed(local_model, row) for row in rows])
        outputs = session.step(prompt, positions=[0, 0], num_tokens=[5, 3])
        for row, piece in zip(rows, outputs.split([5, 3]), strict=True):
            torch.testing.assert_close(logits(local_model, piece), expected_logits(local_model, row), atol=1e-4, rtol=0)
        rows = [[*rows[0], 17], [*rows[1], 90]]
        outputs = session.step(embed(local_model, [17, 90]), positions=[5, 3], num_tokens=[1, 1])
        for row, piece in zip(rows, outputs, strict=True):
            expected = expected_logits(local_model, row)[-1]
            torch.testing.assert_close(logits(local_model, piece), expected, atol=1e-4, rtol=0)
        assert [block for hop in session.route for block in hop.blocks] == list(range(NUM_BLOCKS))
        assert swarm.pages_in_use() > 0
    wait_for_free_pages(swarm)


def wait_for_free_pages(swarm: LocalSwarm) -> None:
    """Closing travels to the servers; give it its time, but no more than 2 s."""
    deadline = threading.Event()
    threading.Timer(2.0, deadline.set).start()
    while swarm.pages_in_use():
        assert not deadline.is_set(), "pages are still in use 2 s after the session's end"


def test_beams_and_rollback_reach_the_servers(service, local_model):
    """Reordered and shortened rows continue as what they became."""
    with service.open_session(batch_size=2, max_length=16) as session:
        session.step(embed(local_model, [5, 9, 4, 3, 8, 1]), positions=[0, 0], num_tokens=[3, 3])
        outputs = session.step(embed(local_model, [7, 6]), positions=[3, 2], num_tokens=[1, 1], order=[1, 1])
    for piece, tokens in zip(outputs, ([3, 8, 1, 7], [3, 8, 6]), strict=True):
        expected = expected_logits(local_model, tokens)[-1]
        torch.testing.assert_close(logits(local_model, piece), expected, atol=1e-4, rtol=0)


def test_sessions_of_many_clients_run_at_once_and_each_gets_its_own(swarm, service, local_model):
    """24 sessions in parallel threads: every one gets its own logits, and nothing stays allocated."""

    def one(seed: int) -> None:
        tokens = torch.randint(1, 120, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        with service.open_session(batch_size=1, max_length=8) as session:
            session.step(embed(local_model, tokens[:4]), positions=[0], num_tokens=[4])
            for position in (4, 5):
                last = session.step(
                    embed(local_model, tokens[position : position + 1]), positions=[position], num_tokens=[1]
                )
        expected = expected_logits(local_model, tokens)[-1:]
        torch.testing.assert_close(logits(local_model, last), expected, atol=1e-4, rtol=0)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(24)))
    wait_for_free_pages(swarm)


def test_a_lost_server_is_replaced_and_only_its_span_replayed(make_swarm, local_model):
    """A server that vanishes in mid-session costs a replay, not a wrong token."""
    swarm = make_swarm("0:3", "3:6", "3:6")
    tokens = [5, 9, 44, 12, 7, 61]
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=16) as session:
        session.step(embed(local_model, tokens[:5]), positions=[0], num_tokens=[5])
        lost = next(server for server in swarm.servers if server.node.peer_id == session.route[1].peer_id)
        swarm.remove_server(lost, politely=False)
        last = session.step(embed(local_model, tokens[5:]), positions=[5], num_tokens=[1])
        assert session.num_replays == 1
        assert session.route[1].peer_id != lost.node.peer_id
    torch.testing.assert_close(logits(local_model, last), expected_logits(local_model, tokens)[-1:], atol=1e-4, rtol=0)


def test_missing_blocks_are_named(make_swarm, local_model):
    """Nobody serves 4:6: the error says so, soon."""
    swarm = make_swarm("0:4")
    with (
        closing(swarm.connect(max_wait_s=1.0)) as service,
        service.open_session(batch_size=1, max_length=8) as session,
        pytest.raises(RouteNotFound, match="4:6") as caught,
    ):
        session.step(embed(local_model, [1, 2]), positions=[0], num_tokens=[2])
    assert caught.value.missing == (4, 5)


def test_a_server_that_left_is_not_routed_to(make_swarm):
    """A polite goodbye removes the server from the table at once."""
    swarm = make_swarm("0:6", "0:6")
    with closing(swarm.connect()) as service:
        swarm.loop.run(swarm.servers[0].leave())
        service._loop.run(service.peers.refresh(max_age_s=0, everything=True))
        assert [record.peer_id for record in service.peers.records] == [swarm.servers[1].node.peer_id]


def test_a_server_announces_joining_then_online_then_offline(make_swarm):
    """What others read of a server follows its life, and only ONLINE counts for routes."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)
    states = []
    with closing(swarm.connect()) as service:
        for step in (None, server.load, server.leave):
            if step is not None:
                swarm.loop.run(step(), 30)
            records = service._loop.run(Registry(service._node).lookup(resolve(str(swarm.model)).digest))
            states.append([(record.state.name, str(record.blocks)) for record in records])
            service._loop.run(service.peers.refresh(max_age_s=0, everything=True))
            assert len(service.peers.records) == (step == server.load)
    assert states == [[("JOINING", "0:6")], [("ONLINE", "0:6")], []]


def test_a_server_told_to_stop_while_it_fetches_adapters_never_says_online(make_swarm, monkeypatch):
    """They may take minutes; what is announced last is OFFLINE."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm, adapters=("mine",)), 30)
    swarm.servers.append(server)
    monkeypatch.setattr(loading_module, "load_adapter", lambda *args, **options: swarm.loop.run(server.leave(), 30))
    with pytest.raises(LoadingStopped):
        swarm.loop.run(server.load(), 30)
    assert server.state is ServerState.OFFLINE


def test_servers_tell_where_they_are_and_how_far_from_each_other(make_swarm):
    """After two rounds everybody has a place, and the ways are known from both sides."""
    swarm = make_swarm("0:3", "3:6")
    ids = [server.node.peer_id for server in swarm.servers]
    for _ in range(2):
        for server in swarm.servers:
            swarm.loop.run(server.renew(), 30)
    with closing(swarm.connect()) as service:
        service._loop.run(service.peers.get_acquainted())
        records = {record.peer_id: record for record in service.peers.records}
        for own, other in (ids, reversed(ids)):
            assert records[own].place.error < 1.0
            assert [ping.tag for ping in records[own].pings] == [peer_tag(other)]
            assert 0.0 < records[own].pings[0].rtt_s < 5.0
        assert service.peers._table.place is not None
        assert all(service.peers._pinger.rtt_s(peer_id) is not None for peer_id in ids)


def test_a_server_told_to_stop_while_it_loads_never_says_online(make_swarm, monkeypatch):
    """The stop may come after the last block: what is announced last is OFFLINE."""
    swarm = make_swarm()
    server = swarm.loop.run(join_only(swarm), 30)
    swarm.servers.append(server)

    async def told_to_stop(span) -> None:
        await server.leave()

    monkeypatch.setattr(server._facts, "of_span", told_to_stop)
    with pytest.raises(LoadingStopped):
        swarm.loop.run(server.load(), 30)
    assert server.serving is None and server.state is ServerState.OFFLINE


async def join_only(swarm: LocalSwarm, **settings) -> Server:
    """A server that has not begun to load."""
    config = ServerConfig(
        model=str(swarm.model), initial_peers=(swarm.address,), host="127.0.0.1", device="cpu", **settings
    )
    server = Server(config, await asyncio.to_thread(make_plan, config))
    await server.join()
    return server


def test_another_checkpoint_of_the_same_name_is_refused(make_swarm, tmp_path):
    """Same directory name, other weights: server and client both say that the content differs."""
    swarm = make_swarm("0:6")
    other = save_tiny_llama(tmp_path / "tiny-llama", seed=1)
    swarm.model = other
    with pytest.raises(CheckpointMismatch, match="other content"):
        swarm.add_server("0:6")
    with (
        closing(swarm.connect(max_wait_s=1.0)) as service,
        service.open_session(batch_size=1, max_length=8) as session,
        pytest.raises(CheckpointMismatch, match="other content"),
    ):
        session.step(torch.zeros(1, HIDDEN), positions=[0], num_tokens=[1])


def test_no_initial_peer_answers(tiny_llama):
    """A swarm that can't be reached is one typed error."""
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWA1bysvV5nRqkEcKQPY1Z2oW7RjvqCJ4wJ4m6Xb6Yt4bA"
    with pytest.raises(SwarmError):
        connect(resolve(str(tiny_llama)), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN, initial_peers=[address])


# -- hostile clients, message by message ------------------------------------------------------------------------


def open_message(swarm: LocalSwarm, **changes) -> OpenSession:
    fields = {
        "session_id": bytes(16),
        "model": resolve(str(swarm.model)).digest,
        "start": 0,
        "end": 3,
        "batch_size": 1,
        "max_length": 16,
        "is_last": True,
    }
    return OpenSession(**{**fields, "push_key": os.urandom(16), **changes})


def step_message(num_tokens: int = 2, hidden: int = HIDDEN, **changes) -> tuple[Step, memoryview]:
    spec, body = encode_tensor(torch.zeros(num_tokens, hidden))
    counts = (num_tokens,)
    fields = {
        "step_id": 1,
        "order": None,
        "base": (0,),
        "positions": (0,),
        "num_tokens": counts,
        "outputs_from": (0,),
    }
    return Step(**{**fields, "hidden_states": spec, **changes}), body


async def converse(service, peer_id: str, *messages) -> list:
    """Send the messages one by one on a session stream and collect the answers."""
    stream = await service._transport.open(peer_id, SESSION_SERVICE, timeout_s=5)
    answers = []
    try:
        for message, body in messages:
            await stream.send(message, body)
            answers.append((await stream.receive(timeout_s=10))[0])
    finally:
        await stream.close()
    return answers


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "0" * 64}, CheckpointMismatch, "not 000000000000"),
        ({"end": 6}, PeerBusy, "runs blocks 0:3, not 0:6"),
        ({"start": 2, "end": 2}, InvalidRequest, "2:2 is empty"),
        ({"max_length": 1 << 20}, InvalidRequest, "512 positions"),
        ({"batch_size": 1024, "max_length": 512}, PeerBusy, "1024 rows need at least 1024 pages"),
    ],
)
def test_sessions_that_cannot_be_served_are_refused(swarm, service, changes, error, words):
    """Wrong content, blocks and lengths get their own error, and the server lives on."""
    server = swarm.servers[0]
    with pytest.raises(error, match=words):
        service._loop.run(converse(service, server.node.peer_id, (open_message(swarm, **changes), b"")))
    assert still_serves(swarm, service, server)


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (step_message(hidden=32), InvalidRequest, "shape"),
        (step_message(positions=(3,)), InvalidRequest, "holds 0 tokens, cannot continue at position 3"),
        (step_message(num_tokens=20), InvalidRequest, "session limit 16"),
        (step_message(positions=(0, 0)), InvalidRequest, "has 1 rows"),
        (step_message(order=(4,)), InvalidRequest, "row 4 of 1"),
        ((step_message()[0], b"\x00" * 12), PeerMisbehaved, "12 bytes"),
        ((InfoRequest(), b""), InvalidRequest, "expected Step"),
    ],
)
def test_steps_that_do_not_fit_are_refused(swarm, service, step, error, words):
    """Wrong shapes, positions, rows and sizes get a typed answer, and the server lives on without a page less."""
    server = swarm.servers[0]
    with pytest.raises(error, match=words):
        service._loop.run(converse(service, server.node.peer_id, (open_message(swarm), b""), step))
    assert still_serves(swarm, service, server)
    wait_for_free_pages(swarm)


def still_serves(swarm: LocalSwarm, service, server) -> bool:
    """Whether a well-behaved session works on this server."""
    opened, result = service._loop.run(
        converse(service, server.node.peer_id, (open_message(swarm), b""), step_message())
    )
    return isinstance(opened, SessionOpened) and result.hidden_states.shape == (2, HIDDEN)


def test_info_describes_the_server(swarm, service):
    """Anyone may ask what a server is."""
    server = swarm.servers[2]
    call = service._transport.call(server.node.peer_id, INFO_SERVICE, InfoRequest(), timeout_s=5)
    info = service._loop.run(call)
    assert isinstance(info, Info)
    assert (info.start, info.end, info.dtype, info.kv_total_tokens) == (1, 5, "float32", 2048)


def test_an_unknown_peer_is_unreachable(service):
    """Opening a session with a peer that does not exist fails with its own error, in time."""
    stranger = "12D3KooWA1bysvV5nRqkEcKQPY1Z2oW7RjvqCJ4wJ4m6Xb6Yt4bA"
    with pytest.raises((PeerUnreachable, SwarmError)):
        service._loop.run(service._transport.open(stranger, SESSION_SERVICE, timeout_s=3), 10)
