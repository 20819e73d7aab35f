"""A transport under attack, on both carriers: the server stays, others are served, memory is bounded, nothing leaks."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import pytest_asyncio

from swarm.errors import PeerBusy, PeerError
from swarm.network import Node, NodeConfig
from swarm.network.tls import trusting_context
from swarm.protocol import PROTOCOL_VERSION, encode
from swarm.rates import Rate
from swarm.transport import Limits
from swarm.transport import places as places_module
from swarm.transport.frames import HELLO_PREFIX, Kind, encode_frame
from swarm.transport.offers import ask_offer
from tests.transport.test_transport import INFO, Pair, ask, connected

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALM = Limits(
    max_pending_connections=8, hello_timeout_s=5.0, frame_timeout_s=0.5, ping_period_s=0.1, silence_timeout_s=3.0
)
Nodes = tuple[Node, Node, Node]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[tuple[Node, Node, Node]]:
    """A server, an honest client and an attacker."""
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as server,
        await Node.start(NodeConfig(client_mode=True, initial_peers=server.addresses)) as client,
        await Node.start(NodeConfig(client_mode=True, initial_peers=server.addresses)) as attacker,
    ):
        yield server, client, attacker


class Attack:
    """A raw connection of the attacker, past the handshakes of its carrier."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def begin(cls, nodes: Nodes, carrier: str, *, with_hello: bool = True) -> "Attack":
        """Connect as any peer could."""
        server, _, attacker = nodes
        ticket = b""
        if carrier == "direct":
            offer = await ask_offer(attacker, server.peer_id, version=PROTOCOL_VERSION, timeout_s=5)
            ticket = offer.ticket
            attack = cls(
                *await asyncio.open_connection(
                    offer.hosts[0], offer.port, ssl=trusting_context(), server_hostname="swarm"
                )
            )
        else:
            attack = cls(*await attacker.open_stream(server.peer_id, "/swarm/mux", 5))
        if with_hello:
            attack.send(encode_frame(Kind.HELLO, 0, HELLO_PREFIX + PROTOCOL_VERSION.to_bytes(2, "big") + ticket))
        return attack

    def send(self, data: bytes) -> None:
        """Say something."""
        self.writer.write(data)

    async def ended(self, timeout_s: float = 10.0) -> bytes:
        """Everything that the server says until it ends the connection."""
        heard = b""
        with suppress(OSError, ssl.SSLError):
            async with asyncio.timeout(timeout_s):
                while data := await self.reader.read(1 << 16):
                    heard += data
        self.writer.close()
        return heard


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def served(pair: Pair) -> None:
    """The honest client gets its answers."""
    for carrier in ("direct", "p2p"):
        await ask(pair, carrier)


both = pytest.mark.parametrize("carrier", ["direct", "p2p"])
PING = encode_frame(Kind.PING, 0, bytes(8))


@both
async def test_a_flood_of_pings_ends_the_connection(nodes: Nodes, carrier: str, caplog: pytest.LogCaptureFixture):
    """Each would be answered, so who asks too often, and perhaps does not read, is dropped; others are served.

    The reason is looked for in the log: a connection that is closed with bytes unread may lose its last words.
    """
    async with connected(nodes[:2], server={"limits": CALM}) as pair:
        attack = await Attack.begin(nodes, carrier)
        attack.send(PING * 10_000)
        heard = await attack.ended()
        assert "PINGs per second" in caplog.text
        assert heard.count(encode_frame(Kind.PONG, 0, bytes(8))) <= CALM.ping_rate.burst + 10
        await served(pair)


@both
async def test_a_flood_of_streams_is_refused_and_then_dropped(
    nodes: Nodes, carrier: str, caplog: pytest.LogCaptureFixture
):
    """So many are opened, the others refused, and a connection that goes on is closed; nothing stays behind."""
    limits = replace(CALM, max_streams_per_peer=8, open_rate=Rate(burst=50, per_s=1e-3), max_refused_opens=20)
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        attack = await Attack.begin(nodes, carrier)
        attack.send(b"".join(encode_frame(Kind.OPEN, 2 * index + 1, b"echo") for index in range(1000)))
        await attack.ended()
        assert "20 streams in a row had to be refused: 8 streams are open, limit 8 per peer" in caplog.text
        await settled(lambda: not pair.server._handling)
        await served(pair)


async def test_new_streams_have_a_rate_for_each_peer(nodes: Nodes):
    """An honest caller that is too quick is told when to come back, and its connection stays."""
    limits = replace(CALM, open_rate=Rate(burst=4, per_s=0.5))
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        for _ in range(4):
            await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5)
        with pytest.raises(PeerBusy, match="new streams per second") as caught:
            await pair.client.call(nodes[0].peer_id, "echo", INFO, timeout_s=5)
        assert 0 < caught.value.retry_after_s <= 2
        assert pair.client.num_connections == 1


@both
async def test_who_is_refused_streams_is_left_unread_for_a_while(nodes: Nodes, carrier: str):
    """A flood of refusals would cost the server as much as it costs the flooder; others are read meanwhile."""
    limits = replace(CALM, max_streams_per_peer=2, open_rate=Rate(burst=50, per_s=4))
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        attack = await Attack.begin(nodes, carrier)
        attack.send(b"".join(encode_frame(Kind.OPEN, 2 * index + 1, b"echo") for index in range(20)))

        def its_transport() -> asyncio.Transport:
            return next(it.transport for it in pair.server._connections if it.peer_id == nodes[2].peer_id)

        await settled(lambda: pair.server._handling[nodes[2].peer_id] == 2 and not its_transport().is_reading())
        await served(pair)
        await settled(lambda: its_transport().is_reading())
        attack.send(b"\xff" * 16)
        await attack.ended()


@both
async def test_a_frame_that_never_ends_is_not_waited_for(nodes: Nodes, carrier: str, caplog: pytest.LogCaptureFixture):
    """A byte now and then keeps a connection alive, but not one frame for ever."""
    caplog.set_level(logging.INFO, logger="swarm.transport")
    async with connected(nodes[:2], server={"limits": CALM}) as pair:
        attack = await Attack.begin(nodes, carrier)
        attack.send(encode_frame(Kind.OPEN, 1, b"echo"))
        attack.send(encode_frame(Kind.DATA, 1, encode(INFO), num_body_bytes=1000))

        async def trickle() -> None:
            while True:
                attack.send(b"x")
                await asyncio.sleep(0.05)

        trickling = asyncio.ensure_future(trickle())
        await attack.ended()
        assert "frame was not complete after 0.5 s" in caplog.text
        trickling.cancel()
        await settled(lambda: pair.server._budget.used == 0)
        await served(pair)


async def test_silent_connections_give_way_to_honest_ones(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    """All places of those that have not said HELLO are taken, on either carrier: an honest peer gets in at once."""
    monkeypatch.setattr(places_module, "YOUNG_S", 0.0)
    limits = replace(CALM, hello_timeout_s=60.0, max_pending_connections=4)
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        silent = [await Attack.begin(nodes, "direct", with_hello=False) for _ in range(4)]
        await settled(lambda: sum(not it.is_greeted for it in pair.server._connections) == 4)
        await served(pair)
        for attack in silent:
            attack.writer.close()


async def test_idle_connections_give_way_to_working_ones(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    """Connections that carry nothing fill the server: an honest peer takes the place of the one idle for longest."""
    monkeypatch.setattr(places_module, "YOUNG_S", 0.0)
    limits = replace(CALM, max_connections=4)
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        idle = [await Attack.begin(nodes, "direct") for _ in range(4)]

        async def keep_alive() -> None:
            while True:
                for attack in idle:
                    attack.send(encode_frame(Kind.PONG, 0, bytes(8)))
                await asyncio.sleep(0.2)

        living = asyncio.ensure_future(keep_alive())
        await settled(lambda: sum(it.idle_since is not None for it in pair.server._connections) == 4)
        await ask(pair, "direct")
        assert pair.server.num_connections <= 4
        living.cancel()
        for attack in idle:
            attack.writer.close()


async def test_who_does_not_read_answers_is_given_up(nodes: Nodes):
    """Errors for refused streams pile up at the sender of them: no further than the limit."""
    limits = replace(CALM, max_unsent_bytes=1 << 16, max_refused_opens=1 << 30, silence_timeout_s=60.0)
    async with connected(nodes[:2], server={"limits": limits}) as pair:
        attack = await Attack.begin(nodes, "direct")
        attack.writer.transport.pause_reading()  # type: ignore[attr-defined]
        service = b"x" * 64
        largest = 0
        with suppress(OSError):
            for start in range(0, 200_000, 500):
                attack.send(b"".join(encode_frame(Kind.OPEN, 2 * (start + i) + 1, service) for i in range(500)))
                await attack.writer.drain()
                for connection in pair.server._connections:
                    if connection.peer_id == nodes[2].peer_id:
                        largest = max(largest, connection.transport.get_write_buffer_size())
        await settled(lambda: not any(it.peer_id == nodes[2].peer_id for it in pair.server._connections))
        assert largest < limits.max_unsent_bytes + (1 << 20)
        attack.writer.transport.abort()  # type: ignore[attr-defined]
        await served(pair)


@both
async def test_garbage_after_the_greeting_ends_that_connection_only(nodes: Nodes, carrier: str):
    """Whatever comes."""
    async with connected(nodes[:2], server={"limits": CALM}) as pair:
        for data in (b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n", encode_frame(Kind.DATA, 7, b"x"), PING[:7]):
            attack = await Attack.begin(nodes, carrier)
            attack.send(data)
            if data != PING[:7]:
                assert await attack.ended()
            attack.writer.close()
        await served(pair)
        await settled(lambda: not any(it.peer_id == nodes[2].peer_id for it in pair.server._connections))


async def test_offers_have_a_rate_for_each_peer(nodes: Nodes):
    """Who asks again and again gets none for a while; others do."""
    limits = replace(CALM, offer_rate=Rate(burst=3, per_s=1e-3))
    async with connected(nodes[:2], server={"limits": limits}):
        for index in range(5):
            try:
                await ask_offer(nodes[2], nodes[0].peer_id, version=PROTOCOL_VERSION, timeout_s=5)
                assert index < 3
            except PeerError:
                assert index >= 3
        assert (await ask_offer(nodes[1], nodes[0].peer_id, version=PROTOCOL_VERSION, timeout_s=5)).hosts


async def test_a_flood_of_p2p_streams_keeps_nobody_out(nodes: Nodes):
    """A peer opens raw streams by the dozen and says nothing on them: it has a few, others get theirs."""
    async with connected(nodes[:2], server={"limits": CALM}) as pair:
        attacks = [await Attack.begin(nodes, "p2p", with_hello=False) for _ in range(30)]
        await settled(
            lambda: (
                sum(it.peer_id == nodes[2].peer_id for it in pair.server._connections) <= CALM.max_connections_per_peer
            )
        )
        await served(pair)
        for attack in attacks:
            attack.writer.close()
