"""Puts the application on a socket: uvicorn, with deadlines and limits that strangers can't exceed.

    listen(host, port) ─► socket ─► serve(app, socket): until SIGTERM or Ctrl-C

How long a head may take is `swarm.web`'s business; a body, and how long a client may take to read, the application's.
"""

import socket

import uvicorn
from starlette.types import ASGIApp

from swarm.errors import ConfigError
from swarm.web.impatient import MAX_HEAD_BYTES, ImpatientProtocol

MAX_CONNECTIONS = 256
"""Those beyond it are told 503."""
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
