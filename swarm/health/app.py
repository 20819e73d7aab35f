"""The HTTP side: the page, its news, the API, the metrics. Starlette on the monitor's loop.

    GET /                       the page, rendered once per state       GET /api/v1/state, /api/v1/reachable/{peer}
    GET /events                 the revision of each new state (SSE)    GET /api/openapi.json
    GET /static/..., /badge.svg                                         GET /metrics, /healthz

Read-only, open to anybody who reaches the port, and of bounded cost: pages are rendered once per state however many
look, and dials are few at a time. Nothing comes from outside, and browsers are told so (Content-Security-Policy).
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.errors import PeerBusy, SwarmError
from swarm.health import openapi
from swarm.health.compose import clean
from swarm.health.exposition import exposition
from swarm.health.monitor import MAX_WATCHERS, Monitor
from swarm.health.openapi import CarrierReport, ErrorReport, ReachReport
from swarm.health.pages import FOLDER, PAGE_ROWS, render_badge, render_page
from swarm.identity import is_peer_id
from swarm.protocol import INFO_SERVICE, InfoRequest
from swarm.transport.ways import Carrier

MAX_PAGES_KEPT = 64
MAX_DIALS = 4
"""Peers that visitors may have dialled at once."""
DIAL_TIMEOUT_S = 6.0
REPORT_VALID_S = 10.0
"""For how long what came of a dial is told again."""
MAX_REPORTS = 256
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(monitor: Monitor) -> Starlette:
    """The ASGI application over a running monitor."""
    pages, api = _Pages(monitor), _Api(monitor)
    is_open = monitor.settings.credentials is None
    return Starlette(
        routes=[
            Route("/", pages.page),
            Route("/events", pages.events),
            Route("/badge.svg", pages.badge),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
            Route("/api/openapi.json", api.openapi),
            Route("/api/v1/state", api.state),
            Route("/api/v1/reachable/{peer}", api.reachable),
            Route("/metrics", api.metrics),
            Route("/healthz", api.healthz),
        ],
        middleware=[
            Middleware(_SafeHeaders, is_open=is_open),
            Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5),
        ],
    )


class _Pages:
    """What people look at."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._rendered: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._revision = -1

    async def page(self, request: Request) -> Response:
        """The page; of one model with ?model=DIGEST, and of some of its servers with &page=N."""
        digest, number = request.query_params.get("model", "")[:64], request.query_params.get("page", "")
        is_number = number.isascii() and number.isdigit() and len(number) < 6
        text = self._render(digest, int(number) if is_number else 1)
        return Response(text, media_type="text/html", headers={"Cache-Control": "no-store"})

    async def events(self, request: Request) -> Response:
        """News as server-sent events: the revision of each new state."""
        if self._monitor.num_watchers >= MAX_WATCHERS:
            return _json(ErrorReport(error=f"{MAX_WATCHERS} are watching already"), 503, {"Retry-After": "30"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._news(), media_type="text/event-stream", headers=headers)

    async def badge(self, request: Request) -> Response:
        """How a model is, as a small picture."""
        state, digest = self._monitor.state, request.query_params.get("model", "")[:64]
        model = state.model(digest) if digest else next(iter(state.models), None)
        return Response(render_badge(model), media_type="image/svg+xml", headers={"Cache-Control": "max-age=30"})

    def _render(self, digest: str, number: int) -> str:
        """The page of the present state, from memory where somebody else has seen it."""
        monitor = self._monitor
        model = monitor.state.model(digest) if digest else None
        num_pages = max(1, -(-len(model.servers) // PAGE_ROWS)) if model is not None else 1
        key = digest, number = model.digest if model is not None else "", min(max(number, 1), num_pages)
        if self._revision != monitor.revision:
            self._rendered.clear()
            self._revision = monitor.revision
        if key not in self._rendered:
            self._rendered[key] = render_page(
                monitor.state, monitor.trends, revision=monitor.revision, digest=digest, number=number
            )
            if len(self._rendered) > MAX_PAGES_KEPT:
                self._rendered.popitem(last=False)
        return self._rendered[key]

    async def _news(self) -> AsyncIterator[str]:
        try:
            async for revision in self._monitor.watch():
                yield f"data: {revision}\n\n"
        except PeerBusy:
            return


class _Api:
    """What programs read."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._reports: OrderedDict[str, tuple[float, ReachReport]] = OrderedDict()
        self._num_dials = 0

    async def state(self, request: Request) -> Response:
        """Everything as JSON."""
        return _json(self._monitor.state)

    async def openapi(self, request: Request) -> Response:
        """What this API gives."""
        return JSONResponse(openapi.document())

    async def metrics(self, request: Request) -> Response:
        """Everything for Prometheus."""
        return Response(exposition(self._monitor), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(self, request: Request) -> Response:
        """Whether this process looks at the swarm as it should: for who watches the watchers."""
        age_s = time.time() - self._monitor.state.at
        is_well = self._monitor.num_refreshes > 0 and age_s < 60 + 3 * self._monitor.settings.period_s
        return Response(f"looked {age_s:.0f} s ago\n", 200 if is_well else 503, media_type="text/plain")

    async def reachable(self, request: Request) -> Response:
        """Dial a peer now."""
        peer_id = request.path_params["peer"]
        if not is_peer_id(peer_id):
            return _json(ErrorReport(error="no peer id; they begin with 12D3KooW and have 52 characters"), 400)
        at, report = self._reports.get(peer_id, (float("-inf"), None))
        if report is not None and time.monotonic() - at < REPORT_VALID_S:
            return _json(report)
        if self._num_dials >= MAX_DIALS:
            return _json(
                ErrorReport(error=f"{MAX_DIALS} peers are being dialled, try later"), 503, {"Retry-After": "5"}
            )
        self._num_dials += 1
        try:
            report = await self._dial(peer_id)
        finally:
            self._num_dials -= 1
        self._reports[peer_id] = time.monotonic(), report
        self._reports.move_to_end(peer_id)
        if len(self._reports) > MAX_REPORTS:
            self._reports.popitem(last=False)
        return _json(report)

    async def _dial(self, peer_id: str) -> ReachReport:
        carriers: tuple[Carrier, ...] = ("direct", "p2p", "relay")
        direct, p2p, relay = await asyncio.gather(*(self._try(peer_id, carrier) for carrier in carriers))
        is_ok = direct.ok or p2p.ok or relay.ok
        return ReachReport(peer_id=peer_id, ok=is_ok, direct=direct, p2p=p2p, relay=relay)

    async def _try(self, peer_id: str, carrier: Carrier) -> CarrierReport:
        started = time.monotonic()
        try:
            await self._monitor.transport.call(
                peer_id, INFO_SERVICE, InfoRequest(), timeout_s=DIAL_TIMEOUT_S, carrier=carrier
            )
        except SwarmError as error:
            return CarrierReport(ok=False, message=clean(str(error)))
        return CarrierReport(ok=True, ms=round((time.monotonic() - started) * 1e3, 1))


class _SafeHeaders:
    """Says with every response what a browser may do with it; an open swarm's API may be read by pages elsewhere."""

    def __init__(self, app: ASGIApp, *, is_open: bool):
        self._app, self._is_open = app, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                path, headers = scope["path"], MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if self._is_open and path.startswith(("/api/", "/badge.svg")):
                    headers["Access-Control-Allow-Origin"] = "*"
                elif path.startswith("/static/"):
                    headers["Cache-Control"] = "max-age=86400"
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _json(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json", headers=headers)
