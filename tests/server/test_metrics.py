"""A server's numbers over HTTP: what Prometheus reads, and what hostile visitors get."""

import asyncio
import re
import socket
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.errors import ConfigError
from swarm.network import Node
from swarm.server import metrics as metrics_module
from swarm.server.metrics import MetricsServer, ServerCollector
from swarm.types import ServerState
from tests.server.conftest import chain_of
from tests.server.fakes import tokens

DOCUMENT = Path(__file__).parents[2] / "docs" / "health.md"


@asynccontextmanager
async def serving(server):
    metrics = await MetricsServer.start(ServerCollector(server), host="127.0.0.1", port=0)
    yield metrics
    await metrics.close()


async def ask(metrics: MetricsServer, request: bytes = b"GET /metrics HTTP/1.1\r\n\r\n") -> tuple[str, str]:
    """Status line and body of one request; both empty where the connection was dropped."""
    port = int(re.search(r":(\d+)/", metrics.url)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = ""
    with suppress(ConnectionError):
        answer = (await reader.read()).decode()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return head.split("\r\n")[0], body


@pytest.mark.asyncio(loop_scope="module")
async def test_a_running_server_tells_everything_that_is_documented(nodes: list[Node]):
    """Every metric is in docs/health.md, every documented one is there, and the numbers are those of the work."""
    async with chain_of(nodes, 2) as chain:
        hops = await chain.open_route(0, 1)
        await hops[0].step(0, [tokens(4)], positions=[0])
        await hops[1].results(0, [4])
        blocks = SimpleNamespace(handler=chain.handlers[0])
        server = SimpleNamespace(serving=blocks, transport=chain.transports[0], state=ServerState.ONLINE)
        async with serving(server) as metrics:
            status, text = await ask(metrics)
    assert status.endswith("200 OK")
    families = {it.name.removeprefix("swarm_server_"): it for it in text_string_to_metric_families(text)}
    values = {sample.name: sample.value for it in families.values() for sample in it.samples}
    assert values["swarm_server_tokens_total"] == 4 and values["swarm_server_sessions"] == 1
    assert values["swarm_server_hops_total"] == 1 and values["swarm_server_network_bytes_total"] > 0
    assert values["swarm_server_state"] == ServerState.ONLINE and values["swarm_server_queue_seconds_count"] == 1
    section = DOCUMENT.read_text().split("## Metrics of a server")[1].split("## In a terminal")[0]
    rows = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    documented = {name.removesuffix("_total") for name in re.findall(r"`(\w+)(?:\{\w+\})?`", rows)}
    assert {name.removesuffix("_total") for name in families} == documented


async def test_a_server_that_loads_tells_that():
    """The port is open before there is anything to count."""
    async with serving(SimpleNamespace(serving=None, state=ServerState.JOINING)) as metrics:
        _, text = await ask(metrics)
    assert "swarm_server_state 1.0" in text and text.count("# TYPE") == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"GET /metrics?x=1 HTTP/1.0\r\nHost: x\r\n\r\n", "200"),
        (b"\r\n\r\n", "405"),
        (b"\xff\xfe\x00 \r\n\r\n", "405"),
        (b"GET\r\n\r\n", "404"),
        (b"GET /" + b"a" * 20_000 + b"\r\n\r\n", ""),
    ],
)
async def test_only_get_metrics_is_answered_with_metrics(request_: bytes, status: str):
    """Anything else gets its status; what is too long gets nothing."""
    async with serving(SimpleNamespace(serving=None, state=ServerState.JOINING)) as metrics:
        line, _ = await ask(metrics, request_)
    assert status in line and bool(line) == bool(status)


async def test_who_says_nothing_is_dropped_and_others_are_served(monkeypatch):
    """Half-open connections take no place for long, and beyond the limit none at all."""
    monkeypatch.setattr(metrics_module, "SCRAPE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(metrics_module, "MAX_SCRAPERS", 2)
    async with serving(SimpleNamespace(serving=None, state=ServerState.JOINING)) as metrics:
        port = int(re.search(r":(\d+)/", metrics.url)[1])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        silent[0][1].write(b"GET /metr")
        assert (await ask(metrics))[0] == ""
        assert [await reader.read() for reader, _ in silent] == [b"", b""]
        assert "200" in (await ask(metrics))[0]
        for _, writer in silent:
            writer.close()
            await writer.wait_closed()


async def test_a_port_in_use_is_said_at_once():
    """Before any block is loaded, with the port's number."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            await MetricsServer.start(ServerCollector(SimpleNamespace()), host="127.0.0.1", port=port)
    with pytest.raises(ConfigError, match="99999"):
        await MetricsServer.start(ServerCollector(SimpleNamespace()), host="127.0.0.1", port=99999)
