"""A peer of the swarm: an underlay and a DHT node in our own event loop, kept joined whatever happens.

    Node.start --> Underlay <-- Dht (hivemind's DHTNode)      registry: dht_store, dht_get
                      ^ ^---------- raw streams               transport: open_stream_protocol
                      |
               supervisors: keep the underlay working, and join the swarm again when peers are missing

It knows nothing of messages, models or records: that is the business of transport/ and registry.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from swarm.errors import ConfigError, InvalidRequest, PeerError, PeerTimeout, PeerUnreachable, SwarmIsPrivate
from swarm.identity import Identity
from swarm.network.addresses import PeerAddress
from swarm.network.config import NodeConfig, load_identity
from swarm.network.dht import Dht
from swarm.network.dialler import is_private
from swarm.network.hive import PeerID
from swarm.network.libp2p import Libp2p
from swarm.network.listener import Entrance
from swarm.network.members import MemberNetwork
from swarm.network.relay_book import RelayBook
from swarm.network.tasks import TaskSet
from swarm.network.underlay import Expelled, StreamFactory
from swarm.private.certificates import Member
from swarm.private.revocations import Revocation

__all__ = ["Node", "NodeConfig"]

log = logging.getLogger(__name__)

StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]

WATCH_PERIOD_S = 2.0
"""How often the supervisor looks at the routing table."""
GREET_PERIOD_S = 10.0
"""How often the initial peers are pinged, so that they know us again after a restart of theirs."""
FORGET_PERIOD_S = 0.5
DHT_TIMEOUT_S = 15.0
PROBE_TIMEOUT_S = 3.0


class Node:
    """A started peer. Use `Node.start`, and `close` or `async with` to end it."""

    def __init__(self, config: NodeConfig, identity: Identity, underlay: Libp2p | MemberNetwork) -> None:
        self.config = config
        self.identity = identity
        self.relays = RelayBook()
        """Through whom peers are reached that nobody can connect to, as far as we have heard."""
        self._underlay = underlay
        self._initial_peers = tuple(
            PeerAddress.parse(text, is_private=underlay.is_private) for text in _initial_peers(config)
        )
        self._tasks = TaskSet()
        self._presenting = asyncio.Lock()
        self._dht: Dht

    @classmethod
    async def start(cls, config: NodeConfig) -> "Node":
        """Listen, and join the initial peers.

        Raises:
            ConfigError: bad identity file, address or port, port in use, or a clock more than 3 s off.
            PeerUnreachable: when there are initial peers and none answers.
            AccessDenied: the swarm is private, and we are no member, or no member any more.
        """
        identity = load_identity(config)
        for text in _initial_peers(config):
            PeerAddress.parse(text, is_private=config.credentials is not None)
        underlay: Libp2p | MemberNetwork
        if config.credentials is None:
            underlay = Libp2p(config, identity)
        else:
            underlay = MemberNetwork(config, config.credentials, identity)
        node = cls(config, identity, underlay)
        try:
            await node._open()
        except BaseException:
            await node.close()
            raise
        return node

    @property
    def peer_id(self) -> str:
        """Our base58 identity."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Full addresses under which others may dial us."""
        return self._underlay.endpoints

    @property
    def listening(self) -> tuple[str, ...]:
        """Full addresses at which neighbours find us even where nobody else can connect to us."""
        return self._underlay.listening

    @property
    def entrance(self) -> Entrance | None:
        """Where others connect to open raw streams; None in an open swarm, where libp2p brings them."""
        return self._underlay.entrance

    async def present(self, announce: Sequence[str] = (), *, is_hidden: bool = False) -> None:
        """Announce other addresses from now on, or that nobody can connect to us.

        What is connected stays, but for raw streams in an open swarm. Who is hidden leaves the DHT's tables.

        Args:
            announce: hosts, in place of those found.
            is_hidden: whether nobody can connect to us.

        Raises:
            PeerTimeout: the daemon does not answer.
        """
        async with self._presenting:
            known: tuple[str, ...] = ()
            num_restarts = self.num_restarts
            with suppress(PeerTimeout):  # the daemon is being replaced
                known = await self.known_addresses()
            await self._dht.take_part(is_hidden=is_hidden)
            await self._underlay.present(announce, is_hidden=is_hidden)
            if self.num_restarts > num_restarts and not self._initial_peers:  # else nobody is left whom we could ask
                peers = [PeerAddress.parse(address) for address in random.sample(known, min(8, len(known)))]
                await self._dht.join(peers, timeout_s=5.0)

    @property
    def is_private(self) -> bool:
        """Whether this is a private swarm. There, raw streams are direct TLS connections, as quick as any other."""
        return self._underlay.is_private

    @property
    def num_restarts(self) -> int:
        """How often the underlay had to be replaced."""
        return self._underlay.num_restarts

    @property
    def num_peers(self) -> int:
        """Peers in the DHT's routing table."""
        return self._dht.num_peers

    def knows(self, peer_id: str) -> bool:
        """Whether a peer is in the DHT's routing table."""
        return self._dht.knows(PeerID.from_base58(peer_id))

    @property
    def daemon_pid(self) -> int:
        """Process id of the libp2p daemon at present; only open swarms have one."""
        assert isinstance(self._underlay, Libp2p), "a private swarm has no daemon"
        return self._underlay.daemon_pid

    def account_of(self, peer_id: str) -> str:
        """Who is charged for what a peer does: itself, or in a private swarm the member whose process it is."""
        return self._underlay.account_of(peer_id)

    @property
    def denied(self) -> asyncio.Event:
        """Set when we belong to the swarm no more; `check_access` says why."""
        return self._underlay.denied

    def check_access(self) -> None:
        """Whether we belong to the swarm still.

        Raises:
            AccessDenied: our invitation has expired or was revoked.
        """
        self._underlay.check_access()

    def check_may_announce(self) -> None:
        """Whether we may store records.

        Raises:
            AccessDenied: our invitation has expired, was revoked, or is one for clients.
        """
        self._underlay.check_may_announce()

    async def members(self) -> list[Member]:
        """Members of our private swarm whom those we know have met; for admins.

        Raises:
            InvalidRequest: the swarm is open.
        """
        return await self._members.roll.members()

    async def revoke(self, statements: Sequence[Revocation], timeout_s: float = 10.0) -> int:
        """Tell our private swarm whose invitations are revoked; how many peers have confirmed it in time.

        Raises:
            InvalidRequest: the swarm is open. PeerMisbehaved: who has signed that may not.
        """
        return await self._members.news.revoke(statements, timeout_s)

    @property
    def _members(self) -> MemberNetwork:
        if not isinstance(self._underlay, MemberNetwork):
            raise InvalidRequest("an open swarm has no members")
        return self._underlay

    def on_expelled(self, listener: Expelled) -> None:
        """Call `listener(peer_id, error)` when a peer is a member no more; its connections end a second later."""
        self._underlay.on_expelled(listener)

    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        """Store `value` (at most 1 KiB), signed, under `key` and `subkey`, which must be our own peer id.

        Args:
            expires_at: unix time, at most one hour from now.

        Returns:
            Whether any node stored it; False for a value no newer than the one stored.

        Raises:
            AccessDenied: we may not announce anything in this private swarm.
        """
        self.check_may_announce()
        return await self._dht.store(key, subkey, value, expires_at, timeout_s=DHT_TIMEOUT_S)

    async def dht_get(self, key: str) -> dict[str, bytes]:
        """The values under `key` by the peer that signed them."""
        return (await self.dht_get_many([key]))[key]

    async def dht_get_many(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        """`dht_get` of several keys in one search; those that could not be read are left out.

        Raises:
            PeerTimeout: when none could be read.
            AccessDenied: we are no member of this private swarm any more.
        """
        self.check_access()
        found = await self._dht.get(keys, timeout_s=DHT_TIMEOUT_S)
        if keys and not found:
            raise PeerTimeout(f"the DHT does not answer: nobody of {self.num_peers} known peers has said what it keeps")
        return found

    async def add_stream_handler(self, name: str, handler: StreamHandler) -> None:
        """Serve raw streams of `name`: a supervised task for each, after which the stream is closed."""

        def make_protocol(peer_id: str) -> asyncio.Protocol:
            reader = asyncio.StreamReader(limit=1 << 16)
            return _ServedStream(
                reader, lambda writer: self._tasks.spawn(_serve(handler, reader, writer, peer_id), name=name)
            )

        await self.add_stream_protocol(name, make_protocol)

    async def add_stream_protocol(self, name: str, factory: StreamFactory) -> None:
        """Serve raw streams of `name` with the asyncio protocols that `factory(peer_id)` makes."""
        await self._underlay.add_stream_factory(name, factory)

    async def remove_stream_handler(self, name: str) -> None:
        """Stop serving raw streams of `name`; those that are open stay."""
        await self._underlay.remove_stream_factory(name)

    async def open_stream(
        self, peer_id: str, name: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw stream to a peer's handler. Errors as `open_stream_protocol`."""
        reader = asyncio.StreamReader(limit=1 << 16)
        protocol = _ServedStream(reader, lambda writer: None)
        await self.open_stream_protocol(peer_id, name, protocol, timeout_s=timeout_s)
        return reader, protocol.writer

    async def open_stream_protocol(
        self, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float
    ) -> None:
        """Open a raw stream to a peer and hand it to `protocol`.

        Raises:
            PeerUnreachable: when the peer can't be reached or does not serve `name`. PeerTimeout: after `timeout_s`
            seconds. AccessDenied: when we are no member of this private swarm any more.
        """
        await self._underlay.open_stream(peer_id, name, protocol, timeout_s=timeout_s)

    async def open_stream_on(
        self, pipe: socket.socket, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float
    ) -> None:
        """Open a raw stream to a member over a socket that leads to it somehow. Errors as `open_stream_protocol`."""
        await self._members.open_stream_on(pipe, peer_id, name, protocol, timeout_s=timeout_s)

    async def take_stream_on(
        self, pipe: socket.socket, peer_id: str, name: str, factory: StreamFactory, *, timeout_s: float
    ) -> None:
        """Be at the other end of that, if `peer_id` comes, and for that.

        Raises:
            OSError, TimeoutError: nobody comes.
        """
        await self._members.take_stream_on(pipe, peer_id, name, factory, timeout_s=timeout_s)

    async def known_addresses(self) -> tuple[str, ...]:
        """Full addresses of the peers that we have a connection to: other ways into the same swarm.

        Raises:
            PeerTimeout: the daemon does not answer.
        """
        return tuple(await self._underlay.list_addresses())

    async def connected_peers(self) -> tuple[str, ...]:
        """Ids of these peers.

        Raises:
            PeerTimeout: the daemon does not answer.
        """
        return tuple(await self._underlay.list_peers())

    async def connect(self, address: str, *, timeout_s: float = 5.0) -> None:
        """Make sure that there is a connection to the peer at a full address.

        Raises:
            PeerUnreachable: when it can't be reached in time. AccessDenied: when we are not let in.
        """
        peer = PeerAddress.parse(address, is_private=self.is_private)
        try:
            await self._underlay.connect(peer, timeout_s=timeout_s)
        except PeerError as error:
            raise PeerUnreachable(f"can't connect to {address}: {error}", peer_id=peer.peer_id) from error

    async def close(self) -> None:
        """Stop answering, end all connections. Returns within about 3 s."""
        await self._tasks.close()
        if hasattr(self, "_dht"):
            self._dht.close()
        await self._underlay.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        kind = "private" if self.is_private else f"{self.num_restarts} daemon restarts"
        return f"<Node {self.peer_id} | {self.num_peers} peers | {kind}>"

    # --- start, and the supervisor ---

    async def _open(self) -> None:
        await self._underlay.start()
        self._dht = await Dht.create(self._underlay, self.peer_id, client_mode=self.config.client_mode)
        if self._initial_peers:
            failures = await self._dht.join(self._initial_peers, timeout_s=self.config.join_timeout_s, strict=True)
            if len(failures) == len(self._initial_peers):
                await self._refuse_private()
                reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
                raise PeerUnreachable(f"none of {len(failures)} initial peers answered: {reasons}")
        self._tasks.spawn(self._underlay.supervise(self._rejoin), name="supervisor of the underlay")
        self._tasks.spawn(self._keep_joined(), name="supervisor of the routing table")
        if isinstance(self._underlay, MemberNetwork):
            self._tasks.spawn(
                self._forget_revoked(self._underlay.news.has_news), name="forget records of revoked members"
            )

    async def _refuse_private(self) -> None:
        """Nobody answered: perhaps because the swarm is private, and we have no invitation.

        Raises:
            SwarmIsPrivate: so it is.
        """
        if self.is_private:
            return
        for peer in self._initial_peers:
            with suppress(ConfigError):
                if await is_private(peer.endpoint, PROBE_TIMEOUT_S):
                    raise SwarmIsPrivate(
                        f"{peer.text} belongs to a private swarm: name the file of your invitation with --credentials"
                    )

    async def _rejoin(self) -> None:
        """All connections were lost."""
        await self._dht.join(self._initial_peers, timeout_s=self.config.join_timeout_s)

    async def _keep_joined(self) -> None:
        """Join the initial peers again whenever one is missing, and greet them now and then."""
        loop = asyncio.get_running_loop()
        greeted = loop.time()
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            if not self._underlay.is_up:
                continue
            missing = [peer for peer in self._initial_peers if not self._dht.has_joined(peer)]
            is_due = loop.time() - greeted > GREET_PERIOD_S
            if self._dht.num_peers == 0:
                await self._join_anyone(missing)
            elif is_due:
                await self._dht.join(
                    random.sample(self._initial_peers, min(4, len(self._initial_peers))), timeout_s=5.0
                )
            if is_due:
                self._dht.drop_invalid()
                greeted = loop.time()
            await self._dht.ask_silent()

    async def _forget_revoked(self, has_news: asyncio.Event) -> None:
        """Drop records of members when they are revoked, at most once in a while, however many that are."""
        while True:
            await has_news.wait()
            has_news.clear()
            self._dht.drop_invalid()
            await asyncio.sleep(FORGET_PERIOD_S)

    async def _join_anyone(self, initial_peers: list[PeerAddress]) -> None:
        """The routing table is empty: try the initial peers, and whoever still has a connection with us."""
        await self._dht.join(initial_peers, timeout_s=5.0)
        if self._dht.num_peers == 0:
            try:
                connected = await self._underlay.list_peers()
            except PeerTimeout:
                return
            asked = random.sample(connected, min(8, len(connected)))
            await asyncio.gather(*(self._dht.ping(PeerID.from_base58(peer_id)) for peer_id in asked))


class _ServedStream(asyncio.StreamReaderProtocol):
    """Turns a raw stream into a reader and a writer."""

    writer: asyncio.StreamWriter

    def __init__(self, reader: asyncio.StreamReader, on_open: Callable[[asyncio.StreamWriter], Any]) -> None:
        super().__init__(reader)
        self._stream = reader
        self._on_open = on_open

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self.writer = asyncio.StreamWriter(transport, self, self._stream, loop)  # type: ignore[arg-type]
        self._on_open(self.writer)


async def _serve(
    handler: StreamHandler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer_id: str
) -> None:
    try:
        await handler(reader, writer, peer_id)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        log.debug("stream from %s ended: %r", peer_id, error)
    finally:
        writer.close()


def _initial_peers(config: NodeConfig) -> tuple[str, ...]:
    """As configured, or as the invitation says."""
    if config.initial_peers or config.credentials is None:
        return config.initial_peers
    return config.credentials.peers
