"""How a server is reached: directly where others can connect to it, else through relays.

    enter ─► Node, Transport ─ ask_around: can you connect to us? ─┬─ yes ─► help others: relay, dial back
                                                                   └─ no ──► again, as one that only connects out;
                                                                             Reservations with relays

A server that nobody can connect to keeps out of the DHT's routing tables, where it would only be waited for.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from swarm.errors import PeerError, PeerUnreachable
from swarm.network.config import NodeConfig, load_identity
from swarm.network.node import Node
from swarm.server.config import ServerConfig
from swarm.transport import Transport
from swarm.transport.dial_back import ask_around
from swarm.transport.public import help_others
from swarm.transport.relay import RelayDesk
from swarm.transport.reservations import Reservations
from swarm.transport.standing import Verdict

logger = logging.getLogger(__name__)

RELAY_TIMEOUT_S = 15.0
"""How long a server that nobody can connect to looks for its first relay before it gives up."""


class Reach:
    """A server's place in the network.

    Attributes:
        node: its peer.
        transport: its streams.
        relay_desk: what it carries for others, if it does.
    """

    node: Node
    transport: Transport

    def __init__(self, config: ServerConfig) -> None:
        self.relay_desk: RelayDesk | None = None
        self._config = config
        self._reservations: Reservations | None = None
        self._others: Callable[[], Sequence[str]] = tuple
        self._stack = AsyncExitStack()

    @property
    def is_relayed(self) -> bool:
        """Whether nobody can connect to it."""
        return self._reservations is not None

    @property
    def relays(self) -> tuple[str, ...]:
        """Who carries connections to it now, the nearest first."""
        return () if self._reservations is None else self._reservations.relays

    def follow(self, others: Callable[[], Sequence[str]], on_change: Callable[[], object]) -> None:
        """From now on take relays among `others` as well, and tell of changes."""
        self._others = others
        if self._reservations is not None:
            self._reservations.on_change = on_change

    async def enter(self) -> None:
        """Join the swarm, and find out how we can be reached.

        Raises:
            ConfigError: port in use, bad identity file or address.
            PeerUnreachable: none of the initial peers answers; or nobody can connect to us, and nobody relays.
            AccessDenied: the swarm is private, and we may not join it.
        """
        config = self._config
        node_config = NodeConfig(
            initial_peers=config.initial_peers,
            host=config.host,
            port=config.port,
            announce=config.announce,
            credentials=config.credentials,
        )
        node_config = replace(
            node_config, identity=load_identity(replace(node_config, identity_path=config.identity_path))
        )
        is_hidden = config.relay == "always" and config.credentials is None
        await self._open(node_config, is_hidden=is_hidden)
        if config.relay == "auto" and not config.announce and not self.node.is_private:
            is_hidden = await self._adapt(node_config)
        if is_hidden:
            await self._find_relays()
        else:
            self.relay_desk = help_others(self.transport, relayed_bytes_per_s=config.relayed_bytes_per_s)

    async def _open(
        self, node_config: NodeConfig, *, is_hidden: bool, data_port: int = 0, inside: Sequence[str] = ()
    ) -> None:
        """Start, again if need be.

        Args:
            is_hidden: whether others reach us through relays, unless they find us at one of the `inside` addresses.
            data_port: for direct connections, if not the one of the configuration.
        """
        await self._stack.aclose()
        self.node = await Node.start(replace(node_config, client_mode=is_hidden))
        self._stack.push_async_callback(self.node.close)
        listen = self._config.host, data_port or self._config.data_port
        self.transport = Transport(
            self.node, listen=listen, announce_hosts=tuple(inside) or _hosts(node_config.announce) or None
        )
        await self.transport.start()
        self._stack.push_async_callback(self.transport.close)

    async def _adapt(self, node_config: NodeConfig) -> bool:
        """Ask others whether they can connect to us, and start anew if that asks for it; whether we are hidden."""
        port, data_port, own = _port(self.node.addresses), self.transport.direct_port, _hosts(self.node.addresses)
        assert data_port is not None
        verdict = await self._ask(port)
        if verdict is None:
            return False
        if not verdict.is_reachable:
            asked = f"most of {verdict.num_answers} peers" if verdict.num_answers > 1 else "the peer that was asked"
            logger.info("%s can't connect to ports %d and %d of %s", asked, port, data_port, verdict.host)
            await self._open(node_config, is_hidden=True, inside=own)
        elif verdict.host not in own:  # ports are forwarded; neighbours may still use our own address
            logger.info("others reach this machine at %s", verdict.host)
            announce = (verdict.host, *own)
            await self._open(replace(node_config, port=port, announce=announce), is_hidden=False, data_port=data_port)
        self.transport.is_reachable = verdict.is_reachable
        return not verdict.is_reachable

    async def _ask(self, port: int) -> Verdict | None:
        try:
            return await ask_around(self.transport, port, await self.node.connected_peers())
        except PeerError as error:
            logger.info("can't find out whether others can connect to us: %s", error)
            return None

    async def _find_relays(self) -> None:
        reservations = Reservations(self.transport, self._candidates)
        self._stack.push_async_callback(reservations.close)
        if not await reservations.start(RELAY_TIMEOUT_S):
            raise PeerUnreachable(
                "nobody can connect to this machine, and no peer relays: open two ports and name them with --port and"
                f" --data-port, or let a peer that can be reached relay ({reservations.refusals or 'no peer is known'})"
            )
        self._reservations = reservations

    async def _candidates(self) -> list[str]:
        """Who may be our relay."""
        try:
            connected = await self.node.connected_peers()
        except PeerError:
            connected = ()
        return list(dict.fromkeys((*connected, *self._others())))

    async def close(self) -> None:
        """Leave the network."""
        await self._stack.aclose()


def _hosts(addresses: Sequence[str]) -> tuple[str, ...]:
    """The host parts of addresses ("1.2.3.4" or "/ip4/1.2.3.4/tcp/...")."""
    return tuple(address.split("/")[2] if address.startswith("/") else address for address in addresses)


def _port(addresses: Sequence[str]) -> int:
    """The TCP port of our own addresses."""
    return int(addresses[0].split("/")[4])
