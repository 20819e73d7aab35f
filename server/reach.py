"""How a server is reached: directly where others can connect to it, else through relays; it notices when that changes.

    enter ─► Node, Transport ─ ask_around: can you connect to us? ─► Standing ─┬─ yes ─► relay for others, dial back
                                      ▲                                        └─ no ──► hidden: Reservations
    from `follow` on, when it is due: └── somebody came, or fell silent; relays are lost; our own address is new

A server that nobody can connect to keeps out of the DHT's routing tables, where it would only be waited for. Whatever
changes, connections that exist go on, but for streams over libp2p: its daemon is replaced by one that says what is so.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from random import Random

from swarm.errors import PeerError, PeerUnreachable
from swarm.network.config import NodeConfig
from swarm.network.node import Node
from swarm.network.tasks import TaskSet
from swarm.server.config import ServerConfig
from swarm.transport import Transport
from swarm.transport.dial_back import ROUTES, ask_around, gateways
from swarm.transport.public import help_others
from swarm.transport.relay import RelayDesk
from swarm.transport.reservations import LEAVE_S, Reservations
from swarm.transport.standing import Standing, Verdict

logger = logging.getLogger(__name__)

RELAY_TIMEOUT_S = 15.0
"""How long a server that nobody can connect to looks for its first relay before it gives up."""
LOOK_S = 15.0
"""How often it looks whether its own address is another one."""
NOWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737)."""


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
        self._standing: Standing | None = None
        """What is known of ourselves; None where nobody is asked."""
        self._is_settled = True
        """Whether we present ourselves as that."""
        self._own: tuple[str, ...] = ()
        """Addresses of this machine, for neighbours ..."""
        self._source = ""
        """... and the one from which it reaches others."""
        self._reservations: Reservations | None = None
        self._others: Callable[[], Sequence[str]] = tuple
        self._on_change: Callable[[], object] = lambda: None
        self._stirred = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks = TaskSet()

    @property
    def is_relayed(self) -> bool:
        """Whether nobody can connect to it."""
        return self._reservations is not None

    @property
    def relays(self) -> tuple[str, ...]:
        """Who carries connections to it now, the nearest first."""
        return () if self._reservations is None else self._reservations.relays

    def follow(self, others: Callable[[], Sequence[str]], on_change: Callable[[], object]) -> None:
        """From now on take relays among `others` as well, notice when we are reached otherwise, and tell of changes."""
        self._others, self._on_change = others, on_change
        if self._standing is not None:
            self._tasks.spawn(self._keep_up(self._standing), name="how we are reached")

    async def enter(self) -> None:
        """Join the swarm, and find out how we can be reached.

        Raises:
            ConfigError: port in use, bad identity file or address.
            PeerUnreachable: none of the initial peers answers; or nobody can connect to us, and nobody relays.
            AccessDenied: the swarm is private, and we may not join it.
        """
        config = self._config
        is_hidden = config.relay == "always"
        await self._open(is_hidden=is_hidden)
        if is_hidden:
            await self._hide()
        elif config.relay == "auto" and not config.announce:
            self._own, self._source = _hosts(self.node.listening), source_address()
            self._standing = Standing(await self._ask(), Random(), _now())
            self.transport.on_reached, self.transport.on_silence = self._reached, self._hinted
            await self._settle(self._standing)
        else:
            self._help()
        if self.is_relayed and not self.relays:
            assert self._reservations is not None
            one_port = "a port and name it with --port"
            ports = one_port if self.node.is_private else "two ports and name them with --port and --data-port"
            raise PeerUnreachable(
                f"nobody can connect to this machine, and no peer relays: open {ports}, or let a peer that can be"
                f" reached relay ({self._reservations.refusals or 'no peer is known'})"
            )

    async def close(self) -> None:
        """Leave the network."""
        await self._tasks.close()
        if self._reservations is not None:
            await self._reservations.close()
        await self._stack.aclose()

    async def _open(self, *, is_hidden: bool) -> None:
        config = self._config
        self.node = await Node.start(
            NodeConfig(
                initial_peers=config.initial_peers,
                identity_path=config.identity_path,
                host=config.host,
                port=config.port,
                announce=config.announce,
                credentials=config.credentials,
                client_mode=is_hidden,
            )
        )
        self._stack.push_async_callback(self.node.close)
        self.node.check_may_announce()
        listen, announce = (config.host, config.data_port), _hosts(config.announce) or None
        self.transport = Transport(self.node, listen=listen, announce_hosts=announce)
        await self.transport.start()
        self._stack.push_async_callback(self.transport.close)

    # -- being what is known ------------------------------------------------------------------------------------------

    async def _settle(self, known: Standing) -> None:
        """Present ourselves as what we are; nothing happens where that is so already.

        Raises:
            PeerTimeout: the libp2p daemon does not answer.
        """
        if not known.is_reachable:
            logger.info("nobody can connect to this machine: relays are looked for")
            self.transport.is_reachable = False
            await self.node.present(is_hidden=True)
            self.transport.announce(self._own)
            await self._hide()
            return
        is_forwarded = known.host not in ("", *self._own)  # then neighbours may still use our own address
        announce = (known.host, *self._own) if is_forwarded else ()
        if self.is_relayed or is_forwarded:
            logger.info("others reach this machine at %s", known.host)
        await self.node.present(announce)
        self.transport.announce(announce or None)
        self.transport.is_reachable = known.is_known
        if self._reservations is not None:
            leaving, self._reservations = self._reservations, None
            self._tasks.spawn(_leave(leaving), name="leave all relays")
        self._help()

    async def _hide(self) -> None:
        """Be reached through relays."""
        if self.relay_desk is not None:
            await self.relay_desk.close()
        if self._reservations is None:
            self._reservations = Reservations(self.transport, self._candidates, self._relays_changed)
            await self._reservations.start(RELAY_TIMEOUT_S)

    def _help(self) -> None:
        """Relay for others, and tell them whether they can be reached."""
        if self.relay_desk is None:
            self.relay_desk = help_others(self.transport, relayed_bytes_per_s=self._config.relayed_bytes_per_s)
        else:
            self.relay_desk.open()

    def _relays_changed(self) -> None:
        if not self.relays:
            self._hinted()
        self._on_change()

    async def _candidates(self) -> list[str]:
        """Who may be our relay."""
        try:
            connected = await self.node.connected_peers()
        except PeerError:
            connected = ()
        return list(dict.fromkeys((*connected, *self._others())))

    # -- noticing changes ---------------------------------------------------------------------------------------------

    async def _keep_up(self, known: Standing) -> None:
        """Ask others when that is due, and be what they say; for ever."""
        while True:
            await self._due_or_stirred(known)
            try:
                if await self._has_moved():
                    self._is_settled = False
                    known.hint(_now())
                if (asked_at := _now()) >= known.due_at:
                    verdict = await self._ask()
                    if known.heard(verdict, _now(), asked_at=asked_at):
                        self._is_settled = False
                if not self._is_settled:
                    await self._settle(known)
                    self._is_settled = True
                    self._on_change()
            except PeerError as error:
                logger.warning("can't say how we are reached, trying again: %s", error)

    async def _due_or_stirred(self, known: Standing) -> None:
        self._stirred.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(LOOK_S, max(0.0, known.due_at - _now()))):
                await self._stirred.wait()

    async def _has_moved(self) -> bool:
        """Whether this machine is at another address than before; while it has none, it has not moved."""
        source = source_address()
        if source in ("", self._source):
            return False
        logger.info("this machine is at %s now, it was at %s", source, self._source or "no address")
        await self.node.present(is_hidden=self.is_relayed)  # which finds our own addresses
        self._own, self._source = _hosts(self.node.listening), source
        return True

    def _reached(self, host: str) -> None:
        """Somebody has connected to us; our own router may speak for anybody, and so for nobody."""
        known = self._standing
        if known is not None and host not in gateways(ROUTES):
            if known.came(host, _now()):
                self.transport.is_reachable = True
            if not known.is_reachable:
                self._stirred.set()

    def _hinted(self) -> None:
        if self._standing is not None:
            self._standing.hint(_now())
            self._stirred.set()

    async def _ask(self) -> Verdict | None:
        port = int(self.node.listening[0].split("/")[4])
        try:
            verdict = await ask_around(self.transport, port, await self.node.connected_peers())
        except PeerError as error:
            logger.info("can't find out whether others can connect to us: %s", error)
            return None
        if verdict is not None and not verdict.is_reachable:
            asked = f"most of {verdict.num_answers} peers" if verdict.num_answers > 1 else "the peer that was asked"
            ports = {port, self.transport.entrance.port} if self.transport.entrance else {port}
            logger.info("%s can't connect to port %s of %s", asked, " and ".join(map(str, sorted(ports))), verdict.host)
        return verdict


async def _leave(reservations: Reservations) -> None:
    """Give relays up when others had time to read that we need none."""
    try:
        await asyncio.sleep(LEAVE_S)
    finally:
        await reservations.close()


def source_address() -> str:
    """The address from which this machine reaches others; empty where it reaches nobody. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((NOWHERE, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _now() -> float:
    return asyncio.get_running_loop().time()


def _hosts(addresses: Sequence[str]) -> tuple[str, ...]:
    """The host parts of addresses ("1.2.3.4" or "/ip4/1.2.3.4/tcp/...")."""
    return tuple(address.split("/")[2] if address.startswith("/") else address for address in addresses)
