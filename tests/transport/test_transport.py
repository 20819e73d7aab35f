"""Streams between real nodes on both carriers: messages, errors, pressure, limits, and peers that die or stop."""

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from swarm.errors import (
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolMismatch,
    SwarmError,
)
from swarm.network import Node, NodeConfig
from swarm.pings import Pinger
from swarm.protocol import PROTOCOL_VERSION, Info, InfoRequest
from swarm.transport import EndOfStream, Limits, Stream, Transport
from swarm.transport import ways as ways_module
from swarm.transport.direct import Offer
from swarm.transport.frames import Kind, encode_frame
from swarm.transport.offers import ask_offer
from tests.swarm.test_directory import record

CARRIERS = ("direct", "p2p")
INFO = Info(
    model="ab" * 32,
    model_name="tiny",
    start=0,
    end=2,
    state=2,
    version="1",
    dtype="float32",
    quantization="none",
    num_sessions=0,
    kv_free_tokens=0,
    kv_total_tokens=0,
)


@dataclass
class Pair:
    """Two nodes that know each other, with a transport each; the server also listens directly."""

    server: Transport
    client: Transport

    async def open(self, service: str, carrier: str = "auto") -> Stream:
        """A stream from client to server."""
        return await self.client.open(self.server.node.peer_id, service, timeout_s=10, carrier=carrier)  # type: ignore[arg-type]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[tuple[Node, Node]]:
    """Two connected nodes, shared by the tests of this module."""
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as server,
        await Node.start(NodeConfig(client_mode=True, initial_peers=server.addresses)) as client,
    ):
        yield server, client


pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def connected(
    nodes: tuple[Node, Node],
    *,
    server: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    **services: Callable[[Stream], Awaitable[None]],
) -> AsyncIterator[Pair]:
    """Transports on the shared nodes, serving `services`."""
    serving = Transport(nodes[0], **{"listen": ("127.0.0.1", 0), **(server or {})})
    for name, handler in {"echo": echo, **services}.items():
        serving.serve(name, handler)
    async with serving, Transport(nodes[1], **(client or {})) as dialling:
        yield Pair(serving, dialling)


async def send_many(stream: Stream, num_messages: int, timeout_s: float) -> None:
    """Send 100 kB at a time."""
    for _ in range(num_messages):
        await stream.send(INFO, bytes(100_000), timeout_s=timeout_s)


async def ask(pair: "Pair", carrier: str) -> None:
    """One message to the echo service and back."""
    stream = await pair.open("echo", carrier)
    await stream.send(INFO)
    assert (await stream.receive(5))[0] == INFO


async def echo(stream: Stream) -> None:
    """Send every message back, until the peer finishes."""
    while True:
        message, body = await stream.receive()
        await stream.send(message, body)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_messages_and_bodies_come_back_unchanged(nodes: tuple[Node, Node], carrier: str):
    """Empty, small and cut bodies pass in order, and the stream ends when both sides have finished."""
    async with connected(nodes) as pair:
        stream = await pair.open("echo", carrier)
        assert stream.carrier == carrier and stream.peer_id == nodes[0].peer_id
        for size in (0, 1, 2304, 262144, 262145, 3 << 20):
            body = os.urandom(size)
            await stream.send(INFO, memoryview(body))
            message, answer = await stream.receive(10)
            assert message == INFO and answer == body and not answer.readonly
        await stream.close()
        with pytest.raises(EndOfStream):
            await stream.receive(1)
        assert stream.is_over
        with pytest.raises(InvalidRequest, match="closed"):
            await stream.send(INFO)
        with pytest.raises(InvalidRequest, match="closed"):
            stream.send_now(INFO)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_one_connection_carries_many_streams(nodes: tuple[Node, Node], carrier: str):
    """A hundred streams at a time, each with its own messages, on one connection."""
    async with connected(nodes) as pair:

        async def talk(index: int) -> None:
            stream = await pair.open("echo", carrier)
            for turn in range(5):
                body = f"{index} {turn}".encode() * (1 + 100 * (index % 7))
                await stream.send(InfoRequest(), body)
                assert (await stream.receive(10))[1] == body
            await stream.close()

        async with asyncio.TaskGroup() as group:
            for index in range(100):
                group.create_task(talk(index))
        assert pair.client.num_connections == pair.server.num_connections == 1


async def test_a_server_opens_streams_on_the_connection_of_its_client(nodes: tuple[Node, Node]):
    """A peer behind a NAT is reached over the connection that it made itself."""
    async with connected(nodes) as pair:
        pair.client.serve("echo", echo)
        await ask(pair, "direct")
        stream = await pair.server.open(nodes[1].peer_id, "echo", timeout_s=5)
        await stream.send(INFO)
        assert (await stream.receive(5))[0] == INFO
        assert stream.carrier == "direct" and pair.server.num_connections == 1


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("position 7, expected 5"),
        PeerBusy("no room", retry_after_s=2.5),
        PeerUnreachable("next hop is gone"),
        ProtocolMismatch("too old"),
    ],
)
async def test_a_handlers_error_reaches_the_caller_as_itself(nodes: tuple[Node, Node], error: SwarmError, carrier: str):
    """What came before is received first, then the same type with the same text, each time that the stream is used."""

    async def refuse(stream: Stream) -> None:
        message, _ = await stream.receive()
        await stream.send(message)
        raise error

    async with connected(nodes, refuse=refuse) as pair:
        stream = await pair.open("refuse", carrier)
        await stream.send(INFO)
        assert (await stream.receive(5))[0] == INFO
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)) as caught:
                await stream.receive(5)
        if isinstance(caught.value, PeerBusy):
            assert caught.value.retry_after_s == 2.5
        if isinstance(caught.value, PeerError):
            assert caught.value.peer_id == nodes[0].peer_id
        assert pair.client.num_connections == 1


async def test_a_crash_in_a_handler_says_only_that(nodes: tuple[Node, Node], caplog: pytest.LogCaptureFixture):
    """The traceback is logged where it happened; the peer learns no detail, and other streams live on."""

    async def crash(stream: Stream) -> None:
        raise KeyError("secret")

    async with connected(nodes, crash=crash) as pair:
        other = await pair.open("echo")
        stream = await pair.open("crash")
        with pytest.raises(PeerError, match="internal error"):
            await stream.receive(5)
        assert "secret" in caplog.text
        await other.send(INFO)
        assert (await other.receive(5))[0] == INFO


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_the_tail_of_a_stream_is_never_lost(nodes: tuple[Node, Node], carrier: str):
    """A handler that answers and ends at once, with input unread, is heard to its end, each of fifty times."""

    async def answer(stream: Stream) -> None:
        await stream.receive()
        for index in range(8):
            await stream.send(INFO, bytes([index]) * 60000)

    async with connected(nodes, answer=answer) as pair:
        for _ in range(50):
            stream = await pair.open("answer", carrier)
            await stream.send(INFO)
            await stream.send(INFO, b"never read")
            assert [(await stream.receive(10))[1][0] for _ in range(8)] == list(range(8))
            with pytest.raises(EndOfStream):
                await stream.receive(10)
            await stream.close()


async def test_an_unknown_service_is_an_invalid_request(nodes: tuple[Node, Node]):
    """The refusal names the service; the connection stays."""
    async with connected(nodes) as pair:
        with pytest.raises(InvalidRequest, match="does not serve 'nothing'"):
            await pair.client.call(nodes[0].peer_id, "nothing", INFO, timeout_s=5)
        assert await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5) == INFO


async def test_a_call_that_gets_no_answer_ends_at_its_deadline(nodes: tuple[Node, Node]):
    """Silence is a PeerTimeout, an end without an answer is misbehaviour."""

    async def sleep(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def leave(stream: Stream) -> None:
        return

    async with connected(nodes, sleep=sleep, leave=leave) as pair:
        with pytest.raises(PeerTimeout, match=r"within 0\.2 s"):
            await pair.client.call(nodes[0].peer_id, "sleep", INFO, timeout_s=0.2)
        with pytest.raises(PeerMisbehaved, match="without an answer"):
            await pair.client.call(nodes[0].peer_id, "leave", INFO, timeout_s=5)


async def test_receive_can_time_out_and_go_on(nodes: tuple[Node, Node]):
    """A timeout does not harm the stream; a second receiver at the same time is refused."""
    async with connected(nodes) as pair:
        stream = await pair.open("echo")
        with pytest.raises(PeerTimeout):
            await stream.receive(0.05)
        waiting = asyncio.ensure_future(stream.receive(5))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="another task"):
            await stream.receive(5)
        await stream.send(INFO)
        assert (await waiting)[0] == INFO


async def test_a_malformed_message_is_misbehaviour(nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch):
    """Bytes that are no message end the stream on both sides with PeerMisbehaved, and nothing else."""
    seen: list[BaseException] = []

    async def watch(stream: Stream) -> None:
        try:
            await stream.receive()
        except PeerMisbehaved as error:
            seen.append(error)
            raise

    async with connected(nodes, watch=watch) as pair:
        stream = await pair.open("watch")
        monkeypatch.setattr("swarm.transport.stream.encode", lambda message: b"\xc1 nonsense")
        await stream.send(INFO)
        with pytest.raises(PeerMisbehaved, match="malformed message"):
            await stream.receive(5)
        assert isinstance(seen[0], PeerMisbehaved) and seen[0].peer_id == nodes[1].peer_id
        monkeypatch.undo()
        assert await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5) == INFO


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_slow_reader_holds_the_sender_back(nodes: tuple[Node, Node], carrier: str):
    """A sender stops within the window, other streams go on, and it continues when the reader does."""
    gate, sent = asyncio.Event(), 0

    async def slow(stream: Stream) -> None:
        await gate.wait()
        while True:
            await stream.receive()

    async with connected(nodes, slow=slow) as pair:
        stream, other = await pair.open("slow", carrier), await pair.open("echo", carrier)

        async def flood() -> None:
            nonlocal sent
            for _ in range(200):
                await stream.send(INFO, bytes(100_000))
                sent += 1

        flooding = asyncio.ensure_future(flood())
        for _ in range(20):
            await other.send(INFO)
            await other.receive(5)
        await asyncio.sleep(0.2)
        assert sent * 100_000 <= pair.client.limits.window_bytes + 100_000
        assert not stream.send_now(INFO) and other.send_now(INFO) and not stream.is_over
        await other.receive(5)
        impatient = await pair.open("slow", carrier)
        with pytest.raises(PeerTimeout, match="made no room"):
            await send_many(impatient, 200, timeout_s=0.1)
        gate.set()
        async with asyncio.timeout(10):
            await flooding
        await stream.close()


async def test_a_large_message_does_not_block_small_ones(nodes: tuple[Node, Node]):
    """A message is cut in pieces, and those of other streams pass between them."""
    async with connected(nodes) as pair:
        bulk, small = await pair.open("echo", "direct"), await pair.open("echo", "direct")
        sending = asyncio.ensure_future(bulk.send(INFO, bytes(48 << 20)))
        await asyncio.sleep(0)
        await small.send(INFO)
        await small.receive(5)
        assert not sending.done()
        assert len((await bulk.receive(20))[1]) == 48 << 20
        await sending


async def test_a_message_above_the_limit_is_refused_here(nodes: tuple[Node, Node]):
    """An oversized message is our own mistake, found before a byte is sent; the stream is still good."""
    async with connected(nodes, client={"limits": Limits(max_message_bytes=1000)}) as pair:
        stream = await pair.open("echo")
        with pytest.raises(InvalidRequest, match="1001 bytes"):
            await stream.send(INFO, bytes(1001))
        with pytest.raises(InvalidRequest, match="300000 bytes"):
            await stream.send(INFO, bytes(300000))
        await stream.send(INFO, b"fits")
        assert (await stream.receive(5))[1] == b"fits"


async def test_streams_are_limited_per_peer(nodes: tuple[Node, Node]):
    """One too many is refused as busy; closing one makes room."""
    async with connected(nodes, server={"limits": Limits(max_streams_per_peer=3)}) as pair:
        streams = [await pair.open("echo") for _ in range(4)]
        for stream in streams:
            await stream.send(INFO)
        for stream in streams[:3]:
            await stream.receive(5)
        with pytest.raises(PeerBusy, match="3 streams are open, limit 3"):
            await streams[3].receive(5)
        await streams[0].close()
        async with asyncio.timeout(5):
            while not await is_accepted(pair):
                pass


async def is_accepted(pair: Pair) -> bool:
    """Whether a call is answered, and not refused as one too many."""
    try:
        return await pair.client.call(pair.server.node.peer_id, "echo", INFO, timeout_s=5) == INFO
    except PeerBusy:
        return False


async def test_connections_are_limited(nodes: tuple[Node, Node]):
    """Above the limits of connections, per peer and of all, a peer is told that there is no room."""
    for limits in (Limits(max_connections_per_peer=1), Limits(max_connections=1)):
        async with connected(nodes, server={"limits": limits}) as pair:
            await pair.open("echo", "p2p")
            with pytest.raises((PeerBusy, PeerUnreachable)):
                await ask(pair, "direct")


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_versions_that_differ_are_found_out_on_both_ends(
    nodes: tuple[Node, Node], carrier: str, caplog: pytest.LogCaptureFixture
):
    """The caller gets ProtocolMismatch with both numbers, and the other side logs it."""
    caplog.set_level("INFO")
    async with connected(nodes, client={"version": 9}) as pair:
        with pytest.raises(ProtocolMismatch, match=f"version {PROTOCOL_VERSION}, we speak 9"):
            await pair.open("echo", carrier)
        async with asyncio.timeout(20):  # it may read our greeting after we have read its own
            while f"version 9, we speak {PROTOCOL_VERSION}" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_auto_takes_the_direct_way_and_falls_back(nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch):
    """A peer that can't be reached directly is reached over p2p, and is not tried directly again at once."""
    async with connected(nodes) as pair:
        assert (await pair.open("echo")).carrier == "direct"
    async with connected(nodes, server={"listen": None}) as pair:
        with pytest.raises(PeerUnreachable, match="takes no direct connections"):
            await pair.open("echo", "direct")
        assert (await pair.open("echo")).carrier == "p2p"
    monkeypatch.setattr(ways_module, "DIRECT_TIMEOUT_S", 0.5)
    async with connected(nodes, server={"announce_hosts": ["127.0.0.3"]}) as pair:
        asked = []
        monkeypatch.setattr(
            ways_module, "ask_offer", lambda *args, **options: asked.append(args) or ask_offer(*args, **options)
        )
        for _ in range(3):
            stream = await pair.open("echo")
            await stream.send(INFO)
            assert (await stream.receive(5))[0] == INFO and stream.carrier == "p2p"
        assert len(asked) == 1


async def test_strangers_on_the_direct_port_are_dropped(nodes: tuple[Node, Node]):
    """Silence, garbage and HELLO without a ticket end the connection; the server lives on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    hello = encode_frame(Kind.HELLO, 0, b"swarm" + PROTOCOL_VERSION.to_bytes(2, "big"))
    async with connected(nodes, server={"limits": Limits(hello_timeout_s=0.5, ping_period_s=0.2)}) as pair:
        for data in (b"", hello[:9], os.urandom(100), hello, encode_frame(Kind.PING, 0, bytes(8))):
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.server.entrance.port, ssl=context)
            writer.write(data)
            async with asyncio.timeout(5):
                with suppress(ConnectionError):
                    assert (await reader.read()).startswith(hello)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await ask(pair, "direct")
        assert pair.server.num_connections == 1


async def test_a_p2p_connection_is_used_while_the_direct_way_is_tried(nodes: tuple[Node, Node]):
    """Nobody waits for an attempt when there is a connection; streams opened after it succeeds are direct."""
    async with connected(nodes) as pair:
        await ask(pair, "p2p")
        assert (await pair.open("echo")).carrier == "p2p"
        async with asyncio.timeout(5):
            while (await pair.open("echo")).carrier != "direct":  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_ticket_works_once_and_a_stranger_has_none(nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch):
    """A second connection with the same ticket is closed; the peer who was given it is who it proves."""
    async with connected(nodes) as pair:
        offer = await ask_offer(nodes[1], nodes[0].peer_id, version=PROTOCOL_VERSION, timeout_s=5)

        async def reuse(*_: object, **__: object) -> Offer:
            return offer

        monkeypatch.setattr(ways_module, "ask_offer", reuse)
        stream = await pair.open("echo", "direct")
        stream._connection.close(PeerDisconnected("test"))
        with pytest.raises(PeerMisbehaved, match="ticket that is unknown, used or expired"):
            await ask(pair, "direct")


async def test_closing_a_transport_ends_its_handlers_and_streams(nodes: tuple[Node, Node]):
    """The peer of a transport that closes learns it at once, and the handlers are cancelled."""
    ended = asyncio.Event()

    async def wait(stream: Stream) -> None:
        try:
            await stream.receive()
        finally:
            ended.set()

    async with connected(nodes, wait=wait) as pair:
        stream = await pair.open("wait")
        await pair.open("echo")
        await asyncio.sleep(0.05)
        await pair.server.close()
        assert ended.is_set()
        with pytest.raises(PeerDisconnected, match="shutting down"):
            await stream.receive(5)


async def test_a_peer_that_is_not_there_is_unreachable(nodes: tuple[Node, Node]):
    """Unknown peers, ourselves and peers without a transport give typed errors within the deadline."""
    async with connected(nodes) as pair:
        with pytest.raises((PeerUnreachable, PeerTimeout)):
            await pair.client.open("12D3KooWSTo9HLMm1hcZG7MTKnXAbRYwVnJZ5URUvXrBkyGbjPQX", "echo", timeout_s=1)
        with pytest.raises(InvalidRequest, match="itself"):
            await pair.client.open(nodes[1].peer_id, "echo", timeout_s=1)


async def test_a_connection_that_was_being_made_when_the_transport_closed_is_dropped(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
):
    """Nobody would close it later."""
    is_dialling, may_go_on, dial = asyncio.Event(), asyncio.Event(), ways_module.dial

    async def slow_dial(*args: Any, **options: Any) -> Any:
        is_dialling.set()
        await may_go_on.wait()
        return await dial(*args, **options)

    monkeypatch.setattr(ways_module, "dial", slow_dial)
    async with connected(nodes) as pair:
        opening = asyncio.create_task(pair.open("echo", "direct"))
        await is_dialling.wait()
        await pair.client.close()
        may_go_on.set()
        with pytest.raises(PeerDisconnected, match="is shutting down"):
            await opening
        assert pair.client.num_connections == 0


async def test_an_idle_connection_is_closed(nodes: tuple[Node, Node]):
    """A connection without streams does not stay, and the next stream makes another."""
    limits = Limits(ping_period_s=0.1, idle_timeout_s=0.2)
    async with connected(nodes, client={"limits": limits}) as pair:
        await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5)
        async with asyncio.timeout(5):
            while pair.client.num_connections or pair.server.num_connections:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5) == INFO


async def test_the_round_trip_is_measured(nodes: tuple[Node, Node]):
    """Heartbeats measure the round trip of a quiet connection."""
    async with connected(nodes, client={"limits": Limits(ping_period_s=0.1)}) as pair:
        await pair.open("echo")
        async with asyncio.timeout(5):
            while pair.client.rtt_s(nodes[0].peer_id) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert 0 < pair.client.rtt_s(nodes[0].peer_id) < 1


@asynccontextmanager
async def echo_process(node: Node) -> AsyncIterator[tuple[int, str]]:
    """Process id and peer id of a peer in a process of its own."""
    script = Path(__file__).with_name("echo_peer.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        node.addresses[0],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process.pid, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def receive_until_error(stream: Stream) -> BaseException:
    """Receive until it fails; how it failed."""
    while True:
        try:
            await stream.receive(30)
        except (SwarmError, EndOfStream) as error:
            return error


@pytest.mark.parametrize(
    ("number", "deadline_s", "kind"), [("SIGKILL", 1.0, PeerDisconnected), ("SIGSTOP", 5.0, PeerTimeout)]
)
async def test_a_peer_that_dies_or_stops_is_noticed(
    nodes: tuple[Node, Node], number: str, deadline_s: float, kind: type[PeerError]
):
    """In the middle of a stream, on both carriers: a killed peer within 1 s, a stopped one by heartbeat within 5 s."""
    async with echo_process(nodes[0]) as (pid, peer_id), AsyncExitStack() as stack:
        waiting = []
        for node, carrier in ((nodes[1], "direct"), (nodes[0], "p2p")):
            transport = await stack.enter_async_context(Transport(node))
            stream = await transport.open(peer_id, "flood", timeout_s=10, carrier=carrier)  # type: ignore[arg-type]
            for _ in range(3):
                await stream.receive(5)
            silent = await transport.open(peer_id, "echo", timeout_s=10, carrier=carrier)  # type: ignore[arg-type]
            waiting += [asyncio.ensure_future(receive_until_error(one)) for one in (stream, silent)]
        os.kill(pid, getattr(signal, number))
        done, pending = await asyncio.wait(waiting, timeout=deadline_s)
        assert not pending
        for task in done:
            error = task.result()
            assert isinstance(error, kind) and error.peer_id == peer_id


async def test_whoever_asks_a_killed_process_hears_at_once_that_it_is_gone(nodes: tuple[Node, Node]):
    """The connection is reset, and a new one refused: no time has to run out before a server knows."""
    async with echo_process(nodes[0]) as (pid, peer_id), Transport(nodes[1]) as transport:
        pinger = Pinger(transport, np.random.default_rng(0))
        await pinger.ping([record(peer_id)])
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            error = (await pinger.ping([record(peer_id)]))[peer_id]
            assert isinstance(error, PeerDisconnected | PeerUnreachable)


async def test_a_service_that_is_given_up_ends_its_streams_and_refuses_new_ones(nodes: tuple[Node, Node]):
    """Peers are told why, other services go on, and it may be served again."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def work(stream: Stream) -> None:
        began.set()
        try:
            await stream.receive()
        finally:
            ended.set()

    async with connected(nodes, work=work) as pair:
        stream = await pair.open("work")
        await began.wait()
        await pair.server.stop_serving("work", PeerBusy("gone to other blocks", retry_after_s=7.0))
        assert ended.is_set()
        for refused in (stream, await pair.open("work")):
            with pytest.raises(PeerBusy, match="gone to other blocks"):
                await refused.receive(10)
        await ask(pair, "direct")
        pair.server.serve("work", echo)
        stream = await pair.open("work")
        await stream.send(INFO)
        assert (await stream.receive(10))[0] == INFO
