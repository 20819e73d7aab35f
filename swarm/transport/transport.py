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
from typing import Literal, Self

from swarm.errors import (
    AccessDenied,
    ConfigError,
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    SwarmError,
)
from swarm.network import Node
from swarm.network.daemon import resolve_host
from swarm.network.tasks import TaskSet
from swarm.protocol import CIRCUIT_SERVICE, OFFER_SERVICE, PROTOCOL_VERSION, RELAY_SERVICE, Message
from swarm.rates import Rates
from swarm.transport.circuits import Circuits, Redeem
from swarm.transport.connection import Connection
from swarm.transport.detours import Detours
from swarm.transport.direct import DirectListener, dial
from swarm.transport.frames import MAX_SERVICE_BYTES
from swarm.transport.limits import Budget, Limits, Traffic
from swarm.transport.mux import Mux
from swarm.transport.offers import OFFER_STREAM, OfferDesk, ask_offer, ask_offer_over
from swarm.transport.places import make_place
from swarm.transport.reachability import Reachability
from swarm.transport.stream import EndOfStream, Stream

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]
Carrier = Literal["auto", "direct", "p2p", "relay"]

MUX_STREAM = "/swarm/mux"
"""Name of the p2p stream that carries frames."""
GREETING_S = 1.0
"""How long the HELLO of a peer that was asked to connect to us may be on its way."""
RELAY_SILENCE_S = 20.0
"""How long the peer behind a relay may be silent: its answers may wait behind much else. The relay has less time."""
DIRECT_TIMEOUT_S = 3.0
"""Longest wait for a direct connection when a p2p stream would do."""


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
        self._version = version
        self._listen = None if node.is_private else listen
        self._announce_hosts = None if announce_hosts is None else tuple(str(resolve_host(h)) for h in announce_hosts)
        self._budget = Budget(self.limits.max_total_buffered_bytes)
        self._services: dict[str, Handler] = {}
        self._served: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        """Tasks that serve streams, by service."""
        self._stopped: dict[str, SwarmError] = {}
        """Services that are served no more, and why."""
        self._reachability = Reachability()
        self._is_relay: Callable[[str], bool] = lambda peer_id: False
        self._circuits = Circuits(
            node.identity,
            is_relay=lambda peer_id: self._is_relay(peer_id),
            accept=lambda redeem: self._accept("relay", "", redeem),
            dial=lambda peer_id: self._dial_once(peer_id, "direct", DIRECT_TIMEOUT_S),
            timeout_s=self.limits.hello_timeout_s,
        )
        self._detours = Detours(self._circuits, open_relay=self._open_relay, distance_s=self._distance_s)
        self._connections: set[Connection] = set()
        self._leaving: weakref.WeakSet[Connection] = weakref.WeakSet()  # over, but perhaps not let go by the peer yet
        self._by_peer: dict[str, list[Connection]] = {}
        self._dial_locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._handling: Counter[str] = Counter()
        """Streams that are served, of each account."""
        self._opens = Rates(self.limits.open_rate)
        self._probing: set[str] = set()
        self._awaited: dict[str, asyncio.Event] = {}
        """Peers that were asked to connect to us; set when they have."""
        self._desk: OfferDesk
        self._listener: DirectListener | None = None
        self._tasks = TaskSet()
        self._is_closed = False
        self._makers = {
            "direct": self._dial_direct,
            "p2p": self._dial_p2p,
            "relay": self._dial_relay,
            "call-back": self._wait_for_call,
        }

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
        await self.node.add_stream_protocol(MUX_STREAM, lambda peer_id: self._accept("p2p", peer_id))
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
            carrier: "direct", "p2p", "relay", or whichever works, direct ones first.

        Raises:
            PeerUnreachable, PeerTimeout, PeerBusy: no connection. ProtocolMismatch: the peer speaks another version.
        """
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connect(peer_id, carrier, timeout_s)
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
    def direct_port(self) -> int | None:
        """TCP port for direct connections."""
        return self._listener.port if self._listener is not None else None

    @property
    def fingerprint(self) -> bytes | None:
        """SHA-256 of the certificate that is shown there."""
        return self._listener.certificate.fingerprint if self._listener is not None else None

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

    async def _connect(
        self, peer_id: str, carrier: Carrier, timeout_s: float, *, may_detour: bool = True
    ) -> Connection:
        if peer_id == self.node.peer_id:
            raise InvalidRequest("a peer does not connect to itself")
        if carrier in ("auto", "direct") and (connection := self._live(peer_id, "direct")) is not None:
            return connection
        if carrier == "direct":
            return await self._dial_once(peer_id, "direct", timeout_s)
        if carrier == "auto" and may_detour and not self.node.relays.knows(peer_id) and peer_id not in self._by_peer:
            await self._learn_of(peer_id, timeout_s / 3)
        if carrier == "relay" or (carrier == "auto" and may_detour and self.node.relays.of(peer_id)):
            return await self._connect_around(peer_id, carrier, timeout_s)
        connection = self._live(peer_id, "p2p")
        if carrier == "auto" and not self.node.is_private and self._reachability.should_try(peer_id, self._now):
            if connection is None:
                connection = await self._try_direct(peer_id, min(timeout_s / 2, DIRECT_TIMEOUT_S))
            else:
                self._probe(peer_id, "direct")
        return connection or await self._dial_once(peer_id, "p2p", timeout_s)

    async def _connect_around(self, peer_id: str, carrier: Carrier, timeout_s: float) -> Connection:
        """A connection to a peer that nobody can connect to."""
        if carrier == "auto":
            for kind in ("p2p", "relay"):
                if (connection := self._live(peer_id, kind)) is not None:
                    self._probe(peer_id, "call-back" if self.is_reachable else "direct")
                    return connection
            if self.is_reachable and self._reachability.should_try(peer_id, self._now):
                direct = await self._try_direct(peer_id, min(timeout_s / 2, DIRECT_TIMEOUT_S), "call-back")
                if direct is not None:
                    return direct
        try:
            return await self._dial_once(peer_id, "relay", timeout_s)
        except PeerUnreachable:
            self.node.relays.forget(peer_id)  # perhaps it has others now, or none
            raise

    async def _learn_of(self, peer_id: str, timeout_s: float) -> None:
        """Look a peer up, so that we need not find out by waiting in vain that nobody can connect to it."""
        if self.look_up is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self.look_up(peer_id)
        except (PeerError, TimeoutError) as error:
            log.debug("%s was not looked up: %r", peer_id, error)
            return
        if not self.node.relays.knows(peer_id):
            self.node.relays.learn(peer_id, ())

    async def _open_relay(self, relay_id: str, timeout_s: float) -> Stream:
        """A stream to a relay, which must be there without another one."""
        connection = await self._connect(relay_id, "auto", timeout_s, may_detour=False)
        return connection.open_stream(RELAY_SERVICE)

    def _distance_s(self, peer_id: str) -> float:
        connections = [it for it in self._by_peer.get(peer_id, ()) if it.is_greeted and not it.is_closed]
        return min((it.rtt_s or 0.0 for it in connections), default=float("inf"))

    async def _try_direct(self, peer_id: str, timeout_s: float, kind: str = "direct") -> Connection | None:
        """A direct connection, or None; failures are remembered."""
        try:
            return await self._dial_once(peer_id, kind, timeout_s)
        except (PeerUnreachable, PeerTimeout, PeerDisconnected) as error:
            self._reachability.failed(peer_id, self._now)
            log.debug("no direct connection to %s: %s", peer_id, error)
            return None

    def _probe(self, peer_id: str, kind: str) -> None:
        """Try for a direct connection; nobody waits, since there is another one: later streams will profit."""
        if peer_id not in self._probing and self._reachability.should_try(peer_id, self._now):
            self._probing.add(peer_id)
            self._tasks.spawn(self._probe_direct(peer_id, kind), name=f"probe of {peer_id}")

    async def _probe_direct(self, peer_id: str, kind: str) -> None:
        try:
            await self._try_direct(peer_id, DIRECT_TIMEOUT_S, kind)
        except SwarmError as error:
            self._reachability.failed(peer_id, self._now)
            log.info("no direct connection to %s: %s", peer_id, error)
        finally:
            self._probing.discard(peer_id)

    async def _dial_once(self, peer_id: str, carrier: str, timeout_s: float) -> Connection:
        """Dial; whoever wants the same connection meanwhile waits for this attempt first."""
        lock = self._dial_locks.setdefault((peer_id, carrier), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout_s), lock:
                connection = self._live(peer_id, carrier)
                if connection is None:
                    connection = await self._makers[carrier](peer_id, timeout_s)
                return connection
        except TimeoutError as error:
            raise PeerTimeout(
                f"no {carrier} connection to {peer_id} within {timeout_s:g} s", peer_id=peer_id
            ) from error
        finally:
            if not lock.locked():
                self._dial_locks.pop((peer_id, carrier), None)

    async def _dial_direct(self, peer_id: str, timeout_s: float) -> Connection:
        relayed = self._live(peer_id, "relay")
        if relayed is None:
            offer = await ask_offer(self.node, peer_id, version=self._version, timeout_s=timeout_s)
        else:  # behind the same router, perhaps
            stream = relayed.open_stream(OFFER_SERVICE)
            offer = await ask_offer_over(stream, version=self._version, timeout_s=timeout_s)
        if not offer.hosts:
            raise PeerUnreachable(f"{peer_id} takes no direct connections", peer_id=peer_id)
        made: list[Connection] = []

        def make_protocol() -> Connection:
            made.append(self._make_connection("direct", peer_id, is_dialler=True, ticket=offer.ticket))
            return made[-1]

        winner: asyncio.Protocol | None = None
        try:
            _, winner = await dial(offer, make_protocol, peer_id=peer_id, timeout_s=timeout_s)
        finally:
            for connection in made:
                if connection is not winner:
                    connection.close(PeerDisconnected("not needed"))
        assert isinstance(winner, Connection)
        connection = await self._greet(winner)
        self._reachability.succeeded(peer_id)
        return connection

    async def _dial_p2p(self, peer_id: str, timeout_s: float) -> Connection:
        connection = self._make_connection("p2p", peer_id, is_dialler=True)
        try:
            await self.node.open_stream_protocol(peer_id, MUX_STREAM, connection, timeout_s=timeout_s)
        except BaseException:
            connection.close(PeerDisconnected("not needed"))
            raise
        return await self._greet(connection)

    async def _dial_relay(self, peer_id: str, timeout_s: float) -> Connection:
        made: list[Connection] = []

        def make_protocol(ticket: bytes) -> Connection:
            made.append(self._make_connection("relay", peer_id, is_dialler=True, ticket=ticket))
            return made[-1]

        winner: Connection | None = None
        try:
            await self._detours.dial(peer_id, self._relays_of(peer_id), make_protocol, timeout_s=timeout_s)
            winner = made[-1]
        finally:
            for connection in made:
                if connection is not winner:
                    connection.close(PeerDisconnected("not needed"))
        return await self._greet(winner)

    async def _wait_for_call(self, peer_id: str, timeout_s: float) -> Connection:
        """Have a peer connect to us."""
        came = self._awaited.setdefault(peer_id, asyncio.Event())
        try:
            await self._detours.call_back(peer_id, self._relays_of(peer_id), timeout_s=timeout_s)
            async with asyncio.timeout(GREETING_S):  # it says so as soon as it has our HELLO; its own may be on its way
                while (connection := self._live(peer_id, "direct")) is None:
                    came.clear()
                    await came.wait()
        except TimeoutError:
            raise PeerUnreachable(f"{peer_id} says that it has connected to us, but has not", peer_id=peer_id) from None
        finally:
            self._awaited.pop(peer_id, None)
        self._reachability.succeeded(peer_id)
        return connection

    def _relays_of(self, peer_id: str) -> tuple[str, ...]:
        """Its relays without ourselves, whom it would have connected to."""
        return tuple(it for it in self.node.relays.of(peer_id) if it not in (self.peer_id, peer_id))

    async def _greet(self, connection: Connection) -> Connection:
        """Exchange HELLOs on a connection that we made."""
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

    def _make_connection(self, carrier: str, peer_id: str, *, is_dialler: bool, ticket: bytes = b"") -> Connection:
        def make_mux(now: float) -> Mux:
            return Mux(
                is_dialler=is_dialler,
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

    def _live(self, peer_id: str, carrier: str) -> Connection | None:
        for connection in self._by_peer.get(peer_id, ()):
            if connection.carrier == carrier and connection.is_greeted and not connection.is_closed:
                return connection
        return None

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
        if (came := self._awaited.get(connection.peer_id)) is not None:
            came.set()

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
