"""The session driver's policy: whom it blames, whom it replaces, and when it gives up."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from swarm.client.session import RemoteSession, SessionConfig
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerDisconnected, PeerError, PeerTimeout, RouteNotFound
from swarm.protocol import OpenSession, SessionOpened, Step, StepResult
from swarm.session import Hop
from swarm.transport import EndOfStream
from swarm.types import BlockRange

HIDDEN = 4


class FakePeers:
    """Knows servers by name, in order of preference; those that failed go to the end."""

    model, model_name, num_blocks = "0" * 64, "fake", 4

    def __init__(self, *names: str):
        self.names = list(names)
        self.failures: list[str] = []
        self.overheads: list[str] = []

    async def route(self, blocks: BlockRange) -> tuple[Hop, ...]:
        if not self.names:
            raise RouteNotFound("no server", missing=list(blocks))
        return (Hop(peer_id=self.names[0], blocks=blocks),)

    def failed(self, peer_id: str, error: Exception) -> None:
        self.failures.append(peer_id)
        self.names.remove(peer_id)
        self.names.append(peer_id)

    def measured(self, peer_id: str, overhead_s: float) -> None:
        self.overheads.append(peer_id)


class FakeStream:
    """A server that adds 1 to every hidden state and knows how many tokens it holds."""

    def __init__(self, answer: Callable):
        self.answer, self.replies, self.held, self.is_closed = answer, asyncio.Queue(), [], False
        self.is_stalled = asyncio.Event()

    async def send(self, message, body=b"", *, timeout_s=None):
        if isinstance(message, OpenSession):
            self.held = [0] * message.batch_size
        self.replies.put_nowait(self.answer(self, message, body))

    async def receive(self, timeout_s=None):
        reply = await self.replies.get()
        if isinstance(reply, Exception):
            raise reply
        if reply is None:
            self.is_stalled.set()
            await asyncio.Event().wait()
        return reply

    async def close(self):
        self.is_closed = True


def honest(stream: FakeStream, message, body):
    if isinstance(message, OpenSession):
        return SessionOpened(max_step_tokens=100, can_rollback=True), b""
    assert isinstance(message, Step)
    assert list(message.positions) == stream.held
    stream.held = [sum(pair) for pair in zip(message.positions, message.num_tokens, strict=True)]
    pieces = (decode_tensor(message.hidden_states, body) + 1).split(list(message.num_tokens))
    wanted = [piece[len(piece) - count :] for piece, count in zip(pieces, message.num_outputs, strict=True)]
    spec, payload = encode_tensor(torch.cat(wanted))
    return StepResult(step_id=message.step_id, hidden_states=spec, queue_us=0, compute_us=10, batch_tokens=1), payload


def at_open(error: Exception) -> Callable:
    return lambda stream, message, body: error if isinstance(message, OpenSession) else honest(stream, message, body)


def at_step(reply) -> Callable:
    return lambda stream, message, body: reply if isinstance(message, Step) else honest(stream, message, body)


class FakeTransport:
    def __init__(self, **answers: Callable):
        self.answers, self.streams, self.opened = answers, [], asyncio.Queue()

    async def open(self, peer_id, service, *, timeout_s):
        self.streams.append((peer_id, FakeStream(self.answers[peer_id])))
        self.opened.put_nowait(self.streams[-1][1])
        return self.streams[-1][1]


def make(peers: FakePeers, transport: FakeTransport, **config) -> RemoteSession:
    settings = SessionConfig(**{"max_wait_s": 0.3, **config})
    return RemoteSession(peers, transport, batch_size=1, max_length=50, config=settings)


async def step(session: RemoteSession, num_tokens: int, position: int = 0) -> torch.Tensor:
    return await session.step(torch.zeros(num_tokens, HIDDEN), positions=[position], num_tokens=[num_tokens])


async def test_a_server_that_fails_a_step_is_replaced_and_given_the_history():
    """The replacement gets every token, the broken stream is closed, the caller sees only the outputs."""
    calls = iter([honest, honest, lambda *_: PeerDisconnected("gone", peer_id="a")])
    transport = FakeTransport(a=lambda *args: next(calls)(*args), b=honest)
    peers = FakePeers("a", "b")
    session = make(peers, transport)
    await step(session, 3)
    outputs = await step(session, 1, position=3)
    assert torch.equal(outputs, torch.ones(1, HIDDEN))
    assert peers.failures == ["a"] and session.machine.num_replays == 1
    assert [(name, stream.is_closed) for name, stream in transport.streams] == [("a", True), ("b", False)]
    assert transport.streams[1][1].held == [4]
    await session.close()
    assert transport.streams[1][1].is_closed


async def test_a_refusal_of_the_step_itself_is_not_retried():
    """InvalidRequest for a step is our own fault: it is raised at once, and no other server is asked."""
    peers, transport = FakePeers("a", "b"), FakeTransport(a=at_step(InvalidRequest("bad")), b=honest)
    with pytest.raises(InvalidRequest, match="bad"):
        await step(make(peers, transport), 1)
    assert peers.failures == [] and len(transport.streams) == 1


async def test_a_refusal_to_open_leads_to_another_server():
    """A server that moved on refuses what its old record promised; the next one is asked."""
    peers, transport = FakePeers("a", "b"), FakeTransport(a=at_open(InvalidRequest("runs 0:2")), b=honest)
    await step(make(peers, transport), 1)
    assert peers.failures == ["a"]


async def test_when_everybody_refuses_to_open_the_reason_is_raised():
    """Not an endless search: the refusal itself, after a few attempts."""
    peers, transport = FakePeers("a"), FakeTransport(a=at_open(CheckpointMismatch("other")))
    with pytest.raises(CheckpointMismatch, match="other"):
        await step(make(peers, transport, max_wait_s=20), 1)
    assert len(transport.streams) == 4


def wrong_shape(stream: FakeStream, message, body):
    spec, payload = encode_tensor(torch.zeros(1, HIDDEN + 1))
    return StepResult(step_id=message.step_id, hidden_states=spec, queue_us=0, compute_us=0, batch_tokens=1), payload


def wrong_step(stream: FakeStream, message, body):
    result, payload = honest(stream, message, body)
    return StepResult(step_id=7, hidden_states=result.hidden_states, queue_us=0, compute_us=0, batch_tokens=1), payload


@pytest.mark.parametrize(
    "misbehave",
    [
        wrong_shape,
        wrong_step,
        lambda *_: (SessionOpened(max_step_tokens=1, can_rollback=True), b""),
        lambda *_: EndOfStream(),
    ],
)
async def test_a_malformed_answer_blames_the_server(misbehave):
    """Outputs of a wrong shape, of another step, another message or the end: the server is replaced."""

    def liar(stream, message, body):
        return misbehave(stream, message, body) if isinstance(message, Step) else honest(stream, message, body)

    peers, transport = FakePeers("a", "b"), FakeTransport(a=liar, b=honest)
    assert torch.equal(await step(make(peers, transport), 2), torch.ones(2, HIDDEN))
    assert peers.failures == ["a"]


async def test_patience_ends_with_the_last_error():
    """When every server keeps failing, the caller gets the reason after max_wait_s, not never."""
    peers, transport = FakePeers("a"), FakeTransport(a=at_step(PeerDisconnected("gone", peer_id="a")))
    async with asyncio.timeout(5):
        with pytest.raises(PeerError, match="gone"):
            await step(make(peers, transport), 1)


async def test_missing_blocks_are_waited_for():
    """A server that appears in time is used."""
    peers, transport = FakePeers(), FakeTransport(a=honest)
    session = make(peers, transport, max_wait_s=10)
    running = asyncio.create_task(step(session, 1))
    await asyncio.sleep(0)
    peers.names.append("a")
    assert torch.equal(await running, torch.ones(1, HIDDEN))


async def test_a_cancelled_step_leaves_a_session_that_can_go_on():
    """After a cancellation the uncertain stream is closed, and the same step on a new one gives the right outputs."""
    answers = iter([honest, honest, lambda *_: None, honest, honest])
    transport = FakeTransport(a=lambda *args: next(answers)(*args))
    session = make(FakePeers("a"), transport)
    await step(session, 2)
    running = asyncio.create_task(step(session, 1, position=2))
    await transport.streams[0][1].is_stalled.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert transport.streams[0][1].is_closed
    assert torch.equal(await step(session, 1, position=2), torch.ones(1, HIDDEN))
    assert transport.streams[1][1].held == [3]


async def test_a_cancelled_opening_is_not_mistaken_for_an_open_session():
    """After Ctrl-C while a session opens, the next step opens it anew."""
    answers = iter([lambda *_: None, honest, honest])
    transport = FakeTransport(a=lambda *args: next(answers)(*args))
    peers = FakePeers("a")
    session = make(peers, transport)
    running = asyncio.create_task(step(session, 1))
    stream = await transport.opened.get()
    await stream.is_stalled.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stream.is_closed
    assert torch.equal(await step(session, 1), torch.ones(1, HIDDEN))
    assert peers.failures == []


async def test_a_dht_that_does_not_answer_is_waited_for():
    """A lookup that fails once costs a pause, not the session."""

    class SlowPeers(FakePeers):
        num_failures = 1

        async def route(self, blocks):
            if self.num_failures:
                self.num_failures -= 1
                raise PeerTimeout("DHT search did not end")
            return await super().route(blocks)

    transport = FakeTransport(a=honest)
    assert torch.equal(await step(make(SlowPeers("a"), transport, max_wait_s=10), 1), torch.ones(1, HIDDEN))
