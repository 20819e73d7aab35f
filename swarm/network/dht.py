"""The DHT node of a process: hivemind's DHTNode, started without peers and joined to them again and again.

hivemind pings its initial peers once, when it starts; a call that fails drops the peer from the routing table, and an
outage of three seconds empties the table for good. Here joining is an operation (`join`) that the supervisor repeats
whenever peers are missing. It knows nothing of processes or streams.

    Node --join / store / get--> Dht --> hivemind.DHTNode --unary calls--> CallerP2P --> Underlay
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from swarm.errors import AccessDenied, ConfigError, InvalidRequest, PeerError, PeerTimeout
from swarm.network.addresses import PeerAddress
from swarm.network.dht_requests import check_size, store_in_portions
from swarm.network.hive import DHTID, P2P, DHTProtocol, DHTValidationError, P2PDaemonError, PeerID
from swarm.network.records import MAX_KEYS, MAX_PAYLOAD_BYTES, MAX_SUBKEYS, BoundedStorage, keep_valid
from swarm.network.search import SearchNode
from swarm.network.silence import Silent
from swarm.network.underlay import Underlay

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
"""Deadline of one DHT call to one peer."""
NUM_WORKERS = 8
"""Peers that a search waits for at the same time: several may be silent."""
MAX_CHECKED = 8
"""Silent peers that are asked again at the same time."""


class CallerP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P on an underlay of ours: it does the protobuf, and leaves processes and sockets to us."""

    def __init__(self, underlay: Underlay, peer_id: Any) -> None:
        super().__init__()
        self._underlay = underlay
        self._client = underlay.caller
        self.peer_id = peer_id
        self._alive = True

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Any, input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        """As hivemind's, but no request may keep others waiting (`swarm.network.dht_requests`).

        A peer that may only use the DHT is answered as one that takes no part in it, whatever it says of itself.
        """

        async def checked(request: Any, context: Any) -> Any:
            check_size(handle_name, request)
            if not self._underlay.may_be_asked(context.remote_id.to_base58()):
                request.ClearField("peer")
            if handle_name.endswith(".rpc_store"):
                tag = DHTProtocol.IS_DICTIONARY
                return await store_in_portions(request, lambda part: handler(part, context), dictionary_tag=tag)
            return await handler(request, context)

        await super()._add_protobuf_unary_handler(handle_name, checked, input_protobuf_type, balanced=balanced)

    def _terminate(self) -> None:
        """The underlay belongs to the Node."""


class Dht:
    """One DHT participant."""

    def __init__(self, node: Any, underlay: Underlay) -> None:
        self._node = node
        self._underlay = underlay
        self._found: dict[str, Any] = {}
        """Of each address that was joined: who was there last."""

    @classmethod
    async def create(cls, underlay: Underlay, peer_id: str, *, client_mode: bool) -> "Dht":
        """A participant that knows nobody yet. A client stores nothing for others and is not asked."""
        return cls(await _make_node(underlay, PeerID.from_base58(peer_id), is_hidden=client_mode), underlay)

    async def take_part(self, *, is_hidden: bool) -> None:
        """Be asked by others from now on, or only ask them.

        Who was asked before leaves the tables of others as soon as they ask again, which fails at once. What it has
        stored for them, others have too.

        Raises:
            PeerTimeout: the daemon does not answer; all is as it was, but nobody can ask us.
        """
        old = self._node.protocol
        if old.client_mode == is_hidden:
            return
        with suppress(P2PDaemonError):  # it is told when it is back
            await old.remove_p2p_handlers(old.p2p)
        try:
            node = await _make_node(self._underlay, self._node.peer_id, is_hidden=is_hidden)
        except P2PDaemonError as error:
            raise PeerTimeout(f"the libp2p daemon does not serve the DHT: {error}") from error
        for node_id, peer_id in old.routing_table.uid_to_peer_id.items():
            node.protocol.routing_table.add_or_update_node(node_id, peer_id)
        self.close()
        self._node = node  # what is under way ends on the old one

    async def join(self, peers: Sequence[PeerAddress], *, timeout_s: float, strict: bool = False) -> dict[str, str]:
        """Connect to `peers`, make them and us known to each other, and look around.

        Returns:
            For each peer that did not answer: its address and why.

        Raises:
            ConfigError: with `strict`, when our clock differs from a peer's by more than 3 s.
            AccessDenied: with `strict`, when we don't belong to the swarm (any more).
        """
        was_alone = self.num_peers == 0
        failures = await asyncio.gather(*(self._greet(peer, timeout_s, strict) for peer in peers))
        if not all(failures):
            if was_alone:  # it was we who could not be heard
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
                is_there = await self._node.protocol.call_ping(peer_id, validate=False) is not None
        except TimeoutError:
            return False
        if is_there:
            self._node.blacklist.register_success(peer_id)
        return is_there

    async def ask_silent(self) -> None:
        """Ask some of those again that did not answer, if it is time: searches leave them out until they do."""
        await asyncio.gather(*(self.ping(peer_id) for peer_id in self._node.blacklist.due(MAX_CHECKED)))

    def knows(self, peer_id: Any) -> bool:
        """Whether the peer is in the routing table."""
        return peer_id in self._node.protocol.routing_table

    def has_joined(self, peer: PeerAddress) -> bool:
        """Whether the peer that was found at an address is in the routing table, or is ourselves."""
        found = self._found.get(peer.text)
        return found is not None and (found == self._node.peer_id or self.knows(found))

    @property
    def _is_cut_off(self) -> bool:
        """Whether this is a swarm that others have begun, of which nobody is left who would know its records."""
        own_id = self._node.peer_id
        is_joined = any(found != own_id for found in self._found.values())
        return is_joined and self.num_peers == 0 and not self._node.protocol.storage.has_other_than(own_id.to_base58())

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
        """For each key that could be read, the valid values by subkey, merged from all nodes that answered in time.

        A key could not be read if none of those has answered that should keep its values.
        """
        node = self._node
        try:
            found, search = await node.read(keys, timeout_s=timeout_s)
        except TimeoutError:
            return {}
        doubtful = [*node.blacklist.doubtful, *search.open_calls]
        if not search.has_answers and (doubtful or self._is_cut_off):
            node.blacklist.clear()  # all at once: it may be we who can't be heard
            return {}
        return {
            key: {subkey: item.value for subkey, item in result.value.items()} if result is not None else {}
            for key, result in found.items()
            if search.was_read(DHTID.generate(key), doubtful)
        }

    def drop_invalid(self) -> None:
        """Forget records of others that were good when they came, and are not any more."""
        protocol = self._node.protocol
        for storage in (protocol.storage, protocol.cache):
            storage.drop_invalid(protocol.record_validator.validate)

    def close(self) -> None:
        """Stop the node's own background work; its handlers go with the daemon."""
        self._node.is_alive = False
        if self._node.cache_refresh_task is not None:
            self._node.cache_refresh_task.cancel()

    async def _greet(self, peer: PeerAddress, timeout_s: float, strict: bool) -> str:
        """Connect and ping; the reason where that fails, else an empty string."""
        protocol = self._node.protocol
        try:
            async with asyncio.timeout(timeout_s):
                found = PeerID.from_base58(await self._underlay.connect(peer, timeout_s=timeout_s))
                self._found[peer.text] = found
                if found == self._node.peer_id:
                    return ""
                answer = await self._ping_patiently(found, strict=strict)
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except PeerError as error:
            if (lost := self._found.get(peer.text)) is not None:
                await protocol.update_routing_table(None, lost, responded=False)
            return str(error)
        except AccessDenied as error:
            if strict:
                raise
            return str(error)
        except DHTValidationError as error:
            raise ConfigError(f"peer {peer.text} refuses us: {error}") from error
        if answer is None:
            return "connected, but it is no DHT node"
        self._node.blacklist.register_success(found)
        return ""

    async def _ping_patiently(self, peer_id: Any, *, strict: bool) -> Any:
        """The id of a peer that we are connected to; None if it has none, for ever if it does not answer."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            answer = await self._node.protocol.call_ping(peer_id, validate=strict, strict=strict)
            if answer is not None or loop.time() - began < CALL_TIMEOUT_S / 2:
                return answer


async def _make_node(underlay: Underlay, own_id: Any, *, is_hidden: bool) -> Any:
    """hivemind's part, knowing nobody. One that is hidden stores nothing for others, and has a place nobody knows."""
    node = await SearchNode.create(
        p2p=CallerP2P(underlay, own_id),
        node_id=DHTID.generate(source=None if is_hidden else own_id.to_bytes()),  # else the same after a restart
        wait_timeout=CALL_TIMEOUT_S,
        cache_locally=False,
        cache_nearest=0,
        reuse_get_requests=False,
        num_workers=NUM_WORKERS,
        client_mode=is_hidden,
        record_validator=underlay.make_records(),
    )
    node.blacklist = silent = Silent()
    protocol = node.protocol
    update = protocol.update_routing_table

    async def update_and_hear(node_id: Any, peer_id: Any, responded: bool = True) -> None:
        if responded:
            silent.heard(peer_id)
        await update(node_id, peer_id, responded)

    protocol.update_routing_table = update_and_hear
    protocol.storage = BoundedStorage(maxsize=MAX_KEYS)
    protocol.cache = BoundedStorage(maxsize=MAX_KEYS)
    validate = protocol.record_validator.validate

    def has_valid(key: bytes, values: Any) -> bool:  # hivemind lets one bad record hide all others of its key
        if len(values) > MAX_SUBKEYS:
            return False
        keep_valid(key, values, validate)
        return len(values) > 0

    protocol._validate_dictionary = has_valid
    return node
