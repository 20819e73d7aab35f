"""One page from start to stop: a port, a peer of the swarm, a monitor, and uvicorn over it, all on one event loop.

Page.start ─► claim the port ─► History ─► Node, Transport (a client's) ─► Monitor.run, PageServer.serve
"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import uvicorn

from swarm.errors import ConfigError
from swarm.health.app import make_app
from swarm.health.history import History
from swarm.health.monitor import Monitor, Settings
from swarm.network import Node, NodeConfig
from swarm.transport import Limits, Transport
from swarm.web.impatient import MAX_HEAD_BYTES, ImpatientProtocol

IDLE_S = 30.0
"""Connections to servers are kept from one question to the next in a small swarm, not in a large one."""
MAX_CONNECTIONS = 384
"""Browsers and scrapers at once; those beyond are told 503."""
GRACE_S = 2
"""How long responses may take to end when the page stops."""


class Page:
    """A page that is up. Use `Page.start`, and `close` it."""

    def __init__(self, monitor: Monitor, node: Node, url: str, stack: AsyncExitStack):
        self.monitor, self.url = monitor, url
        self._node, self._stack = node, stack
        self._server = PageServer(monitor)
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @classmethod
    async def start(cls, settings: Settings, *, host: str, port: int, history: str | Path) -> "Page":
        """Join the swarm and listen.

        Peers that were known before a restart are tried, too, so that dead bootstraps don't matter.

        Args:
            settings: how to look at which swarm.
            host: address to listen on.
            port: TCP port; 0 picks a free one.
            history: the SQLite file.

        Raises:
            ConfigError: the port or the history file can't be used, or an address is malformed.
            PeerUnreachable: nobody answers.
            AccessDenied: the swarm is private, and we have no invitation that is good.
        """
        async with AsyncExitStack() as stack:
            listener = _listen(host, port)
            stack.callback(listener.close)
            past = History(history)
            stack.callback(past.close)
            peers = tuple(dict.fromkeys([*settings.initial_peers, *past.recall(settings.initial_peers)]))
            node = await Node.start(NodeConfig(initial_peers=peers, client_mode=True, credentials=settings.credentials))
            stack.push_async_callback(node.close)
            transport = Transport(node, limits=Limits(idle_timeout_s=IDLE_S))
            await transport.start()
            stack.push_async_callback(transport.close)
            monitor = Monitor(node, transport, past, settings)
            stack.push_async_callback(monitor.close)
            shown_host = f"[{host}]" if ":" in host else host
            page = cls(monitor, node, f"http://{shown_host}:{listener.getsockname()[1]}/", stack.pop_all())
        page._tasks = (
            asyncio.create_task(monitor.run(), name="monitor"),
            asyncio.create_task(page._server.serve(sockets=[listener]), name="http"),
        )
        return page

    async def wait(self) -> None:
        """Wait for as long as nothing fails.

        Raises:
            AccessDenied: we are no member of this private swarm any more.
        """
        denied = asyncio.create_task(self._node.denied.wait(), name="wait for the end of our membership")
        try:
            done, _ = await asyncio.wait((denied, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
        finally:
            denied.cancel()
        if denied in done:
            self._node.check_access()
        for task in done:
            task.result()

    async def close(self) -> None:
        """Send everybody away, leave the swarm."""
        monitoring, serving = self._tasks
        self._server.should_exit = True
        self.monitor.dismiss()
        monitoring.cancel()
        await asyncio.wait((monitoring, serving))
        await self._stack.aclose()


class PageServer(uvicorn.Server):
    """uvicorn on our loop, which leaves signals to us.

    Args:
        monitor: what to show.
    """

    def __init__(self, monitor: Monitor):
        super().__init__(
            uvicorn.Config(
                make_app(monitor),
                http=ImpatientProtocol,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=10,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: the command has its own handlers."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, claimed before anything else is started.

    Raises:
        ConfigError: the address or port can't be used.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not in 0..65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(f"can't listen on {host} port {port}: {error}") from error
