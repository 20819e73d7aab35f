"""Message streams to peers: over a direct TLS connection where there is a way, else over a p2p stream or a relay.

    open(peer, service) --> a live connection, or dial --> Connection.open_stream --> Stream
        dial direct: ask for an offer over p2p --> direct.dial --> HELLO with the ticket
        dial p2p:    Node.open_stream_protocol --> HELLO
        dial relay:  for a peer that nobody can connect to: it connects to us, or Detours --> HELLO with the ticket
    incoming connection --HELLO--> known peer --OPEN--> serve()'s handler(stream), one supervised task each

One connection carries all streams of a peer, in both directions. This module knows nothing of models, blocks or
messages.
"""

import asyncio
import logging
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Self

from swarm.errors import (
    AccessDenied,
    ConfigError,
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    SwarmError,
)
from swarm.network import Node
from swarm.network.daemon import resolve_host
from swarm.network.listener import Entrance
from swarm.network.tasks import TaskSet
from swarm.protocol import CIRCUIT_SERVICE, OFFER_SERVICE, PROTOCOL_VERSION, Message
from swarm.rates import Rates
from swarm.transport.circuit_ends import MemberEnds, PinnedEnds, Redeem
from swarm.transport.circuits import Circuits, Ends
from swarm.transport.connection import Connection
from swarm.transport.direct import DirectListener
from swarm.transport.frames import MAX_SERVICE_BYTES
from swarm.transport.limits import Budget, Limits, Traffic
from swarm.transport.mux import Mux
from swarm.transport.offers import OFFER_STREAM, OfferDesk
from swarm.transport.places import make_place
from swarm.transport.stream import EndOfStream, Stream
from swarm.transport.ways import DIRECT_TIMEOUT_S, MUX_STREAM, Carrier, Ways

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]

RELAY_SILENCE_S = 20.0
"""How long the peer behind a relay may be silent: its answers may wait behind much else. The relay has less time."""


class Transport:
    """Opens streams to peers and serves theirs.

    Args:
        node: our identity and p2p streams.
        listen: host and port (0: any) for direct connections; None offers p2p only. A private swarm's p2p streams are
            direct connections, so there nothing else is listened on.
        announce_hosts: addresses under which peers may try us; by default those of the node.
        limits: what peers may take from us.
        version: protocol version that we speak.
    """

    def __init__(
        self,
        node: Node,
        *,
        listen: tuple[str, int] | None = None,
        announce_hosts: Sequence[str] | None = None,
        limits: Limits | None = None,
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self.limits = limits or Limits()
        self.node = node
        self.traffic = Traffic()
        self.is_reachable = False
        """Whether others are known to be able to connect to us: then peers that can't be reached are asked to."""
        self.look_up: Callable[[str], Awaitable[object]] | None = None
        """Has `node.relays` learn of a peer of which nothing was heard."""
        self.on_reached: Callable[[str], object] = lambda host: None
        """Called with the address of whoever has connected to us directly ..."""
        self.on_silence: Callable[[], object] = lambda: None
        """... and when one of them was silent for so long that it was given up."""
        self._version = version
        self._listen = None if node.is_private else listen
        self._announce_hosts = _resolved(announce_hosts)
        self._budget = Budget(self.limits.max_total_buffered_bytes)
        self._services: dict[str, Handler] = {}
        self._served: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        """Tasks that serve streams, by service."""
        self._stopped: dict[str, SwarmError] = {}
        """Services that are served no more, and why."""
        self._is_relay: Callable[[str], bool] = lambda peer_id: False
        self._circuits = Circuits(
            self._make_ends(),
            is_relay=lambda peer_id: self._is_relay(peer_id),
            dial=lambda peer_id: self._ways.dial(peer_id, "direct", DIRECT_TIMEOUT_S),
            timeout_s=self.limits.hello_timeout_s,
        )
        self._connections: set[Connection] = set()
        self._leaving: weakref.WeakSet[Connection] = weakref.WeakSet()  # over, but perhaps not let go by the peer yet
        self._by_peer: dict[str, list[Connection]] = {}
        self._handling: Counter[str] = Counter()
        """Streams that are served, of each account."""
        self._opens = Rates(self.limits.open_rate)
        self._desk: OfferDesk
        self._listener: DirectListener | None = None
        self._tasks = TaskSet()
        self._is_closed = False
        self._ways = Ways(self, self._circuits, self._tasks, version=version)

    async def start(self) -> None:
        """Listen for direct connections and p2p streams.

        Raises:
            ConfigError: when the address for direct connections can't be used.
        """
        if self._listen is not None:
            listener = DirectListener(
                lambda: self._accept("direct", "", lambda ticket: self._desk.redeem(ticket)),
                may_accept=self._make_room,
                handshake_timeout_s=self.limits.hello_timeout_s,
                max_handshakes=self.limits.max_pending_connections,
            )
            listener.start(*self._listen)
            self._listener = listener
        self.node.on_expelled(self._expel)
        carrier = "direct" if self.node.is_private else "p2p"  # where raw streams are TLS connections of their own
        await self.node.add_stream_protocol(MUX_STREAM, lambda peer_id: self._accept(carrier, peer_id))
        self._desk = OfferDesk(
            self.node,
            self._listener,
            announce_hosts=self._announce_hosts,
            has_room=self._has_room,
            version=self._version,
            timeout_s=self.limits.hello_timeout_s,
            rate=self.limits.offer_rate,
        )
        await self.node.add_stream_handler(OFFER_STREAM, self._desk.answer)
        if not self.node.is_private:
            self.serve(OFFER_SERVICE, self._desk.serve)

    def announce(self, hosts: Sequence[str] | None) -> None:
        """From now on have peers try us under these addresses; None for those of the node."""
        self._desk.announce_hosts = _resolved(hosts)

    def serve(self, service: str, handler: Handler) -> None:
        """Call `handler(stream)` for each stream that a peer opens to `service`.

        When it returns, the stream is finished; a SwarmError that it raises is sent to the peer; any other error
        is logged, and the peer learns only that there was one.
        """
        if not 1 <= len(service.encode()) <= MAX_SERVICE_BYTES:
            raise ConfigError(f"name of service {service!r} must have 1 to {MAX_SERVICE_BYTES} bytes")
        self._services[service] = handler
        self._stopped.pop(service, None)

    async def stop_serving(self, service: str, error: SwarmError) -> None:
        """End all streams to a service, and refuse new ones; their peers are told `error`."""
        self._services.pop(service, None)
        self._stopped[service] = error
        tasks = list(self._served[service])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def open(self, peer_id: str, service: str, *, timeout_s: float, carrier: Carrier = "auto") -> Stream:
        """Open a stream to a peer's service, over a connection that exists or a new one.

        Args:
            timeout_s: deadline for the connection, in seconds. That the service is missing shows at `receive`.
            carrier: "direct", "p2p" (direct in a private swarm), "relay", or whichever works, direct ones first.

        Raises:
            PeerUnreachable, PeerTimeout, PeerBusy: no connection. RelaysBusy: none for now. ProtocolMismatch: the peer
            speaks another version.
        """
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._ways.connect(peer_id, carrier, timeout_s)
        except TimeoutError as error:
            raise PeerTimeout(f"no connection to {peer_id} within {timeout_s:g} s", peer_id=peer_id) from error
        return connection.open_stream(service)

    async def call(
        self, peer_id: str, service: str, message: Message, *, timeout_s: float, carrier: Carrier = "auto"
    ) -> Message:
        """Open a stream, send one message, return the answer, close. Errors as `open` and `Stream.receive`."""
        try:
            async with asyncio.timeout(timeout_s):
                async with await self.open(peer_id, service, timeout_s=timeout_s, carrier=carrier) as stream:
                    await stream.send(message)
                    answer, _ = await stream.receive()
                    return answer
        except TimeoutError as error:
            raise PeerTimeout(f"no answer from {peer_id} within {timeout_s:g} s", peer_id=peer_id) from error
        except EndOfStream as error:
            raise PeerMisbehaved(f"{peer_id} finished {service} without an answer", peer_id=peer_id) from error

    def rtt_s(self, peer_id: str) -> float | None:
        """The last measured round trip to a connected peer in seconds."""
        return next((c.rtt_s for c in self._by_peer.get(peer_id, ()) if c.rtt_s is not None), None)

    def round_trips(self) -> dict[str, float]:
        """The last measured round trips, in seconds, to the peers that we connected to."""
        return {
            peer_id: connection.rtt_s
            for peer_id, connections in self._by_peer.items()
            for connection in connections
            if connection.rtt_s is not None and not isinstance(connection, _Accepted)
        }

    @property
    def entrance(self) -> Entrance | None:
        """Where direct connections come in, if we take any."""
        if self._listener is None:
            return self.node.entrance
        return Entrance(port=self._listener.port, fingerprint=self._listener.certificate.fingerprint)

    @property
    def peer_id(self) -> str:
        """Our base58 identity."""
        return self.node.peer_id

    def take_circuits(self, is_relay: Callable[[str], bool]) -> None:
        """Take connections that come through relays.

        Args:
            is_relay: whether a peer is one that we have asked to be our relay.
        """
        self._is_relay = is_relay
        self.serve(CIRCUIT_SERVICE, self._circuits.answer)

    @property
    def num_connections(self) -> int:
        """Connections of all carriers."""
        return len(self._connections)

    async def close(self) -> None:
        """Take no more connections, end the handlers, close all connections."""
        self._is_closed = True
        await self.node.remove_stream_handler(MUX_STREAM)
        await self.node.remove_stream_handler(OFFER_STREAM)
        if self._listener is not None:
            await self._listener.close()
        await self._tasks.close()
        for connection in list(self._connections):
            connection.close(PeerDisconnected(f"{self.node.peer_id} is shutting down"))
        await self._circuits.close()
        await asyncio.gather(*(connection.wait_gone() for connection in list(self._leaving)))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Transport {len(self._connections)} connections | {self._handling.total()} streams served>"

    # --- making connections ---

    def distance_s(self, peer_id: str) -> float:
        """See `swarm.transport.ways`."""
        connections = [it for it in self._by_peer.get(peer_id, ()) if it.is_greeted and not it.is_closed]
        return min((it.rtt_s or 0.0 for it in connections), default=float("inf"))

    async def greet(self, connection: Connection) -> Connection:
        """See `swarm.transport.ways`."""
        if self._is_closed:  # while it was being made
            error = PeerDisconnected(f"{self.node.peer_id} is shutting down")
            connection.close(error)
            raise error
        self._add(connection)
        connection.start()
        try:
            await connection.wait_greeted()
        except BaseException:
            connection.close(PeerDisconnected("gave up waiting for HELLO"))
            raise
        return connection

    def make(self, carrier: str, peer_id: str, *, ticket: bytes = b"") -> Connection:
        """See `swarm.transport.ways`."""

        def make_mux(now: float) -> Mux:
            return Mux(
                is_dialler=True,
                limits=self._limits_of(carrier),
                now=now,
                budget=self._budget,
                ticket=ticket,
                version=self._version,
            )

        return Connection(self, carrier, make_mux, self._limits_of(carrier), peer_id=peer_id)

    def _limits_of(self, carrier: str) -> Limits:
        if carrier != "relay":
            return self.limits
        return replace(self.limits, silence_timeout_s=max(self.limits.silence_timeout_s, RELAY_SILENCE_S))

    def is_connected(self, peer_id: str) -> bool:
        """See `swarm.transport.ways`."""
        return peer_id in self._by_peer

    def live(self, peer_id: str, carrier: str) -> Connection | None:
        """See `swarm.transport.ways`."""
        for connection in self._by_peer.get(peer_id, ()):
            if connection.carrier == carrier and connection.is_greeted and not connection.is_closed:
                return connection
        return None

    def _make_ends(self) -> Ends:
        timeout_s = self.limits.hello_timeout_s
        if self.node.is_private:
            return MemberEnds(self.node, MUX_STREAM, lambda peer_id: self._accept("relay", peer_id), timeout_s)
        return PinnedEnds(self.node.identity, lambda redeem: self._accept("relay", "", redeem), timeout_s)

    # --- taking connections ---

    def _accept(self, carrier: str, peer_id: str, redeem: Redeem | None = None) -> Connection:
        connection = _Accepted(self, carrier, peer_id, redeem, has_room=self._make_room(peer_id))
        self._connections.add(connection)
        return connection

    def _has_room(self) -> bool:
        """Whether one more connection would be taken, perhaps in the place of another."""
        return self._place() is not None

    def _make_room(self, peer_id: str = "") -> bool:
        """Whether one more connection can be taken, now that who needs its place least has left, if that was needed."""
        leaving = self._place(peer_id)
        for connection in leaving or ():
            connection.close(PeerBusy("no room for more connections", retry_after_s=5.0))
        return leaving is not None

    def _place(self, peer_id: str = "") -> tuple[Connection, ...] | None:
        """Whose place one more connection would take, nobody's where there is room; None when it must stay out."""
        if self._is_closed:
            return None
        try:
            leaving = make_place(self._connections, peer_id, self.limits, time.monotonic())
        except PeerBusy:
            return None
        return () if leaving is None else (leaving,)

    def _expel(self, peer_id: str, error: AccessDenied) -> None:
        """A peer is a member of this private swarm no more."""
        for connection in list(self._by_peer.get(peer_id, ())):
            connection.close(error)

    def on_greeted(self, connection: Connection, ticket: bytes) -> None:
        """A peer has said HELLO: unless that is known, its ticket tells who it is."""
        if not isinstance(connection, _Accepted):
            return
        if connection.redeem is not None:
            owner = connection.redeem(ticket)
            if owner is None:
                raise PeerMisbehaved("HELLO with a ticket that is unknown, used or expired")
            connection.peer_id = owner
        connection.account = self.node.account_of(connection.peer_id)
        if self._is_closed or len(self._by_peer.get(connection.peer_id, ())) >= self.limits.max_connections_per_peer:
            raise PeerBusy(f"limit of {self.limits.max_connections_per_peer} connections per peer", retry_after_s=5.0)
        self._add(connection)
        self._ways.came(connection.peer_id)
        if (host := connection.remote_host) is not None:
            self.on_reached(host)

    def on_opened(self, connection: Connection, stream: Stream) -> None:
        """A peer has opened a stream: check the limits, start the handler."""
        handler = self._services.get(stream.service)
        if (error := self._stopped.get(stream.service)) is not None:
            raise error
        if handler is None:
            raise InvalidRequest(f"{self.node.peer_id} does not serve {stream.service!r}")
        limits, account = self.limits, connection.account
        num_streams = max(self._handling[account], connection.num_peer_streams - 1)
        if num_streams >= limits.max_streams_per_peer:
            raise PeerBusy(f"{num_streams} streams are open, limit {limits.max_streams_per_peer} per peer")
        if self._handling.total() >= limits.max_streams:
            raise PeerBusy(f"limit of {limits.max_streams} streams")
        if not self._opens.charge(account, self._now):
            raise PeerBusy(
                f"over {limits.open_rate.per_s:g} new streams per second",
                retry_after_s=self._opens.retry_after_s(account, self._now),
            )
        task = self._tasks.spawn(self._handle(handler, stream), name=f"{stream.service} for {stream.peer_id}")
        served = self._served[stream.service]
        served.add(task)
        task.add_done_callback(served.discard)

    def on_closed(self, connection: Connection) -> None:
        """A connection is over."""
        self._connections.discard(connection)
        self._leaving.add(connection)
        connections = self._by_peer.get(connection.peer_id, [])
        if connection in connections:
            connections.remove(connection)
        if not connections:
            self._by_peer.pop(connection.peer_id, None)
        is_reached = isinstance(connection, _Accepted) and connection.carrier == "direct" and connection.is_greeted
        if is_reached and isinstance(connection.error, PeerTimeout):
            self.on_silence()

    def _add(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._by_peer.setdefault(connection.peer_id, []).append(connection)

    async def _handle(self, handler: Handler, stream: Stream) -> None:
        """Run one stream's handler; one of the two outermost loops, so it catches everything."""
        self._handling[stream.account] += 1
        try:
            await handler(stream)
            await stream.close()
        except EndOfStream:
            await stream.close()
        except asyncio.CancelledError:
            is_over = PeerDisconnected(f"{self.node.peer_id} is shutting down")
            await stream.abort(self._stopped.get(stream.service, is_over))
            raise
        except SwarmError as error:
            await stream.abort(error)
        except Exception:
            log.exception("handler of %s failed", stream.service)
            await stream.abort(PeerError("internal error"))
        finally:
            self._handling[stream.account] -= 1
            if not self._handling[stream.account]:
                del self._handling[stream.account]

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _resolved(hosts: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if hosts is None else tuple(str(resolve_host(host)) for host in hosts)


class _Accepted(Connection):
    """A connection that a peer has made: it says HELLO as soon as the carrier is up."""

    is_ours = False

    def __init__(self, owner: Transport, carrier: str, peer_id: str, redeem: Redeem | None, *, has_room: bool) -> None:
        def make_mux(now: float) -> Mux:
            return Mux(is_dialler=False, limits=limits, now=now, budget=owner._budget, version=owner._version)

        limits = owner._limits_of(carrier)
        super().__init__(owner, carrier, make_mux, limits, peer_id=peer_id)
        self.redeem = redeem
        """Who a ticket proves the peer to be; None where that is known."""
        self._has_room = has_room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.start()
        if not self._has_room:
            self.close(PeerBusy("no room for more connections", retry_after_s=5.0))
