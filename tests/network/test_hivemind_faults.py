"""The ways in which hivemind's peers wedge for good: each reproduced with hivemind alone, then survived by ours.

hivemind's classes are used as they are (P2P, DHTNode, on the same daemon), except where a race is provoked. Two faults
have no counterpart here: the lost tails of streams (B4) are tests/transport's business, and the process that dies of
large commands (B5, hivemind.DHT) is not used.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from swarm.errors import PeerDisconnected, PeerTimeout
from swarm.network import Node, NodeConfig, dht
from swarm.network.hive import P2P, DHTNode, P2PDaemonError, P2PHandlerError, PeerID, p2pd_pb2
from swarm.protocol import InfoRequest
from swarm.transport import Stream, Transport

LIMIT = 1 << 16
Message = p2pd_pb2.DaemonError
"""Any protobuf message with a text will do."""


@asynccontextmanager
async def hivemind_pair(**options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Two peers of hivemind alone; the second knows the first."""
    settings = {"nat_port_map": False, "auto_nat": False, "use_relay": False, **options}
    server = await P2P.create(**settings)
    client = await P2P.create(initial_peers=await server.get_visible_maddrs(), **settings)
    try:
        yield server, client
    finally:
        for peer in (client, server):
            await peer.shutdown()
            await end_of(peer._reader_task)
            await end_of(peer._client.control._read_task)
            await end_of(peer._client.control._write_task)


async def end_of(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task that hivemind leaves behind, and take what it has to say."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


@asynccontextmanager
async def our_pair() -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes of ours; the second knows the first."""
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as server,
        await Node.start(NodeConfig(host="127.0.0.1", initial_peers=server.addresses)) as client,
    ):
        yield server, client


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def echo(data: bytes, peer_id: Any) -> bytes:
    """A unary handler."""
    return data


async def grow(data: bytes, peer_id: Any) -> bytes:
    """A unary handler whose reply is above any limit."""
    return bytes(20 << 20)


async def cancel_as_reply_comes(reader: Any, name: str, call: Any) -> bool:
    """Cancel a call in the very iteration of the loop in which its reply is read; whether that is how it ended."""
    task = asyncio.ensure_future(call)
    original = getattr(reader, name)

    def feed(data: bytes) -> None:
        original(data)
        task.cancel()

    setattr(reader, name, feed)
    await asyncio.wait({task}, timeout=5)
    setattr(reader, name, original)
    return task.cancelled()


async def test_b1_a_call_cancelled_as_its_reply_comes():
    """hivemind's reader dies of it, and every later call hangs; ours drops the late reply."""
    async with hivemind_pair() as (server, client):
        control = client._client.control
        await server._client.add_unary_handler("echo", echo)
        assert await control.call_unary_handler(server.peer_id, "echo", b"x") == b"x"
        reader = control._read_task.get_coro().cr_frame.f_locals["reader"]
        call = control.call_unary_handler(server.peer_id, "echo", b"x")
        assert await cancel_as_reply_comes(reader, "feed_data", call)
        assert isinstance(control._read_task.exception(), asyncio.InvalidStateError)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(control.call_unary_handler(server.peer_id, "echo", b"x"), 1)
    async with our_pair() as (server, client):
        peer_id = PeerID.from_base58(server.peer_id)
        await server._underlay.caller.add_unary_handler("echo", echo)
        assert await client._underlay.caller.call_unary_handler(peer_id, "echo", b"x") == b"x"
        assert client._underlay.caller._persistent is not None
        reader = client._underlay.caller._persistent.reader
        call = client._underlay.caller.call_unary_handler(peer_id, "echo", b"x")
        assert await cancel_as_reply_comes(reader, "feed", call)
        assert await client._underlay.caller.call_unary_handler(peer_id, "echo", b"x") == b"x"


async def test_b2_a_dead_peer_on_a_stream():
    """hivemind's stream waits for ever for a peer whose daemon was killed; ours fails within a second."""

    async def answer(requests: Any, context: Any) -> Any:
        async for request in requests:
            yield request

    async def ask() -> AsyncIterator[Any]:
        yield Message(message="hello")
        await asyncio.Event().wait()

    async with hivemind_pair() as (server, client):
        await server.add_protobuf_handler("answer", answer, Message, stream_input=True, stream_output=True)
        answers = await client.iterate_protobuf_handler(server.peer_id, "answer", ask(), Message)
        assert (await anext(answers)).message == "hello"
        server._child.kill()
        waiting = asyncio.ensure_future(anext(answers))
        _, pending = await asyncio.wait({waiting}, timeout=1.5)
        assert pending
        await end_of(waiting)  # type: ignore[arg-type]

    async def silent(stream: Stream) -> None:
        await stream.receive()
        await stream.receive()

    async with our_pair() as (server, client), Transport(server) as serving, Transport(client) as dialling:
        serving.serve("silent", silent)
        stream = await dialling.open(server.peer_id, "silent", timeout_s=5, carrier="p2p")
        await stream.send(InfoRequest())
        os.kill(server.daemon_pid, signal.SIGKILL)
        with pytest.raises(PeerDisconnected):
            await stream.receive(1.0)


async def test_b3_everybody_stops_answering_for_a_while(monkeypatch: pytest.MonkeyPatch):
    """hivemind's routing table is empty for good afterwards; ours fills again by itself."""
    monkeypatch.setattr(dht, "CALL_TIMEOUT_S", 0.6)
    async with hivemind_pair() as (server, client), AsyncExitStack() as stack:
        first = await DHTNode.create(p2p=server, wait_timeout=0.6)
        stack.push_async_callback(first.shutdown)
        second = await DHTNode.create(
            p2p=client, wait_timeout=0.6, initial_peers=await server.get_visible_maddrs(), blacklist_time=0
        )
        stack.push_async_callback(second.shutdown)
        table = second.protocol.routing_table.uid_to_peer_id
        await until(lambda: len(table) == 1)
        os.kill(server._child.pid, signal.SIGSTOP)
        while table:
            await second.get("key", latest=True)
        os.kill(server._child.pid, signal.SIGCONT)
        await asyncio.sleep(2)
        await second.get("key", latest=True)
        assert not table
    async with our_pair() as (server, client):
        os.kill(server.daemon_pid, signal.SIGSTOP)
        while client.num_peers:
            with pytest.raises(PeerTimeout):
                await client.dht_get("key")
        os.kill(server.daemon_pid, signal.SIGCONT)
        await until(lambda: client.num_peers == 1)
        assert await client.dht_store("key", client.peer_id, b"value", time.time() + 60)
        assert await server.dht_get("key") == {client.peer_id: b"value"}


async def test_b6_a_reply_above_the_limit():
    """hivemind's handler dies in silence and its caller waits for ever; ours is told, with both sizes."""
    async with hivemind_pair(persistent_conn_max_msg_size=LIMIT) as (server, client):
        await server._client.add_unary_handler("grow", grow)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client._client.call_unary_handler(server.peer_id, "grow", b""), 1)
        for task in server._client.control._handler_tasks.values():
            assert isinstance(task.exception(), ValueError)
    async with our_pair() as (server, client):
        await server._underlay.caller.add_unary_handler("grow", grow)
        with pytest.raises(P2PHandlerError, match=r"reply of 20971520 bytes, limit 4194304"):
            await client._underlay.caller.call_unary_handler(PeerID.from_base58(server.peer_id), "grow", b"")


async def test_b7_a_request_above_the_daemons_limit():
    """hivemind loses its connection to the daemon and all later calls hang; ours refuses, and recovers if it must."""
    async with hivemind_pair(persistent_conn_max_msg_size=LIMIT) as (server, client):
        control = client._client.control
        await server._client.add_unary_handler("echo", echo)
        control.persistent_conn_max_msg_size = 4 * LIMIT  # as when the daemon was started by someone else
        for size in (2 * LIMIT, 1):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(control.call_unary_handler(server.peer_id, "echo", bytes(size)), 0.7)
    async with our_pair() as (server, client):
        peer_id = PeerID.from_base58(server.peer_id)
        await server._underlay.caller.add_unary_handler("echo", echo)
        with pytest.raises(P2PDaemonError, match=r"request of \d+ bytes, limit 4194304"):
            await client._underlay.caller.call_unary_handler(peer_id, "echo", bytes(5 << 20))
        client._underlay.caller.max_message_bytes = 8 << 20
        with pytest.raises(P2PDaemonError, match="daemon was lost"):
            await client._underlay.caller.call_unary_handler(peer_id, "echo", bytes(5 << 20))
        await until(lambda: client.num_restarts == 1)
        await client.connect(server.addresses[0])
        assert await client._underlay.caller.call_unary_handler(peer_id, "echo", b"x") == b"x"


async def answer_of(client: Node, peer_id: PeerID) -> bytes | None:
    """None as long as the new daemon has not found its peers again."""
    try:
        answer: bytes = await client._underlay.caller.call_unary_handler(peer_id, "echo", b"x")
        return answer
    except P2PDaemonError:
        return None


async def test_b8_the_local_daemon_is_killed():
    """hivemind's pending and later calls hang, and it calls itself alive; ours fail at once, then work again."""

    async def hang(data: bytes, peer_id: Any) -> bytes:
        await asyncio.Event().wait()
        return data

    async with hivemind_pair() as (server, client):
        await server._client.add_unary_handler("hang", hang)
        pending = asyncio.ensure_future(client._client.call_unary_handler(server.peer_id, "hang", b""))
        await asyncio.sleep(0.2)
        client._child.kill()
        later = asyncio.ensure_future(client._client.call_unary_handler(server.peer_id, "hang", b""))
        _, waiting = await asyncio.wait({pending, later}, timeout=1)
        assert len(waiting) == 2 and client.is_alive
        await end_of(pending)  # type: ignore[arg-type]
        await end_of(later)  # type: ignore[arg-type]
    async with our_pair() as (server, client):
        peer_id = PeerID.from_base58(server.peer_id)
        await server._underlay.caller.add_unary_handler("hang", hang)
        await server._underlay.caller.add_unary_handler("echo", echo)
        pending = asyncio.ensure_future(client._underlay.caller.call_unary_handler(peer_id, "hang", b""))
        await asyncio.sleep(0.2)
        os.kill(client.daemon_pid, signal.SIGKILL)
        with pytest.raises(P2PDaemonError, match="daemon was lost"):
            await asyncio.wait_for(pending, 1)
        await until(lambda: client.num_restarts == 1 and client.num_peers == 1)
        async with asyncio.timeout(10):
            while await answer_of(client, peer_id) != b"x":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
