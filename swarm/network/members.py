"""The underlay of private swarms: TLS 1.3 in which both sides show certificates, over plain TCP, and nothing else.

    listener ──TLS, Hello──► on_hello: Gate ──► a link for unary calls, or a raw stream
    call, open_stream ──► Dialler ──TLS, Hello──► Welcome ──► the same, at the other side
    links carry revocations, too ──► whom they concern is dropped at once

Who has no invitation gets no further than the TLS handshake: no protocol is spoken without one, and nobody is dialled
who is not named by an initial address or by a member's signed card. A raw stream may also pass a pipe that leads
through a relay: all of this is the same inside. It knows nothing of relays, the DHT, models or sessions.
"""

import asyncio
import hashlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from swarm.errors import (
    AccessDenied,
    InvitationRevoked,
    PeerBusy,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    SwarmError,
)
from swarm.identity import Identity
from swarm.network.addresses import Card, PeerAddress, as_text, listening_endpoints
from swarm.network.calls import CallLink
from swarm.network.config import NodeConfig
from swarm.network.daemon import claim_port
from swarm.network.dialler import Dialled, Dialler, PeerRefused, ReachedOurselves
from swarm.network.greeter import IncomingGreeting
from swarm.network.greeting import CALLS, VERSION, Hello, Refused, Welcome
from swarm.network.guest import Guest
from swarm.network.links import Links
from swarm.network.listener import Entrance, Handshake, TlsListener
from swarm.network.news import News
from swarm.network.records import MemberRecords
from swarm.network.roll import MEMBERS, Roll
from swarm.network.tls import member_contexts
from swarm.network.unary import Handler, UnaryDesk
from swarm.network.underlay import Expelled, Restarted, StreamFactory
from swarm.network.whereabouts import HERE, WHERE, Whereabouts
from swarm.private.certificates import Passport, Proven, read_passport
from swarm.private.credentials import Credentials
from swarm.private.gate import Gate
from swarm.private.revocations import (
    encode_revocations,
)
from swarm.private.store import RevocationStore
from swarm.protocol import error_to_wire

log = logging.getLogger(__name__)

MAX_UNARY_BYTES = 4 << 20
MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_MEMBER = 256
"""Links and streams; a member may have several processes."""
MAX_LINKS_PER_PEER = 4
MAX_LINKS_PER_MEMBER = 32
"""Links for calls that others made; beyond them the one that idles longest leaves, which costs who needs it a dial."""
MAX_GREETINGS = 64
"""Connections that have not said Hello; beyond them the oldest one of the host that has most is given up."""
HANDSHAKE_TIMEOUT_S = 5.0
DIAL_TIMEOUT_S = 5.0
SWEEP_PERIOD_S = 1.0
"""How often expired members are looked for."""
FAREWELL_S = 1.0
"""How long an expelled peer may take to read why."""
IDLE_S = 60.0
"""A link that nobody has used for so long is closed."""


class MemberNetwork:
    """One process's connections with the members of its swarm.

    Args:
        config: where to listen.
        credentials: which swarm, and who we are in it.
        identity: of this process.
    """

    is_private = True
    num_restarts = 0
    is_up = True

    def __init__(self, config: NodeConfig, credentials: Credentials, identity: Identity) -> None:
        self.gate = Gate(credentials, identity)
        self.denied = asyncio.Event()
        self._config = config
        self._identity = identity
        self._server_context, client_context = member_contexts(self.gate, identity)
        self._desk = UnaryDesk()
        self._factories: dict[str, StreamFactory] = {}
        self._links = Links()
        self._whereabouts = Whereabouts(self._links)
        self.roll = Roll(self._links, self.gate)
        store = RevocationStore(config.state_dir, self.gate.authority)
        self.news = News(self.gate, self._links, self.roll, store, self._sweep)
        self._dialler = Dialler(self.gate, client_context, self.news.learn)
        self._desk.handlers |= {
            WHERE: self._whereabouts.answer,
            HERE: self._whereabouts.hear,
            MEMBERS: self.roll.answer,
        }
        self._is_hidden = False
        self._linking: dict[str, asyncio.Lock] = {}
        self._found: dict[str, str] = {}
        """Of each initial address: who was there last."""
        self._connections: dict[asyncio.Transport, Proven] = {}
        self._greetings: dict[IncomingGreeting, None] = {}
        """Connections that have not said Hello yet, the oldest first."""
        self._listener: TlsListener | None = None
        self._expelled: list[Expelled] = []

    async def start(self) -> None:
        """Listen, unless we are a client.

        Raises:
            ConfigError: the address can't be used. AccessDenied: we are no member any more, or only a client.
        """
        self.news.load()
        self.check_access()
        if self._config.client_mode:
            return
        self.gate.check_may_announce()
        listener = TlsListener(
            self._server_context,
            self._make_greeting,
            may_accept=lambda: len(self._connections) < MAX_CONNECTIONS,
            handshake_timeout_s=HANDSHAKE_TIMEOUT_S,
            max_handshakes=MAX_GREETINGS,
        )
        listener.start(self._config.host, claim_port(self._config.host, self._config.port))
        self._listener = listener
        self._whereabouts.own = self._make_card(listener, self._config.announce)

    @property
    def listening(self) -> tuple[str, ...]:
        """See Underlay."""
        return self._whereabouts.listening

    @property
    def endpoints(self) -> tuple[str, ...]:
        """See Underlay."""
        return () if self._is_hidden else self.listening

    @property
    def entrance(self) -> Entrance | None:
        """See Underlay."""
        if self._listener is None:
            return None
        fingerprint = hashlib.sha256(self.gate.passport.process).digest()
        return Entrance(port=self._listener.port, fingerprint=fingerprint)

    async def present(self, announce: Sequence[str], *, is_hidden: bool) -> None:
        """See Underlay. Our card says where we listen in any case: neighbours reach us there."""
        self._is_hidden = is_hidden
        if self._listener is not None:
            await self._whereabouts.move(self._make_card(self._listener, announce))

    def _make_card(self, listener: TlsListener, announce: Sequence[str]) -> Card:
        endpoints = listening_endpoints(listener.host, listener.port, announce)
        return Card.make(self._identity, endpoints, time.time())

    @property
    def caller(self) -> "MemberNetwork":
        """We make the DHT's calls ourselves."""
        return self

    def check_access(self) -> None:
        """See Underlay."""
        self.gate.check_ourselves(time.time())

    def check_may_announce(self) -> None:
        """See Underlay."""
        self.check_access()
        self.gate.check_may_announce()

    def make_records(self) -> MemberRecords:
        """Records show who signed them, and only servers' and admins' count."""
        return MemberRecords(self._identity, self.gate)

    def may_be_asked(self, peer_id: str) -> bool:
        """Whether a connected peer may take part in the DHT: clients may not."""
        proven = self._proven(peer_id)
        return proven is not None and proven.member.role.may_announce

    def account_of(self, peer_id: str) -> str:
        """The member whose process a connected peer is."""
        proven = self._proven(peer_id)
        return peer_id if proven is None else proven.member.id

    def on_expelled(self, listener: Expelled) -> None:
        """See Underlay."""
        self._expelled.append(listener)

    async def supervise(self, on_restart: Restarted) -> None:
        """Drop members whose time is over, and links that nobody uses."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            self._sweep()
            for link in self._links.idle(time.monotonic(), IDLE_S):
                link.close()

    async def close(self) -> None:
        """Stop listening, end all connections."""
        if self._listener is not None:
            await self._listener.close()
        await self._desk.close()
        for transport in list(self._connections):
            transport.abort()

    # --- unary calls, in the form in which hivemind's P2P makes them; this `close` is not called by it ---

    async def call_unary_handler(self, peer_id: Any, name: str, data: bytes) -> bytes:
        """Call a member. Errors as `open_stream`, and PeerError when the handler failed."""
        link = await self._link_to(peer_id.to_base58())
        return await link.call(name, data)

    async def add_unary_handler(self, name: str, handler: Handler, balanced: bool = False) -> None:
        """Serve `name` to all members."""
        self._desk.handlers[name] = handler

    async def remove_unary_handler(self, name: str) -> None:
        """Stop serving `name`."""
        self._desk.handlers.pop(name, None)

    # --- peers and streams ---

    async def connect(self, peer: PeerAddress, *, timeout_s: float) -> str:
        """Link with whoever is at an address; our own id when that is us. Errors as `open_stream`."""
        known = peer.peer_id or self._found.get(peer.text)
        if known is not None and self._links.live(known) is not None:
            return known
        try:
            dialled = await self._dialler.dial(
                [peer.endpoint], self._hello(CALLS), peer_id=peer.peer_id, timeout_s=timeout_s
            )
        except ReachedOurselves:
            return self._identity.peer_id
        self._found[peer.text] = dialled.proven.peer_id
        self._keep_link(dialled)
        return dialled.proven.peer_id

    async def list_peers(self) -> list[str]:
        """See Underlay."""
        return self._links.peers

    async def list_addresses(self) -> list[str]:
        """See Underlay."""
        cards = [card for peer_id in self._links.peers if (card := self._whereabouts.known(peer_id)) is not None]
        return [as_text(endpoint, card.peer_id) for card in cards for endpoint in card.endpoints]

    async def open_stream(self, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float) -> None:
        """See Underlay."""
        dialled = await self._dial(peer_id, name, timeout_s)
        self._take(dialled)
        dialled.greeting.switch(protocol)

    async def open_stream_on(
        self, pipe: socket.socket, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float
    ) -> None:
        """Open a raw stream to a peer over a socket that leads to it somehow. Errors as `open_stream`."""
        dialled = await self._dialler.dial_on(pipe, self._hello(name), peer_id=peer_id, timeout_s=timeout_s)
        self._take(dialled)
        dialled.greeting.switch(protocol)

    async def take_stream_on(
        self, pipe: socket.socket, peer_id: str, name: str, factory: StreamFactory, *, timeout_s: float
    ) -> None:
        """Be at the other end of that. Returns after TLS, before Hello, whose time is short.

        Raises:
            OSError, TimeoutError: nobody comes, or a stranger.
        """
        guest = Guest(self, peer_id, name, factory)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: Handshake(lambda: IncomingGreeting(guest)),
            pipe,
            ssl=self._server_context,
            ssl_handshake_timeout=timeout_s,
        )

    async def add_stream_factory(self, name: str, factory: StreamFactory) -> None:
        """See Underlay."""
        self._factories[name] = factory

    async def remove_stream_factory(self, name: str) -> None:
        """See Underlay."""
        self._factories.pop(name, None)

    # --- connections that we make ---

    async def _link_to(self, peer_id: str) -> CallLink:
        """The link with a peer, made if there is none; who wants the same one waits."""
        lock = self._linking.setdefault(peer_id, asyncio.Lock())
        try:
            async with lock:
                link = self._links.live(peer_id)
                return link or self._keep_link(await self._dial(peer_id, CALLS, DIAL_TIMEOUT_S))
        finally:
            if not lock.locked():
                self._linking.pop(peer_id, None)

    async def _dial(self, peer_id: str, service: str, timeout_s: float) -> Dialled:
        """Connect to a peer, wherever it is said to be; asks others once if it is not where we thought."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._search(peer_id, service, timeout_s)
        except TimeoutError as error:
            raise PeerTimeout(f"no connection to {peer_id} within {timeout_s:g} s", peer_id=peer_id) from error

    async def _search(self, peer_id: str, service: str, timeout_s: float) -> Dialled:
        card = self._whereabouts.known(peer_id)
        if card is not None:
            try:
                return await self._dial_card(card, service, timeout_s / 2)
            except PeerRefused:
                raise
            except PeerError as error:
                log.debug("%s is not where it was: %s", peer_id, error)
                self._whereabouts.forget(card)
        return await self._dial_card(await self._whereabouts.ask(peer_id), service, timeout_s)

    async def _dial_card(self, card: Card, service: str, timeout_s: float) -> Dialled:
        try:
            return await self._dialler.dial(
                card.endpoints, self._hello(service), peer_id=card.peer_id, timeout_s=timeout_s
            )
        except ReachedOurselves as error:
            raise PeerUnreachable("that is ourselves", peer_id=card.peer_id) from error

    def _hello(self, service: str) -> Hello:
        return Hello(VERSION, service, self.gate.passport.invitation, self._whereabouts.own)

    def _keep_link(self, dialled: Dialled) -> CallLink:
        link = self._make_link(dialled.proven)
        self._take(dialled)
        dialled.greeting.switch(link)
        return link

    def _take(self, dialled: Dialled) -> None:
        if dialled.welcome.card is not None:
            self._whereabouts.learn(dialled.welcome.card, dialled.proven)
        self.on_connected(dialled.greeting.transport, dialled.proven)

    def _make_link(self, proven: Proven) -> CallLink:
        link = CallLink(self.news, proven, self._desk, lambda: self.gate.revocations.digest, max_bytes=MAX_UNARY_BYTES)
        self._links.add(link)
        return link

    # --- connections that others make ---

    def _make_greeting(self) -> IncomingGreeting:
        if len(self._greetings) >= MAX_GREETINGS:
            self._oldest_greeting().fail(PeerBusy("no room for a connection that says nothing"))
        greeting = IncomingGreeting(self)
        self._greetings[greeting] = None
        return greeting

    def _oldest_greeting(self) -> IncomingGreeting:
        """Of the host that has most of them: an honest one takes milliseconds, so it is those that dawdle that go."""
        num_of = Counter(greeting.remote_host for greeting in self._greetings)
        host = max(num_of, key=num_of.__getitem__)
        return next(greeting for greeting in self._greetings if greeting.remote_host == host)

    def on_greeting_over(self, greeting: IncomingGreeting) -> None:
        """A greeting has come to an end."""
        self._greetings.pop(greeting, None)

    def on_hello(self, process: bytes, hello: Hello) -> tuple[Proven, asyncio.Protocol, Welcome]:
        """Let a peer in, or not.

        Raises:
            AccessDenied, PeerMisbehaved, PeerBusy, PeerUnreachable: why not.
        """
        proven, welcome = self.admit(process, hello)
        if hello.service == CALLS:
            for link in self._links.surplus(
                proven, max_per_peer=MAX_LINKS_PER_PEER, max_per_member=MAX_LINKS_PER_MEMBER
            ):
                link.close()
            return proven, self._make_link(proven), welcome
        if (factory := self._factories.get(hello.service)) is None:
            raise PeerUnreachable(f"{hello.service!r} is not served here")
        return proven, factory(proven.peer_id), welcome

    def admit(self, process: bytes, hello: Hello) -> tuple[Proven, Welcome]:
        """Whether a peer is a member, and has not all connections already that a member may have.

        Raises:
            AccessDenied, PeerMisbehaved, PeerBusy: why not.
        """
        proven = self.gate.admit(Passport(process=process, invitation=hello.invitation), time.time())
        if hello.version != VERSION:
            raise PeerMisbehaved(f"greeting of version {hello.version}, we speak {VERSION}")
        if hello.card is not None:
            self._whereabouts.learn(hello.card, proven)
        num_connections = sum(other.member.id == proven.member.id for other in self._connections.values())
        if num_connections >= MAX_CONNECTIONS_PER_MEMBER:
            raise PeerBusy(f"{num_connections} connections of {proven.member}, limit {MAX_CONNECTIONS_PER_MEMBER}")
        return proven, Welcome(self.gate.passport.invitation, self._whereabouts.own)

    def on_connected(self, transport: asyncio.Transport, proven: Proven) -> None:
        """A connection with a member stands."""
        self._connections[transport] = proven
        self.roll.meet(proven)

    def refusal(self, error: SwarmError, process: bytes, hello: Hello | None) -> Refused:
        """How to tell a peer that it was refused: with the proof, where it was revoked."""
        statement = b""
        if isinstance(error, InvitationRevoked) and hello is not None:
            proven = read_passport(Passport(process=process, invitation=hello.invitation), self.gate.authority)
            found = self.gate.revocations.find(proven.member)
            statement = b"" if found is None else encode_revocations([found])
        return Refused(error_to_wire(error), statement)

    def _proven(self, peer_id: str) -> Proven | None:
        link = self._links.live(peer_id)
        if link is not None:
            return link.proven
        return next((proven for proven in self._connections.values() if proven.peer_id == peer_id), None)

    # --- who is out ---

    def _sweep(self) -> None:
        """Part from members who are none any more, ourselves included, and forget connections that are over."""
        now = time.time()
        if not self.gate.is_good(self.gate.member, now):
            self.denied.set()
        for transport, proven in list(self._connections.items()):
            if transport.is_closing():
                del self._connections[transport]
            elif not self.gate.is_good(proven.member, now):
                del self._connections[transport]
                self._expel(transport, proven, now)

    def _expel(self, transport: asyncio.Transport, proven: Proven, now: float) -> None:
        """Let whoever uses a connection say goodbye, then cut it."""
        log.warning("%s, peer %s, is out", proven.member, proven.peer_id)
        try:
            self.gate.check(proven, now)
        except AccessDenied as error:
            for listener in self._expelled:
                listener(proven.peer_id, error)
        asyncio.get_running_loop().call_later(FAREWELL_S, transport.abort)
