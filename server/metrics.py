"""A server's numbers for Prometheus, at `--metrics-port`.

    GET /metrics ─► MetricsServer ─► ServerCollector.collect ─► handler, executor, transport and their meters

Nothing is counted here: `server.meters` does that, whether anybody asks or not. It all runs on the server's loop, so
that what the loop owns is read between two of its steps. docs/health.md lists the names.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from swarm import __version__
from swarm.errors import ConfigError
from swarm.server.meters import Histogram

if TYPE_CHECKING:
    from swarm.server.executor import Executor
    from swarm.server.handler import Handler
    from swarm.server.server import Server
    from swarm.transport import Transport

PREFIX = "swarm_server_"
MAX_HEAD_BYTES = 8192
MAX_SCRAPERS = 16
"""Connections at once; more are closed."""
SCRAPE_TIMEOUT_S = 5.0
"""How long one of them may take."""


class ServerCollector(Collector):
    """Reads a running server whenever somebody scrapes it.

    Args:
        server: joining or running.
    """

    def __init__(self, server: "Server"):
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """The metrics of now; to be called on the server's loop."""
        yield _gauge("state", "0 offline, 1 joining, 2 online, 3 draining.", self._server.state)
        if self._server.serving is not None:
            handler = self._server.serving.handler
            yield from _what_it_is(handler, self._server.transport)
            yield from _sessions(handler)
            yield from _batches(handler.executor)
            yield from _memory(handler)
            yield from _network(self._server.transport)


class MetricsServer:
    """Answers GET /metrics over HTTP, and nothing else. Use `await MetricsServer.start(...)`."""

    def __init__(self, collector: Collector):
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        self._scrapers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self.url = ""

    @classmethod
    async def start(cls, collector: Collector, *, host: str, port: int) -> "MetricsServer":
        """Listen on an address and a TCP port; 0 picks a free one.

        Raises:
            ConfigError: the port can't be used.
        """
        server = cls(collector)
        try:
            server._server = await asyncio.start_server(server._answer, host, port, limit=MAX_HEAD_BYTES)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"metrics can't be served on {host} port {port}: {error}") from error
        server.url = f"http://{host}:{server._server.sockets[0].getsockname()[1]}/metrics"
        return server

    async def close(self) -> None:
        """Stop listening, and drop who is being answered."""
        self._server.close()
        for writer in list(self._scrapers):
            await _close(writer)
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._scrapers.add(writer)
        try:
            if len(self._scrapers) <= MAX_SCRAPERS:
                with suppress(TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
                    async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                        head = await reader.readuntil(b"\r\n\r\n")
                        writer.write(self._response(head))
                        await writer.drain()
        finally:
            self._scrapers.discard(writer)
            await _close(writer)

    def _response(self, head: bytes) -> bytes:
        method, target, *_ = [*head.split(b"\r\n", 1)[0].split(b" "), b"", b""]
        if method != b"GET":
            return _http("405 Method Not Allowed", b"only GET\n")
        if target.split(b"?", 1)[0] != b"/metrics":
            return _http("404 Not Found", b"see /metrics\n")
        return _http("200 OK", generate_latest(self._registry), CONTENT_TYPE_LATEST)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def _http(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _what_it_is(handler: "Handler", transport: "Transport") -> Iterator[Metric]:
    info = handler.describe()
    labels = {
        "peer_id": transport.node.peer_id,
        "model": info.model_name,
        "digest": info.model,
        "blocks": f"{info.start}:{info.end}",
        "quantization": info.quantization,
        "dtype": info.dtype,
        "version": __version__,
    }
    family = GaugeMetricFamily(PREFIX + "info", "What this server is; always 1.", labels=list(labels))
    family.add_metric(list(labels.values()), 1.0)
    yield family
    yield _gauge("uptime_seconds", "Seconds since it began to serve.", info.uptime_s)
    yield _gauge("blocks", "Transformer blocks that it runs.", info.end - info.start)
    yield _gauge("load", "Share of its capacity in use, as announced: 0 to 1.", info.load)


def _sessions(handler: "Handler") -> Iterator[Metric]:
    meter = handler.meter
    yield _gauge("sessions", "Sessions that are open.", handler.num_sessions)
    yield _gauge("rows", "Sequences of the open sessions.", handler.num_rows)
    yield _gauge("tokens_per_second", "Tokens through the blocks lately (10 s).", handler.tokens_per_s)
    yield _counter("tokens", "Tokens that ran through the blocks, or were known.", meter.num_tokens)
    yield _counter("sessions_opened", "Sessions that were let in.", meter.num_opened)
    yield _by("sessions_refused", "Sessions that were not let in.", "reason", meter.refused)
    yield _by("sessions_ended", "Sessions that are over: done, or the kind of error.", "reason", meter.ended)
    yield _counter("replays", "Sessions taken over from a server that was lost.", meter.num_replays)
    yield _counter("replayed_tokens", "Tokens in the first message of those.", meter.num_replayed)
    moved = {"out": meter.num_given, "in": meter.num_taken}
    moved_bytes = {"out": meter.given_bytes, "in": meter.taken_bytes}
    yield _by("sessions_moved", "Sessions handed to other servers, and taken from them.", "way", moved)
    yield _by("moved_bytes", "Size of these sessions.", "way", moved_bytes)
    yield _counter("hops", "Receivers connected: next servers, and clients as such.", meter.num_hops)
    yield _by("links_down", "Receivers lost, by fault.", "fault", meter.links_down)
    yield _counter("room_waits", "Times that a client was told to wait for room.", meter.num_waits)
    yield _histogram("queue_seconds", "How long a session's tokens waited for their batch.", meter.queue_s)


def _batches(executor: "Executor") -> Iterator[Metric]:
    meter = executor.meter
    yield _gauge("sessions_ready", "Sessions with work that runs or waits for its turn.", executor.num_ready)
    yield _gauge("sessions_waiting", "Sessions whose work waits for room in the cache.", executor.num_waiting)
    yield _histogram("batch_seconds", "How long batches took.", meter.step_s)
    yield _histogram("batch_tokens", "Tokens in batches.", meter.tokens)
    yield _histogram("batch_rows", "Sequences in batches.", meter.rows)
    yield _counter("batches_failed", "Batches that raised an error.", meter.num_failed)
    kinds = {"decode": meter.num_decode, "prompt": meter.num_prompt, "cached": meter.num_cached}
    yield _by("tokens_run", "Tokens decoded one by one, of prompts, and known from other prompts.", "kind", kinds)


def _memory(handler: "Handler") -> Iterator[Metric]:
    executor, history, meter = handler.executor, handler.history, handler.executor.meter
    yield _gauge("kv_tokens_free", "Tokens that the KV cache has room for.", executor.free_tokens)
    yield _gauge("kv_tokens_total", "Tokens that the KV cache holds in all.", executor.total_tokens)
    moves = {"copied": meter.num_copied, "out": meter.num_swapped_out, "in": meter.num_swapped_in}
    yield _by("pages_moved", "Pages copied on write, and moved out to host memory and back in.", "how", moves)
    yield _gauge("history_bytes", "Memory held by what was sent to next servers.", history.used_bytes)
    yield _gauge("history_limit_bytes", "Memory allowed for that.", history.limit_bytes)
    yield _counter("histories_dropped", "Histories that had to go.", history.num_dropped)


def _network(transport: "Transport") -> Iterator[Metric]:
    yield _gauge("connections", "Connections of the data plane.", transport.num_connections)
    yield _gauge("dht_peers", "Peers in the DHT's routing table.", transport.node.num_peers)
    yield _counter("daemon_restarts", "Times that the libp2p daemon had to be replaced.", transport.node.num_restarts)
    traffic = {"received": transport.traffic.received, "sent": transport.traffic.sent}
    yield _by("network_bytes", "Bytes of the data plane, before encryption.", "direction", traffic)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _by(name: str, text: str, label: str, values: Mapping[str, float] | Counter[str]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, values: Histogram) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric([], values.cumulative(), values.sum)
    return family
