"""Accepts TLS connections from anybody, and lets nobody keep others out.

Handshakes run side by side, up to a limit for each host and one for all. Beyond them the oldest one of that host, or of
the host that has most, is given up: an honest handshake takes milliseconds, so it is those that dawdle that go. Each
host may connect so often. What comes after the handshake is the protocol's business.

    TlsListener ──accept──► rate of the host ──► handshake (deadline) ──► make_protocol()
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from swarm.errors import ConfigError
from swarm.network.daemon import resolve_host
from swarm.network.tasks import TaskSet
from swarm.rates import Rate, Rates

log = logging.getLogger(__name__)

CONNECTIONS = Rate(burst=256, per_s=32)
"""How often one host may connect: many peers may stand behind one address, but each needs few connections."""
HOST_SHARE = 0.25
"""Part of the handshakes that one host may have."""
BACKLOG = 512
_ACCEPT_PAUSE_S = 0.1
_OLD_S = 0.5
"""A handshake that is younger is not given up for another: it may be an honest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """Where connections come in.

    Attributes:
        port: TCP port.
        fingerprint: SHA-256 of the certificate that is shown there.
    """

    port: int
    fingerprint: bytes


class TlsListener:
    """Listens on one TCP port.

    Args:
        context: TLS as a server.
        make_protocol: makes the protocol of one connection, when its handshake is done.
        may_accept: whether there is room for one more connection.
        handshake_timeout_s: deadline of the TLS handshake.
        max_handshakes: handshakes at a time, of all hosts.
        rate: how often one host may connect.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        may_accept: Callable[[], bool],
        handshake_timeout_s: float,
        max_handshakes: int,
        rate: Rate = CONNECTIONS,
    ) -> None:
        self.host = ""
        self.port = 0
        self._context = context
        self._make_protocol = make_protocol
        self._may_accept = may_accept
        self._handshake_timeout_s = handshake_timeout_s
        self._max_handshakes = max_handshakes
        self._rates = Rates(rate)
        self._tasks = TaskSet()
        self._handshakes: dict[asyncio.Task[None], tuple[str, float]] = {}
        """Those that run, the oldest first: with which host, and since when."""
        self._socket: socket.socket | None = None

    def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            ConfigError: when the address can't be used.
        """
        address = resolve_host(host)
        listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((str(address), port))
            listener.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"can't listen on {host} port {port}: {reason}") from error
        self._socket = listener
        self.host, self.port = listener.getsockname()[:2]
        self._tasks.spawn(self._accept_all(listener), name=f"accept connections on port {self.port}")

    async def close(self) -> None:
        """Stop listening; connections that are established stay."""
        await self._tasks.close()
        if self._socket is not None:
            self._socket.close()

    @property
    def num_handshakes(self) -> int:
        """Handshakes that run now."""
        return len(self._handshakes)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (host, *_) = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, or a connection that died in the queue
                log.warning("accept failed: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if not self._rates.charge(host, loop.time()) or not self._make_room(host, loop.time()):
                connection.close()
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._tasks.spawn(self._shake_hands(connection), name=f"TLS handshake with {host}")
            self._handshakes[task] = host, loop.time()
            task.add_done_callback(lambda task: self._handshakes.pop(task, None))

    def _make_room(self, host: str, now: float) -> bool:
        """Give up a handshake that dawdles, if there are too many; False when there is no room for another one."""
        if not self._may_accept():
            return False
        num_of = Counter(other for other, _ in self._handshakes.values())
        if num_of[host] < max(2, int(self._max_handshakes * HOST_SHARE)):
            if len(self._handshakes) < self._max_handshakes:
                return True
            host = max(num_of, key=num_of.__getitem__)
        task, since = next((task, since) for task, (other, since) in self._handshakes.items() if other == host)
        if now - since < _OLD_S:
            return False
        task.cancel()
        del self._handshakes[task]
        return True

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Handshake(self._make_protocol),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_timeout_s,
            )
        except (OSError, ssl.SSLError) as error:
            log.debug("TLS handshake failed: %r", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise


class Handshake(asyncio.Protocol):
    """Stands for the protocol until there is one to talk to."""

    def __init__(self, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._make_protocol = make_protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        protocol = self._make_protocol()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
