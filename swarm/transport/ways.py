"""Which way to a peer: a connection that lives, or the best that can be made, remembering what did not work.

    connect ─► direct, live ─► relayed? ─ no ─► direct: offer, TLS ─► p2p
                                  └──── yes ─► the peer connects to us, or a relay ─► Detours
    while a slower connection is used: try for a direct one now and then, for later streams

It makes connections through its owner, and knows nothing of streams or services.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, Protocol

from swarm.errors import (
    InvalidRequest,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    RelaysBusy,
    SwarmError,
)
from swarm.network import Node
from swarm.network.tasks import TaskSet
from swarm.protocol import OFFER_SERVICE, RELAY_SERVICE
from swarm.transport.circuits import Circuits
from swarm.transport.connection import Connection
from swarm.transport.detours import Detours
from swarm.transport.direct import dial
from swarm.transport.offers import ask_offer, ask_offer_over
from swarm.transport.reachability import Reachability
from swarm.transport.stream import Stream

log = logging.getLogger(__name__)

Carrier = Literal["auto", "direct", "p2p", "relay"]

MUX_STREAM = "/swarm/mux"
"""Name of the p2p stream that carries frames."""
DIRECT_TIMEOUT_S = 3.0
"""Longest wait for a direct connection when another one would do."""
GREETING_S = 1.0
"""How long the HELLO of a peer that was asked to connect to us may be on its way."""


class Owner(Protocol):
    """Who keeps the connections."""

    node: Node
    is_reachable: bool
    """Whether others can connect to us."""
    look_up: Callable[[str], Awaitable[object]] | None
    """Has `node.relays` learn of a peer."""

    def live(self, peer_id: str, carrier: str) -> Connection | None:
        """A connection of this kind that can be used."""

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is any."""

    def distance_s(self, peer_id: str) -> float:
        """Round trip to a peer that we are connected to, else infinity."""

    def make(self, carrier: str, peer_id: str, *, ticket: bytes = b"") -> Connection:
        """A connection of ours, whose carrier is still to come."""

    async def greet(self, connection: Connection) -> Connection:
        """Exchange HELLOs on it."""


class Ways:
    """See the module.

    Args:
        owner: keeps the connections.
        circuits: the ends of connections through relays.
        tasks: runs what nobody waits for.
        version: protocol version that we speak.
    """

    def __init__(self, owner: Owner, circuits: Circuits, tasks: TaskSet, *, version: int) -> None:
        self._owner, self._tasks, self._version = owner, tasks, version
        self._reachability = Reachability()
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._probing: set[str] = set()
        self._awaited: dict[str, asyncio.Event] = {}
        """Peers that were asked to connect to us; set when they have."""
        self._detours = Detours(circuits, open_relay=self._open_relay, distance_s=owner.distance_s)
        self._makers = {
            "direct": partial(self._dial_raw, "direct") if owner.node.is_private else self._dial_direct,
            "p2p": partial(self._dial_raw, "p2p"),
            "relay": self._dial_relay,
            "call-back": self._dial_back,
        }

    def came(self, peer_id: str) -> None:
        """A peer has connected to us."""
        if (came := self._awaited.get(peer_id)) is not None:
            came.set()

    async def connect(self, peer_id: str, carrier: Carrier, timeout_s: float, *, may_detour: bool = True) -> Connection:
        """A connection that lives, or a new one; errors as `Transport.open`.

        Args:
            may_detour: whether it may pass a relay.
        """
        if peer_id == self._owner.node.peer_id:
            raise InvalidRequest("a peer does not connect to itself")
        if carrier == "p2p" and self._owner.node.is_private:
            carrier = "direct"  # a raw stream between members is a direct connection
        if carrier in ("auto", "direct") and (connection := self._owner.live(peer_id, "direct")) is not None:
            return connection
        if carrier == "direct":
            return await self.dial(peer_id, "direct", timeout_s)
        relays, may_detour = self._owner.node.relays, may_detour and carrier == "auto"
        if may_detour and not relays.knows(peer_id) and not self._owner.is_connected(peer_id):
            await self._learn_of(peer_id, timeout_s / 3)
        if carrier == "relay" or (may_detour and relays.of(peer_id)):
            return await self._connect_around(peer_id, carrier, timeout_s)
        if self._owner.node.is_private:
            return await self.dial(peer_id, "direct", timeout_s)
        connection = self._owner.live(peer_id, "p2p")
        if carrier == "auto" and self._reachability.should_try(peer_id, self._now):
            if connection is None:
                connection = await self._try_direct(peer_id, min(timeout_s / 2, DIRECT_TIMEOUT_S))
            else:
                self._probe(peer_id, "direct")
        return connection or await self.dial(peer_id, "p2p", timeout_s)

    async def _connect_around(self, peer_id: str, carrier: Carrier, timeout_s: float) -> Connection:
        """A connection to a peer that nobody can connect to."""
        if carrier == "auto":
            for kind in ("p2p", "relay"):
                if (connection := self._owner.live(peer_id, kind)) is not None:
                    self._probe(peer_id, "call-back" if self._owner.is_reachable else "direct")
                    return connection
            if self._owner.is_reachable and self._reachability.should_try(peer_id, self._now):
                direct = await self._try_direct(peer_id, min(timeout_s / 2, DIRECT_TIMEOUT_S), "call-back")
                if direct is not None:
                    return direct
        try:
            connection = await self.dial(peer_id, "relay", timeout_s)
        except RelaysBusy:
            raise
        except PeerUnreachable:
            self._owner.node.relays.forget(peer_id)  # perhaps it has others now, or none
            raise
        if carrier == "auto" and not self._owner.is_reachable:
            self._probe(peer_id, "direct")  # it may be a neighbour: the next stream need not pass the relay
        return connection

    async def _learn_of(self, peer_id: str, timeout_s: float) -> None:
        """Look a peer up, so that we need not find out by waiting in vain that nobody can connect to it."""
        if self._owner.look_up is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._owner.look_up(peer_id)
        except (PeerError, TimeoutError) as error:
            log.debug("%s was not looked up: %r", peer_id, error)
            return
        if not self._owner.node.relays.knows(peer_id):
            self._owner.node.relays.learn(peer_id, ())

    async def _open_relay(self, relay_id: str, timeout_s: float) -> Stream:
        """A stream to a relay, which must be there without another one."""
        connection = await self.connect(relay_id, "auto", timeout_s, may_detour=False)
        return connection.open_stream(RELAY_SERVICE)

    async def _try_direct(self, peer_id: str, timeout_s: float, kind: str = "direct") -> Connection | None:
        """A direct connection, or None; failures are remembered."""
        try:
            return await self.dial(peer_id, kind, timeout_s)
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

    async def dial(self, peer_id: str, carrier: str, timeout_s: float) -> Connection:
        """Dial; whoever wants the same connection meanwhile waits for this attempt first."""
        lock = self._locks.setdefault((peer_id, carrier), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout_s), lock:
                connection = self._owner.live(peer_id, carrier)
                if connection is None:
                    connection = await self._makers[carrier](peer_id, timeout_s)
                return connection
        except TimeoutError as error:
            raise PeerTimeout(
                f"no {carrier} connection to {peer_id} within {timeout_s:g} s", peer_id=peer_id
            ) from error
        finally:
            if not lock.locked():
                self._locks.pop((peer_id, carrier), None)

    async def _dial_direct(self, peer_id: str, timeout_s: float) -> Connection:
        relayed = self._owner.live(peer_id, "relay")
        if relayed is None:
            offer = await ask_offer(self._owner.node, peer_id, version=self._version, timeout_s=timeout_s)
        else:  # behind the same router, perhaps
            stream = relayed.open_stream(OFFER_SERVICE)
            offer = await ask_offer_over(stream, version=self._version, timeout_s=timeout_s)
        if not offer.hosts:
            raise PeerUnreachable(f"{peer_id} takes no direct connections", peer_id=peer_id)
        made: list[Connection] = []

        def make_protocol() -> Connection:
            made.append(self._owner.make("direct", peer_id, ticket=offer.ticket))
            return made[-1]

        winner: asyncio.Protocol | None = None
        try:
            _, winner = await dial(offer, make_protocol, peer_id=peer_id, timeout_s=timeout_s)
        finally:
            for connection in made:
                if connection is not winner:
                    connection.close(PeerDisconnected("not needed"))
        assert isinstance(winner, Connection)
        connection = await self._owner.greet(winner)
        self._reachability.succeeded(peer_id)
        return connection

    async def _dial_raw(self, carrier: str, peer_id: str, timeout_s: float) -> Connection:
        """A raw stream of the node: over libp2p, or between members a TLS connection of its own."""
        connection = self._owner.make(carrier, peer_id)
        try:
            await self._owner.node.open_stream_protocol(peer_id, MUX_STREAM, connection, timeout_s=timeout_s)
        except BaseException:
            connection.close(PeerDisconnected("not needed"))
            raise
        return await self._owner.greet(connection)

    async def _dial_relay(self, peer_id: str, timeout_s: float) -> Connection:
        made: list[Connection] = []

        def make_protocol(ticket: bytes) -> Connection:
            made.append(self._owner.make("relay", peer_id, ticket=ticket))
            return made[-1]

        winner: Connection | None = None
        try:
            via = await self._detours.dial(peer_id, self._relays_of(peer_id), make_protocol, timeout_s=timeout_s)
            winner = made[-1]
            winner.via = via
        finally:
            for connection in made:
                if connection is not winner:
                    connection.close(PeerDisconnected("not needed"))
        return await self._owner.greet(winner)

    async def _dial_back(self, peer_id: str, timeout_s: float) -> Connection:
        """Have a peer connect to us."""
        came = self._awaited.setdefault(peer_id, asyncio.Event())
        try:
            await self._detours.call_back(peer_id, self._relays_of(peer_id), timeout_s=timeout_s)
            async with asyncio.timeout(GREETING_S):  # it says so as soon as it has our HELLO; its own may be on its way
                while (connection := self._owner.live(peer_id, "direct")) is None:
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
        return tuple(it for it in self._owner.node.relays.of(peer_id) if it not in (self._owner.node.peer_id, peer_id))

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()
