"""Puts the application on a socket: uvicorn, with deadlines and limits that strangers can't exceed.

    listen(host, port) ─► socket ─► serve(app, socket): until SIGTERM or Ctrl-C

uvicorn lets a client take as long as it likes for a request's head; `ImpatientProtocol` doesn't. How long a body may
take, and how long a client may take to read, is the application's business.
"""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from swarm.errors import ConfigError

MAX_CONNECTIONS = 256
MAX_SOCKETS = 512
"""Those beyond `MAX_CONNECTIONS` are told 503, those beyond this nothing at all."""
MAX_HEAD_BYTES = 16384
HEAD_TIMEOUT_S = 10.0
"""For the head of a request, from the connection or its first byte on."""
KEEP_ALIVE_S = 20.0
SHUTDOWN_S = 10
"""For answers under way when the server is told to stop."""
BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    Raises:
        ConfigError: the address can't be listened on.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not in 0..65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"can't listen on {host}, port {port}: {error}") from error


def url(sock: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server to be run with a socket of `listen`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 whose clients must send a request's head in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_SOCKETS:
            transport.abort()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._hang_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self.transport.close()
