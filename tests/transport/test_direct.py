"""The direct carrier: tickets, the pinned certificate, and connections that never come to anything."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError, PeerMisbehaved, PeerUnreachable
from swarm.transport.direct import (
    MAX_TICKETS_PER_PEER,
    TICKET_BYTES,
    TICKET_LIFETIME_S,
    DirectListener,
    Offer,
    Tickets,
    dial,
)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Recorder(asyncio.Protocol):
    """A protocol that remembers what happened to it."""

    def __init__(self) -> None:
        self.made, self.lost = asyncio.Event(), asyncio.Event()
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.made.set()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


@dataclass
class Listening:
    """A listener, what it accepted, and an offer of it."""

    listener: DirectListener
    accepted: list[Recorder] = field(default_factory=list)
    has_room: bool = True

    @property
    def offer(self) -> Offer:
        return Offer(
            version=1,
            hosts=("127.0.0.1",),
            port=self.listener.port,
            fingerprint=self.listener.certificate.fingerprint,
            ticket=bytes(TICKET_BYTES),
        )


@asynccontextmanager
async def listening(**options: float) -> AsyncIterator[Listening]:
    """A listener on loopback."""

    def make_protocol() -> Recorder:
        state.accepted.append(Recorder())
        return state.accepted[-1]

    settings = {"handshake_timeout_s": 5.0, "max_handshakes": 8, **options}
    listener = DirectListener(make_protocol, may_accept=lambda: state.has_room, **settings)  # type: ignore[arg-type]
    state = Listening(listener)
    listener.start("127.0.0.1", 0)
    try:
        yield state
    finally:
        await listener.close()
        for protocol in state.accepted:
            if protocol.made.is_set():
                protocol.transport.abort()  # type: ignore[attr-defined]
                await protocol.lost.wait()


async def test_the_right_certificate_is_accepted_and_bytes_are_encrypted():
    """A dialler that knows the fingerprint talks TLS 1.3."""
    async with listening() as server:
        transport, protocol = await dial(server.offer, Recorder, peer_id="peer", timeout_s=5)
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        transport.write(b"hello")
        await until(lambda: bool(server.accepted) and server.accepted[0].data == b"hello")
        transport.abort()
        await protocol.lost.wait()  # type: ignore[attr-defined]


async def test_another_certificate_is_refused_before_anything_is_said():
    """A peer with the wrong key gets no byte of ours beyond the handshake."""
    async with listening() as server:
        offer = msgspec.structs.replace(server.offer, fingerprint=bytes(32))
        with pytest.raises(PeerUnreachable, match="another certificate than the peer's") as caught:
            await dial(offer, Recorder, peer_id="peer", timeout_s=5)
        assert caught.value.peer_id == "peer"
        assert all(protocol.data == b"" for protocol in server.accepted)


async def test_all_hosts_are_tried_at_once():
    """One that does not answer costs nothing when another does; none that answers is named with its reason."""
    async with listening() as server:
        offer = msgspec.structs.replace(server.offer, hosts=("127.0.0.2", "127.0.0.1", "::1"))
        transport, protocol = await dial(offer, Recorder, peer_id="peer", timeout_s=5)
        transport.abort()
        await protocol.lost.wait()  # type: ignore[attr-defined]
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.2: .*(refused|failed)"):
        await dial(offer, Recorder, peer_id="peer", timeout_s=5)


@pytest.mark.parametrize(
    "change",
    [{"hosts": ("example.org",)}, {"hosts": ("127.0.0.1/x",)}, {"port": 0}, {"fingerprint": b"x"}, {"ticket": b""}],
)
async def test_an_offer_that_makes_no_sense_is_the_peers_fault(change: dict[str, object]):
    """Names in place of addresses, and missing parts, are not tried."""
    whole = Offer(version=1, hosts=("127.0.0.1",), port=1, fingerprint=bytes(32), ticket=bytes(32))
    with pytest.raises(PeerMisbehaved):
        await dial(msgspec.structs.replace(whole, **change), Recorder, peer_id="peer", timeout_s=5)


async def test_a_port_in_use_and_a_foreign_address_are_configuration_errors():
    """The error names host and port."""
    async with listening() as server:
        other = DirectListener(Recorder, may_accept=lambda: True, handshake_timeout_s=5, max_handshakes=8)
        with pytest.raises(ConfigError, match=f"port {server.listener.port}: Address already in use"):
            other.start("127.0.0.1", server.listener.port)
        with pytest.raises(ConfigError, match=r"can't listen on 203\.0\.113\.1"):
            other.start("203.0.113.1", 0)
        with pytest.raises(ConfigError, match="port 70000"):
            other.start("127.0.0.1", 70000)


async def connect_raw(server: Listening) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TCP connection that does not speak TLS by itself."""
    return await asyncio.open_connection("127.0.0.1", server.listener.port)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the other side closes the connection, in whatever way."""
    try:
        async with asyncio.timeout(5):
            await reader.read()
    except ConnectionError:
        pass
    return True


async def test_a_connection_that_does_not_shake_hands_is_dropped_by_its_deadline():
    """Half-open connections, and plain HTTP, don't stay."""
    async with listening(handshake_timeout_s=0.3) as server:
        silent, talking = await connect_raw(server), await connect_raw(server)
        talking[1].write(b"GET / HTTP/1.1\r\n\r\n")
        assert await is_closed(silent[0]) and await is_closed(talking[0])
        for _, writer in (silent, talking):
            writer.close()


async def test_only_so_many_handshakes_run_at_once():
    """Beyond the limit, and without room, connections are closed at once; then there is room again."""
    async with listening(handshake_timeout_s=1.0, max_handshakes=2) as server:
        open_ones = [await connect_raw(server) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await connect_raw(server)
        async with asyncio.timeout(0.5):
            assert await is_closed(refused[0])
        for reader, writer in [*open_ones, refused]:
            assert await is_closed(reader)
            writer.close()
        server.has_room = False
        with pytest.raises(PeerUnreachable):
            await dial(server.offer, Recorder, peer_id="peer", timeout_s=5)
        server.has_room = True
        transport, protocol = await dial(server.offer, Recorder, peer_id="peer", timeout_s=5)
        transport.abort()
        await protocol.lost.wait()  # type: ignore[attr-defined]


async def test_old_tls_is_refused():
    """TLS 1.2 is not spoken."""
    async with listening() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2

        def attempt() -> None:
            with socket.create_connection(("127.0.0.1", server.listener.port)) as raw:
                context.wrap_socket(raw).close()

        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(attempt)


def make_tickets() -> Tickets:
    """Tickets with counted in place of random bytes."""
    counter = iter(range(1 << 30))
    return Tickets(lambda size: next(counter).to_bytes(size, "big"))


def test_a_ticket_is_good_for_one_connection():
    """It names its peer once; an unknown one names nobody."""
    tickets = make_tickets()
    ticket = tickets.issue("peer", 0.0)
    assert ticket is not None and len(ticket) == TICKET_BYTES
    assert tickets.redeem(ticket, 1.0) == "peer"
    assert tickets.redeem(ticket, 1.0) is None
    assert tickets.redeem(b"guess", 1.0) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 20), st.booleans()), max_size=80))
def test_tickets_expire_and_are_limited_per_peer(steps: list[tuple[str, float, bool]]):
    """However they are asked for: at most so many per peer are out, and none lives longer than its time."""
    tickets, now = make_tickets(), 0.0
    issued: dict[bytes, tuple[str, float]] = {}
    for peer_id, pause_s, use in steps:
        now += pause_s
        alive = {ticket: (owner, end) for ticket, (owner, end) in issued.items() if end > now}
        held = sum(owner == peer_id for owner, _ in alive.values())
        ticket = tickets.issue(peer_id, now)
        assert (ticket is None) == (held >= MAX_TICKETS_PER_PEER)
        if ticket is not None:
            issued[ticket] = (peer_id, now + TICKET_LIFETIME_S)
        if use and issued:
            oldest = next(iter(issued))
            owner, end = issued.pop(oldest)
            assert tickets.redeem(oldest, now) == (owner if end > now else None)
