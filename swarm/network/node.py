"""A peer of the swarm: the libp2p daemon and the DHT node in our own event loop, kept alive whatever happens to them.

    Node.start --> Daemon (p2pd) <-- DaemonControl <-- Dht (hivemind's DHTNode)   registry: dht_store, dht_get
                      ^                     ^-------- raw streams                 transport: open_stream_protocol
                      |
               supervisor: restarts a daemon that died or hangs, re-registers its handlers, joins the swarm again when
                           peers are missing

It knows nothing of messages, models or records: that is the business of transport/ and registry.
"""

import asyncio
import logging
import random
import shutil
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from swarm.errors import ConfigError, PeerTimeout, PeerUnreachable
from swarm.identity import Identity
from swarm.network.config import NodeConfig, listen_addresses, load_identity
from swarm.network.control import DaemonControl, StreamFactory
from swarm.network.daemon import Daemon, DaemonSettings, make_directory
from swarm.network.dht import Dht, PeerAddress
from swarm.network.hive import P2PDaemonError, PeerID
from swarm.network.tasks import TaskSet

__all__ = ["Node", "NodeConfig"]

log = logging.getLogger(__name__)

StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]

WATCH_PERIOD_S = 2.0
"""How often the supervisor looks at the daemon and the routing table."""
GREET_PERIOD_S = 10.0
"""How often the initial peers are pinged, so that they know us again after a restart of theirs."""
HANG_TIMEOUT_S = 8.0
"""A daemon that answers no question for so long is replaced."""
ISOLATION_TIMEOUT_S = 60.0
"""A daemon without a connection for so long is replaced: libp2p waits ever longer (to 5 min) between its dials."""
DHT_TIMEOUT_S = 15.0
MAX_UNARY_BYTES = 4 << 20


class Node:
    """A started peer. Use `Node.start`, and `close` or `async with` to end it."""

    def __init__(self, config: NodeConfig, identity: Identity, settings: DaemonSettings) -> None:
        self.config = config
        self.identity = identity
        self.addresses: tuple[str, ...] = ()
        self.num_restarts = 0
        self._settings = settings
        self._initial_peers = tuple(PeerAddress.parse(text) for text in config.initial_peers)
        self._control = DaemonControl(
            daemon_path=settings.control_path,
            listen_path=settings.listen_path,
            max_message_bytes=settings.max_message_bytes,
        )
        self._tasks = TaskSet()
        self._daemon: Daemon
        self._dht: Dht

    @classmethod
    async def start(cls, config: NodeConfig) -> "Node":
        """Start the daemon, listen, and join the initial peers.

        Raises:
            ConfigError: bad identity file, address or port, port in use, or a clock more than 3 s off.
            PeerUnreachable: when there are initial peers and none answers.
        """
        identity = load_identity(config)
        for text in config.initial_peers:
            PeerAddress.parse(text)
        listen, announce = listen_addresses(config)
        directory = make_directory()
        try:
            identity.save(directory / "identity.key")
            settings = DaemonSettings(
                directory=directory,
                identity_path=directory / "identity.key",
                listen=listen,
                announce=announce,
                trusted_relays=config.initial_peers if config.use_relays else (),
                nat_port_map=config.nat_port_map,
                max_message_bytes=MAX_UNARY_BYTES,
            )
            node = cls(config, identity, settings)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
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
    def num_peers(self) -> int:
        """Peers in the DHT's routing table."""
        return self._dht.num_peers

    def knows(self, peer_id: str) -> bool:
        """Whether a peer is in the DHT's routing table."""
        return self._dht.knows(PeerID.from_base58(peer_id))

    @property
    def daemon_pid(self) -> int:
        """Process id of the daemon at present."""
        return self._daemon.pid

    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        """Store `value` (at most 1 KiB), signed, under `key` and `subkey`, which must be our own peer id.

        Args:
            expires_at: unix time, at most one hour from now.

        Returns:
            Whether any node stored it; False for a value no newer than the one stored.
        """
        return await self._dht.store(key, subkey, value, expires_at, timeout_s=DHT_TIMEOUT_S)

    async def dht_get(self, key: str) -> dict[str, bytes]:
        """The values under `key` by the peer that signed them."""
        return (await self.dht_get_many([key]))[key]

    async def dht_get_many(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        """`dht_get` of several keys in one search.

        Raises:
            PeerTimeout: when the search does not end in time.
        """
        try:
            return await self._dht.get(keys, timeout_s=DHT_TIMEOUT_S)
        except TimeoutError as error:
            raise PeerTimeout(f"DHT search did not end within {DHT_TIMEOUT_S:g} s") from error

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
        try:
            await self._control.add_stream_factory(name, factory)
        except (P2PDaemonError, TimeoutError) as error:
            log.warning("%s will be served when the daemon is back: %s", name, error)

    async def remove_stream_handler(self, name: str) -> None:
        """Stop serving raw streams of `name`; those that are open stay."""
        try:
            await self._control.remove_stream_factory(name)
        except (P2PDaemonError, TimeoutError) as error:
            log.debug("the daemon was not told that %s is no longer served: %s", name, error)

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
            seconds.
        """
        try:
            target = PeerID.from_base58(peer_id)
        except ValueError as error:
            raise PeerUnreachable(f"{peer_id!r} is not a peer id", peer_id=peer_id) from error
        try:
            await self._control.open_stream(target, name, protocol, timeout_s=timeout_s)
        except P2PDaemonError as error:
            raise PeerUnreachable(f"can't open {name} to {peer_id}: {error}", peer_id=peer_id) from error
        except TimeoutError as error:
            raise PeerTimeout(f"{peer_id} did not accept {name} within {timeout_s:g} s", peer_id=peer_id) from error

    async def known_addresses(self) -> tuple[str, ...]:
        """Full addresses of the peers that we have a connection to: other ways into the same swarm.

        Raises:
            PeerTimeout: the daemon does not answer.
        """
        try:
            return tuple(await self._control.list_addresses())
        except (P2PDaemonError, TimeoutError) as error:
            raise PeerTimeout(f"the libp2p daemon does not say whom it knows: {error}") from error

    async def connect(self, address: str, *, timeout_s: float = 5.0) -> None:
        """Make sure that there is a connection to the peer at a full address.

        Raises:
            PeerUnreachable: when it can't be reached in time.
        """
        peer = PeerAddress.parse(address)
        try:
            await self._control.connect(peer.peer_id, [peer.address], timeout_s=timeout_s)
        except (P2PDaemonError, TimeoutError) as error:
            raise PeerUnreachable(f"can't connect to {address}: {error}", peer_id=peer.peer_id.to_base58()) from error

    async def close(self) -> None:
        """Stop answering, end the daemon, remove the sockets. Returns within about 3 s."""
        await self._tasks.close()
        if hasattr(self, "_dht"):
            self._dht.close()
        await self._control.aclose()
        if hasattr(self, "_daemon"):
            await self._daemon.stop()
        shutil.rmtree(self._settings.directory, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Node {self.peer_id} | {self.num_peers} peers | {self.num_restarts} daemon restarts>"

    # --- start, and the supervisor ---

    async def _open(self) -> None:
        try:
            self._daemon = await Daemon.start(self._settings, timeout_s=self.config.startup_timeout_s)
            await self._control.listen()
            await self._control.attach()
            await self._refresh_addresses()
        except P2PDaemonError as error:
            raise ConfigError(str(error)) from error
        self._dht = await Dht.create(self._control, self.identity, client_mode=self.config.client_mode)
        if self._initial_peers:
            failures = await self._dht.join(self._initial_peers, timeout_s=self.config.join_timeout_s, strict=True)
            if len(failures) == len(self._initial_peers):
                reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
                raise PeerUnreachable(f"none of {len(failures)} initial peers answered: {reasons}")
        self._tasks.spawn(self._supervise(), name="supervisor of the daemon")
        self._tasks.spawn(self._keep_joined(), name="supervisor of the routing table")

    async def _refresh_addresses(self) -> None:
        _, addresses = await self._control.identify()
        texts = sorted(map(str, addresses), key=lambda text: text.startswith(("/ip4/127.", "/ip6/::1/")))
        self.addresses = tuple(f"{text}/p2p/{self.peer_id}" for text in texts)

    async def _supervise(self) -> None:
        """Replace the daemon when it dies, loses our connection or hangs."""
        while True:
            ends = {
                asyncio.ensure_future(self._daemon.wait()): "died",
                asyncio.ensure_future(self._control.lost.wait()): "dropped us",
                asyncio.ensure_future(self._wait_until_hung()): "does not answer",
            }
            try:
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                log.warning("the libp2p daemon %s; starting another", ends[done.pop()])
            finally:
                for end in ends:
                    end.cancel()
            await self._restart()

    async def _wait_until_hung(self) -> None:
        """Returns when the daemon has not answered for HANG_TIMEOUT_S, or has had no peer for ISOLATION_TIMEOUT_S."""
        loop = asyncio.get_running_loop()
        silent_s = alone_s = 0.0  # counted attempt by attempt: a clock would blame the daemon when we stood still
        while silent_s < HANG_TIMEOUT_S and alone_s < ISOLATION_TIMEOUT_S:
            asked = loop.time()
            try:
                peers = await self._control.list_peers()
            except (P2PDaemonError, TimeoutError):
                silent_s += min(loop.time() - asked, self._control.timeout_s) + WATCH_PERIOD_S
            else:
                silent_s = 0.0
                alone_s = 0.0 if peers or not self._initial_peers else alone_s + WATCH_PERIOD_S
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _restart(self) -> None:
        """Start a new daemon with the same identity and port, register the handlers with it and join again."""
        pause_s = 0.1
        while True:
            self._control.detach()
            self._daemon.kill()
            await self._daemon.stop()
            try:
                self._daemon = await Daemon.start(self._settings, timeout_s=self.config.startup_timeout_s)
                await self._control.attach()
                await self._refresh_addresses()
            except (P2PDaemonError, TimeoutError) as error:
                log.error("the libp2p daemon can't be restarted: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 10.0)
            else:
                break
        self.num_restarts += 1
        await self._dht.join(self._initial_peers, timeout_s=self.config.join_timeout_s)

    async def _keep_joined(self) -> None:
        """Join the initial peers again whenever one is missing, and greet them now and then."""
        loop = asyncio.get_running_loop()
        greeted = loop.time()
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            if not self._control.attached.is_set():
                continue
            missing = [peer for peer in self._initial_peers if not self._dht.knows(peer.peer_id)]
            is_due = loop.time() - greeted > GREET_PERIOD_S
            try:
                if self._dht.num_peers == 0:
                    await self._join_anyone(missing)
                elif is_due:
                    await self._dht.join(
                        random.sample(self._initial_peers, min(4, len(self._initial_peers))), timeout_s=5.0
                    )
            except P2PDaemonError as error:
                log.debug("joining failed: %s", error)
            if is_due:
                greeted = loop.time()

    async def _join_anyone(self, initial_peers: list[PeerAddress]) -> None:
        """The routing table is empty: try the initial peers, and whoever still has a connection to our daemon."""
        await self._dht.join(initial_peers, timeout_s=5.0)
        if self._dht.num_peers == 0:
            try:
                connected = await self._control.list_peers()
            except TimeoutError:
                return
            await asyncio.gather(
                *(self._dht.ping(peer_id) for peer_id in random.sample(connected, min(8, len(connected))))
            )


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
