"""The DHT node of a process: hivemind's DHTNode, started without peers and joined to them again and again.

hivemind pings its initial peers once, when it starts; a call that fails drops the peer from the routing table, and an
outage of three seconds empties the table for good. Here joining is an operation (`join`) that the supervisor repeats
whenever peers are missing. It knows nothing of processes or streams.

    Node --join / store / get--> Dht --> hivemind.DHTNode --unary calls--> DaemonP2P --> DaemonControl --> p2pd
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm.errors import ConfigError, InvalidRequest, PeerMisbehaved
from swarm.identity import Identity
from swarm.network.control import DaemonControl
from swarm.network.hive import (
    DHTID,
    P2P,
    DHTNode,
    DHTValidationError,
    Multiaddr,
    MultiaddrError,
    P2PDaemonError,
    PeerID,
)
from swarm.network.records import MAX_KEYS, MAX_PAYLOAD_BYTES, MAX_SUBKEYS, BoundedStorage, SignedRecords

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
"""Deadline of one DHT call to one peer."""
MAX_REQUEST_BYTES = {"rpc_ping": 1 << 10, "rpc_find": 1 << 14, "rpc_store": 4 << 20}
"""Largest request of each kind; a store may hand over all that a new node should hold."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer can be dialled."""

    peer_id: Any
    address: Any
    text: str

    @classmethod
    def parse(cls, text: str) -> "PeerAddress":
        """Read "/ip4/HOST/tcp/PORT/p2p/PEER_ID".

        Raises:
            ConfigError: when it is not a multiaddr with a peer id at its end.
        """
        try:
            host, separator, peer_id = text.rpartition("/p2p/")
            if not separator:
                raise ConfigError(f"peer address {text!r} names no peer; write /ip4/HOST/tcp/PORT/p2p/PEER_ID")
            return cls(PeerID.from_base58(peer_id), Multiaddr(host), text)
        except (MultiaddrError, ValueError, KeyError) as error:
            raise ConfigError(f"peer address {text!r} is malformed; write /ip4/HOST/tcp/PORT/p2p/PEER_ID") from error


class DaemonP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P on our control client: it does the protobuf, and leaves processes and sockets to us."""

    def __init__(self, control: DaemonControl, peer_id: Any) -> None:
        super().__init__()
        self._client = control
        self.peer_id = peer_id
        self._alive = True

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Any, input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        """As hivemind's, but a request may not be larger than its kind needs: each key of a find costs us a search."""
        limit = MAX_REQUEST_BYTES[handle_name.rpartition(".")[2]]

        async def checked(request: Any, context: Any) -> Any:
            if request.ByteSize() > limit:
                raise PeerMisbehaved(f"{handle_name} of {request.ByteSize()} bytes, limit {limit}")
            return await handler(request, context)

        await super()._add_protobuf_unary_handler(handle_name, checked, input_protobuf_type, balanced=balanced)

    def _terminate(self) -> None:
        """The daemon and its client belong to the Node."""


class Dht:
    """One DHT participant."""

    def __init__(self, node: Any, control: DaemonControl) -> None:
        self._node = node
        self._control = control

    @classmethod
    async def create(cls, control: DaemonControl, identity: Identity, *, client_mode: bool) -> "Dht":
        """A participant that knows nobody yet. A client stores nothing for others and is not asked."""
        peer_id = PeerID.from_base58(identity.peer_id)
        node = await DHTNode.create(
            p2p=DaemonP2P(control, peer_id),
            node_id=DHTID.generate(source=peer_id.to_bytes()),  # the same after a restart
            wait_timeout=CALL_TIMEOUT_S,
            cache_locally=False,
            cache_nearest=0,
            reuse_get_requests=False,
            blacklist_time=1.0,
            client_mode=client_mode,
            record_validator=SignedRecords(identity),
        )
        protocol = node.protocol
        protocol.storage = BoundedStorage(maxsize=MAX_KEYS)
        protocol.cache = BoundedStorage(maxsize=MAX_KEYS)
        validate = protocol._validate_dictionary
        protocol._validate_dictionary = lambda key, values: len(values) <= MAX_SUBKEYS and validate(key, values)
        return cls(node, control)

    async def join(self, peers: Sequence[PeerAddress], *, timeout_s: float, strict: bool = False) -> dict[str, str]:
        """Connect to `peers`, make them and us known to each other, and look around.

        Returns:
            For each peer that did not answer: its address and why.

        Raises:
            ConfigError: with `strict`, when our clock differs from a peer's by more than 3 s.
        """
        failures = await asyncio.gather(*(self._greet(peer, timeout_s, strict) for peer in peers))
        if not all(failures):
            self._node.blacklist.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._node.find_nearest_nodes([self._node.node_id])
            except TimeoutError:
                log.debug("looking for neighbours took more than %.1f s", timeout_s)
        return {peer.text: failure for peer, failure in zip(peers, failures, strict=True) if failure}

    async def ping(self, peer_id: Any) -> bool:
        """Whether the peer answers as a DHT node; an answer puts it into our table, and us into its."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + 1):
                return await self._node.protocol.call_ping(peer_id, validate=False) is not None
        except TimeoutError:
            return False

    def knows(self, peer_id: Any) -> bool:
        """Whether the peer is in the routing table."""
        return peer_id in self._node.protocol.routing_table

    @property
    def num_peers(self) -> int:
        """Size of the routing table."""
        return len(self._node.protocol.routing_table.uid_to_peer_id)

    async def store(self, key: str, subkey: str, value: bytes, expires_at: float, *, timeout_s: float) -> bool:
        """Store a value of ours under key and subkey (our own peer id); True when some node took it."""
        if subkey != self._node.peer_id.to_base58():
            raise InvalidRequest(f"subkey {subkey!r} is not our own peer id {self._node.peer_id.to_base58()}")
        if len(value) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(f"DHT value of {len(value)} bytes, limit {MAX_PAYLOAD_BYTES}")
        try:
            async with asyncio.timeout(timeout_s):
                is_client = self._node.protocol.client_mode  # nobody would find what a client stores at itself
                stored = await self._node.store(key, value, float(expires_at), subkey=subkey, exclude_self=is_client)
                return bool(stored)
        except TimeoutError:
            return False

    async def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, dict[str, bytes]]:
        """For each key, the valid values by subkey, merged from all nodes that answered.

        The wanted expiry is NaN, which no answer reaches: one node, however far in the future its answer expires,
        must not end the search and so hide what the others hold.
        """
        async with asyncio.timeout(timeout_s):
            found = await self._node.get_many(list(keys), sufficient_expiration_time=float("nan"))
        return {
            key: {subkey: item.value for subkey, item in result.value.items()} if result is not None else {}
            for key, result in found.items()
        }

    def close(self) -> None:
        """Stop the node's own background work; its handlers go with the daemon."""
        self._node.is_alive = False
        if self._node.cache_refresh_task is not None:
            self._node.cache_refresh_task.cancel()

    async def _greet(self, peer: PeerAddress, timeout_s: float, strict: bool) -> str:
        """Connect and ping; the reason where that fails, else an empty string."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._control.connect(peer.peer_id, [peer.address], timeout_s=timeout_s)
                answer = await self._node.protocol.call_ping(peer.peer_id, validate=strict, strict=strict)
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except P2PDaemonError as error:
            await self._node.protocol.update_routing_table(None, peer.peer_id, responded=False)
            return str(error)
        except DHTValidationError as error:
            raise ConfigError(f"peer {peer.text} refuses us: {error}") from error
        return "" if answer is not None else "connected, but it is no DHT node"
