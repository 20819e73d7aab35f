"""A real socket, with slow strangers on it: they are hung up on, and others are answered."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from swarm.health.serving import PageServer
from swarm.web import impatient
from tests.health.fakes import fresh_monitor

Address = tuple[str, int]
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest_asyncio.fixture
async def page() -> AsyncIterator[Address]:
    """The health page of a swarm that nobody looks at."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = PageServer(fresh_monitor(2))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()
    server.should_exit = True
    await serving


async def first_line(address: Address, *, sends: bytes) -> bytes:
    """What somebody hears first who says this and no more; nothing when it is hung up on."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sends)
    async with asyncio.timeout(20):
        line = await reader.readline()
    writer.close()
    return line


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: "])
async def test_a_slow_head_is_hung_up_on(page: Address, monkeypatch: pytest.MonkeyPatch, start: bytes):
    """Also when nothing comes at all."""
    monkeypatch.setattr(impatient, "HEAD_TIMEOUT_S", 0.05)
    assert await first_line(page, sends=start) == b""


async def test_slow_strangers_keep_nobody_out(page: Address):
    """Dozens that have not finished their heads, and one that has."""
    slow = [await asyncio.open_connection(*page) for _ in range(60)]
    for _, writer in slow:
        writer.write(b"GET / HT")
    request = b"GET /badge.svg HTTP/1.1\r\nHost: x\r\n\r\n"
    assert await first_line(page, sends=request) == b"HTTP/1.1 200 OK\r\n"
    for _, writer in slow:
        writer.close()


async def test_those_beyond_the_limit_are_dropped(page: Address, monkeypatch: pytest.MonkeyPatch):
    """However many connect, so many have a socket here."""
    monkeypatch.setattr(impatient, "MAX_SOCKETS", 2)
    waiting = [await asyncio.open_connection(*page) for _ in range(2)]
    for reader, writer in waiting:
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 404 " in await reader.readline()
    with pytest.raises((ConnectionError, AssertionError)):
        assert await first_line(page, sends=b"") != b""
    for _, writer in waiting:
        writer.close()


async def test_a_head_without_end_is_refused(page: Address):
    """As large as it may be, and not larger."""
    endless = b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * impatient.MAX_HEAD_BYTES)
    assert b" 400 " in await first_line(page, sends=endless)


async def test_who_reads_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch):
    """Whatever it has asked for; a server that closes politely would wait for it for ever."""
    monkeypatch.setattr(impatient, "READ_TIMEOUT_S", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    server = PageServer(fresh_monitor(64))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stranger.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stranger, listener.getsockname())
        async with asyncio.timeout(20):
            with pytest.raises(ConnectionError):
                await loop.sock_sendall(stranger, 1_000_000 * GET)
            while server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    server.should_exit = True
    await serving
