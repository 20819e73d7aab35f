"""The client of the daemon's control socket: splitting messages, late replies, too many requests."""

import asyncio
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network import Node, NodeConfig, unary
from swarm.network.hive import P2PDaemonError, P2PHandlerError, PeerID
from swarm.network.wire import DelimitedReader


def delimited(message: bytes) -> bytes:
    """A message behind its varint length."""
    length, size = bytearray(), len(message)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*length, size]) + message


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 1000), max_size=12))
def test_any_split_gives_the_same_messages(messages: list[bytes], cuts: list[int]):
    """Messages come out whole and in order, however the bytes were cut."""
    data = b"".join(delimited(message) for message in messages)
    reader, received, start = DelimitedReader(max_bytes=300), [], 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        reader.feed(data[start:cut])
        start = cut
        while (message := reader.next()) is not None:
            received.append(message)
    assert received == messages and not reader.buffer


@given(st.binary(min_size=1, max_size=40))
def test_garbage_is_an_error_of_the_daemon_and_nothing_else(data: bytes):
    """Random bytes are messages, or wait for more, or raise P2PDaemonError."""
    reader = DelimitedReader(max_bytes=20)
    reader.feed(data)
    try:
        while reader.next() is not None:
            pass
    except P2PDaemonError:
        pass


def test_a_length_above_the_limit_is_refused_before_the_message_comes():
    """Nothing is collected for a message that will not be taken; an endless length is refused too."""
    reader = DelimitedReader(max_bytes=100)
    reader.feed(bytes([101]))
    with pytest.raises(P2PDaemonError, match="message of 101 bytes from the daemon, limit 100"):
        reader.next()
    reader = DelimitedReader(max_bytes=100)
    reader.feed(b"\x80" * 10)
    with pytest.raises(P2PDaemonError, match="malformed length"):
        reader.next()


async def test_unary_calls_and_their_limits(monkeypatch: pytest.MonkeyPatch):
    """A handler's exception, no handler and too many requests are errors of the call; a cancel reaches the handler."""
    monkeypatch.setattr(unary, "MAX_CALLS", 1)
    cancelled = asyncio.Event()

    async def hang(data: bytes, peer_id: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return data

    async def fail(data: bytes, peer_id: Any) -> bytes:
        raise ValueError(data.decode())

    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as server,
        await Node.start(NodeConfig(client_mode=True, initial_peers=server.addresses)) as client,
    ):
        peer_id, call = PeerID.from_base58(server.peer_id), client._underlay.caller.call_unary_handler
        await server._underlay.caller.add_unary_handler("hang", hang)
        await server._underlay.caller.add_unary_handler("fail", fail)
        with pytest.raises(P2PDaemonError, match="registered already"):
            await server._underlay.caller.add_unary_handler("fail", fail)
        with pytest.raises(P2PHandlerError, match="ValueError"):
            await call(peer_id, "fail", b"reason")
        with pytest.raises(P2PDaemonError):
            await call(peer_id, "missing", b"")
        hanging = asyncio.ensure_future(call(peer_id, "hang", b""))
        await asyncio.sleep(0.1)
        with pytest.raises(P2PHandlerError, match="too many requests"):
            await call(peer_id, "fail", b"")
        hanging.cancel()
        async with asyncio.timeout(5):
            await cancelled.wait()
        await server._underlay.caller.remove_unary_handler("fail")
        with pytest.raises(P2PDaemonError):
            await call(peer_id, "fail", b"")


async def test_a_dht_request_is_no_larger_than_its_kind_needs():
    """A find with thousands of keys, each of which would cost a search, is refused; a usual one is answered."""
    find = sys.modules["hivemind.proto.dht_pb2"].FindRequest
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as server,
        await Node.start(NodeConfig(client_mode=True, initial_peers=server.addresses)) as client,
    ):
        peer_id, name = PeerID.from_base58(server.peer_id), "DHTProtocol.rpc_find"
        node_id = {"node_id": bytes(20)}
        small = find(keys=[bytes(20)] * 16, peer=node_id).SerializeToString()
        assert await client._underlay.caller.call_unary_handler(peer_id, name, small)
        large = find(keys=[bytes(20)] * 2000, peer=node_id).SerializeToString()
        with pytest.raises(P2PHandlerError, match=r"rpc_find of \d+ bytes, limit 2048"):
            await client._underlay.caller.call_unary_handler(peer_id, name, large)
