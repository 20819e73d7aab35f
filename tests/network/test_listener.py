"""The TLS listener under siege: those who dawdle give way, and no host keeps others out."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarm.network import listener as module
from swarm.network.listener import TlsListener
from swarm.network.tls import trusting_context
from swarm.rates import Rate
from swarm.transport.direct import Certificate

PLENTY = Rate(burst=1e6, per_s=1e6)


class Hello(asyncio.Protocol):
    """Says hello and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(b"hello")  # type: ignore[attr-defined]
        transport.close()


@asynccontextmanager
async def listening(**options: object) -> AsyncIterator[TlsListener]:
    """A listener on loopback that takes a moment for old."""
    settings = {
        "may_accept": lambda: True,
        "handshake_timeout_s": 20.0,
        "max_handshakes": 8,
        "rate": PLENTY,
        **options,
    }
    listener = TlsListener(Certificate.generate().context, Hello, **settings)  # type: ignore[arg-type]
    listener.start("0.0.0.0", 0)
    try:
        yield listener
    finally:
        await listener.close()


async def connect(listener: TlsListener, host: str) -> socket.socket:
    """A TCP connection from a host of ours, without a word."""
    raw = socket.socket()
    raw.setblocking(False)
    raw.bind((host, 0))
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", listener.port))
    return raw


async def greet(listener: TlsListener, host: str) -> bytes:
    """What an honest peer hears."""
    raw = await connect(listener, host)
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(sock=raw, ssl=trusting_context(), server_hostname="swarm")
            data = await reader.read()
            writer.close()
            return data
    except OSError:
        return b""


async def until_there_are(listener: TlsListener, number: int) -> None:
    """Wait until so many handshakes run."""
    async with asyncio.timeout(10):
        while listener.num_handshakes != number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_half_open_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch):
    """All places are taken by connections that say nothing; an honest peer gets through, and they are dropped."""
    monkeypatch.setattr(module, "_OLD_S", 0.0)
    async with listening() as listener:
        silent = [await connect(listener, f"127.0.0.{2 + index % 4}") for index in range(8)]
        await until_there_are(listener, 8)
        assert await greet(listener, "127.0.0.9") == b"hello"
        assert await greet(listener, "127.0.0.5") == b"hello", "its own silent connection gives way"
        await until_there_are(listener, 6)
        for raw in silent:
            raw.close()


async def test_one_host_has_a_share_of_the_handshakes_only():
    """However many connections it opens, the places of others stay free."""
    async with listening() as listener:
        silent = [await connect(listener, "127.0.0.2") for _ in range(20)]
        await until_there_are(listener, 2)
        assert await greet(listener, "127.0.0.2") == b""
        assert await greet(listener, "127.0.0.3") == b"hello"
        for raw in silent:
            raw.close()


async def test_a_host_that_connects_too_often_is_refused_and_others_are_not():
    """The rate is per host."""
    async with listening(rate=Rate(burst=3, per_s=1e-9)) as listener:
        assert [await greet(listener, "127.0.0.2") for _ in range(5)] == [b"hello"] * 3 + [b""] * 2
        assert await greet(listener, "127.0.0.3") == b"hello"


async def test_without_room_nobody_is_accepted():
    """The owner decides."""
    async with listening(may_accept=lambda: False) as listener:
        assert await greet(listener, "127.0.0.2") == b""
