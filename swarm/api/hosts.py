"""Refuses requests whose Host header names somebody else: those of web pages that have renamed us.

A page on evil.example can make that name mean 127.0.0.1 (DNS rebinding), and its visitors' browsers then take us for a
part of it: they let it send what it likes and read the answers. Their requests name evil.example as the host. An
address in figures can't be had that way, so it is good, like the names that are known.

    request ──Host──► a known name, or an address ──► app          any other name ──► 403
"""

import ipaddress
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

REFUSAL = (
    "the Host of this request is no name of ours: use localhost or an address, start with --host NAME, or with keys\n"
)


class KnownHosts:
    """ASGI middleware.

    Args:
        names: by which we go, besides localhost and the name of this machine.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str] = ()):
        self._app = app
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._knows(Headers(scope=scope).get("host", "")):
            return await self._app(scope, receive, send)
        await PlainTextResponse(REFUSAL, 403)(scope, receive, send)

    def _knows(self, header: str) -> bool:
        host = host_of(header)
        return host in self._names or _is_address(host)


def host_of(header: str) -> str:
    """The name or address in a Host header, without port and brackets, in small letters."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
