"""The HTTP side with a monitor that looks at nothing: routes, limits, documents, and what browsers are told."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from swarm.errors import PeerUnreachable
from swarm.health import app as app_module
from swarm.health.app import make_app
from swarm.health.monitor import MAX_WATCHERS
from swarm.health.pages import PAGE_ROWS
from swarm.health.state import State
from tests.health.fakes import FakeMonitor, fresh_monitor, peer_ids
from tests.swarm.private.labs import Lab

DOCUMENT = Path(__file__).parents[2] / "docs" / "health.md"


class FakeTransport:
    """Answers directly, or not at all over p2p; can be held."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    async def call(self, peer_id: str, service: str, message: Any, *, timeout_s: float, carrier: str) -> None:
        self.calls.append((peer_id, carrier))
        if carrier != "direct":
            raise PeerUnreachable("no way\x1b[1m")


@pytest.fixture
def monitor() -> FakeMonitor:
    monitor = fresh_monitor(8)
    monitor.transport = FakeTransport()
    return monitor


@pytest.fixture
def client(monitor: FakeMonitor) -> Iterator[TestClient]:
    with TestClient(make_app(monitor)) as client:  # type: ignore[arg-type]
        yield client


@pytest.mark.parametrize("is_private", [False, True])
def test_pages_elsewhere_may_read_the_api_of_open_swarms_only(monitor: FakeMonitor, is_private: bool):
    """What a member's browser can reach in a private swarm is not for any page that it shows."""
    if is_private:
        monitor.settings = replace(monitor.settings, credentials=Lab().invite())
    with TestClient(make_app(monitor)) as client:  # type: ignore[arg-type]
        for path in ("/api/v1/state", "/api/openapi.json", "/badge.svg"):
            answer = client.get(path, headers={"Origin": "http://elsewhere"})
            assert answer.status_code == 200
            assert ("Access-Control-Allow-Origin" in answer.headers) is not is_private


def test_the_page_is_rendered_once_per_state(client: TestClient, monitor: FakeMonitor, monkeypatch):
    """However many look; a new state renders anew."""
    rendered: list[int] = []
    render = app_module.render_page
    monkeypatch.setattr(app_module, "render_page", lambda *a, **k: rendered.append(k["revision"]) or render(*a, **k))
    for _ in range(3):
        answer = client.get("/")
        assert answer.status_code == 200 and "Coverage" in answer.text
    monitor.revision += 1
    client.get("/")
    assert rendered == [7, 8]


@pytest.mark.parametrize("query", ["?model=zz", "?page=99999999999", "?page=-1", "?page=²", "?model=" + "a" * 5000])
def test_odd_queries_get_a_page_all_the_same(client: TestClient, query: str):
    """Neither an error nor memory for each of them."""
    assert client.get(f"/{query}").status_code == 200


def test_pages_of_invented_queries_are_not_rendered_and_no_more_kept_than_may_be(
    client: TestClient, monitor: FakeMonitor, monkeypatch
):
    """A visitor who invents queries costs neither time nor memory."""
    rendered: list[int] = []
    render = app_module.render_page
    monkeypatch.setattr(app_module, "render_page", lambda *a, **k: rendered.append(1) or render(*a, **k))
    for number in range(6):
        client.get(f"/?model=zz{number}&page={number}")
    assert len(rendered) == 1
    real = monitor.state.models[0].digest
    for number in (1, 50, 99999):
        client.get(f"/?model={real}&page={number}")
    num_pages = -(-len(monitor.state.models[0].servers) // PAGE_ROWS)
    assert len(rendered) == 1 + min(2, num_pages)
    monkeypatch.setattr(app_module, "MAX_PAGES_KEPT", 1)
    monitor.revision += 1
    before = len(rendered)
    for query in ("", f"?model={real}", ""):
        client.get(f"/{query}")
    assert len(rendered) == before + 3


def test_browsers_are_told_that_nothing_comes_from_outside(client: TestClient):
    """On every answer, files and errors included; the API may be read from other pages."""
    for path in ("/", "/static/style.css", "/static/page.js", "/metrics", "/nothing", "/api/v1/state"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"]
        assert ("access-control-allow-origin" in headers) == path.startswith("/api/")


def test_the_state_is_json_and_what_the_document_says(client: TestClient, monitor: FakeMonitor):
    """It reads back as the same state, and every field of it is documented."""
    answer = client.get("/api/v1/state")
    assert answer.headers["content-type"] == "application/json"
    assert msgspec.json.decode(answer.content, type=State) == monitor.state
    document = client.get("/api/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]

    def check(value: Any, schema: dict[str, Any]) -> None:
        if "anyOf" in schema:
            schema = next(it for it in schema["anyOf"] if (value is None) == (it.get("type") == "null"))
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        if isinstance(value, dict):
            assert set(value) <= set(schema["properties"]) and set(schema["required"]) <= set(value)
            for name, item in value.items():
                check(item, schema["properties"][name])
        elif isinstance(value, list) and isinstance(schema.get("items"), dict):
            for item in value:
                check(item, schema["items"])
        elif "enum" in schema:
            assert value in schema["enum"]

    check(
        answer.json(),
        document["paths"]["/api/v1/state"]["get"]["responses"]["200"]["content"]["application/json"]["schema"],
    )
    for name in ("Server", "Model", "State", "Canary"):
        fields = schemas[name]["properties"].values()
        assert all("description" in str(field) for field in fields), f"a field of {name} is not described"


def test_every_path_of_the_document_is_there(client: TestClient):
    """And answers."""
    for path in client.get("/api/openapi.json").json()["paths"]:
        assert client.get(path.replace("{peer}", peer_ids(1)[0])).status_code == 200, path


def test_metrics_are_many_and_documented(client: TestClient, monitor: FakeMonitor):
    """At least 25 that Prometheus can read, each in docs/health.md, as are those that the alerts use."""
    monitor.canaries.num_sent[monitor.state.models[0].digest] = 5
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(families) >= 25
    usable = families["swarm_model_usable"].samples[0]
    assert usable.labels["model"] == monitor.state.models[0].name
    assert families["swarm_canaries"].samples[0].value == 5
    document = DOCUMENT.read_text()
    exposed = {sample.name for family in families.values() for sample in family.samples} | set(families)
    assert not [name for name in families if f"`{name}" not in document]
    used = set(re.findall(r"\b(swarm_(?:model|servers|canar|health)\w*)", document.split("```yaml")[1].split("```")[0]))
    assert used and used <= exposed


def test_a_name_is_no_label(client: TestClient, monitor: FakeMonitor):
    """Names of strangers would make series without bound."""
    text = client.get("/metrics").text
    assert not [it for it in monitor.state.models[0].servers if it.name and f'"{it.name}"' in text]


def test_reachability_is_tried_both_ways_and_remembered(client: TestClient, monitor: FakeMonitor):
    """One dial for many who ask; what the peer's error says is made printable."""
    peer = peer_ids(1)[0]
    for _ in range(3):
        report = client.get(f"/api/v1/reachable/{peer}").json()
    assert report["ok"] and report["direct"]["ok"] and not report["p2p"]["ok"]
    assert "\x1b" not in report["p2p"]["message"] and "no way" in report["p2p"]["message"]
    assert sorted(monitor.transport.calls) == [(peer, "direct"), (peer, "p2p"), (peer, "relay")]


@pytest.mark.parametrize("peer", ["x", "12D3KooW", "Qm" + "1" * 44, "a" * 3000, "12D3KooW" + "0" * 44])
def test_what_is_no_peer_id_is_refused(client: TestClient, monitor: FakeMonitor, peer: str):
    """Without dialling anybody."""
    answer = client.get(f"/api/v1/reachable/{peer}")
    assert answer.status_code == 400 and "12D3KooW" in answer.json()["error"] and not monitor.transport.calls


async def test_visitors_can_have_few_peers_dialled_at_once(monitor: FakeMonitor):
    """The fifth is told to come back; when the others are done, it is served."""
    import httpx2

    gate = asyncio.Event()

    async def held(*_: Any, **__: Any) -> None:
        await gate.wait()

    monitor.transport.call = held
    transport = httpx2.ASGITransport(make_app(monitor))  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://page") as client:
        *peers, late = peer_ids(app_module.MAX_DIALS + 1)
        dials = [asyncio.create_task(client.get(f"/api/v1/reachable/{peer}")) for peer in peers]
        for _ in range(20):
            await asyncio.sleep(0)
        refused = await client.get(f"/api/v1/reachable/{late}")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*dials)} == {200}
        assert (await client.get(f"/api/v1/reachable/{late}")).status_code == 200


def test_news_are_server_sent_events(client: TestClient, monitor: FakeMonitor):
    """The present revision at once; and nobody is let in beyond the limit."""
    answer = client.get("/events")
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text == "data: 7\n\n"
    monitor.num_watchers = MAX_WATCHERS
    assert client.get("/events").status_code == 503


def test_the_badge_is_a_picture_of_one_model(client: TestClient, monitor: FakeMonitor):
    """By the beginning of a digest; an unknown one has no model."""
    assert monitor.state.models[0].verdict in client.get("/badge.svg").text
    assert "no model" in client.get("/badge.svg?model=ffff").text


def test_it_says_whether_it_looks(client: TestClient, monitor: FakeMonitor):
    """Well when it looked just now, not before its first look nor long after its last."""
    assert client.get("/healthz").status_code == 200
    monitor.state = msgspec.structs.replace(monitor.state, at=monitor.state.at - 3600)
    assert client.get("/healthz").status_code == 503
    monitor.num_refreshes = 0
    assert client.get("/healthz").status_code == 503


def test_only_reading_is_possible(client: TestClient):
    """No route takes anything."""
    assert {client.post(path).status_code for path in ("/", "/api/v1/state", "/metrics")} == {405}
    assert client.get("/static/../app.py").status_code == 404
