"""The chat page at `/`: plain HTML, CSS and JavaScript in static/, nothing from outside and nothing to build.

GET / ─► chat.html ─► chat.css, chat.js ─► the API of the same server, as any other client uses it
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route for each file."""
    folder = Path(__file__).parent / "static"
    return [Route(path, _send((folder / name).read_bytes(), kind)) for path, (name, kind) in FILES.items()]


def _send(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send
