"""Whatever a stranger sends, the API answers in time, in OpenAI's form, and never with a 500."""

import json
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.api.config import ApiLimits
from swarm.api.keys import Keys, add_key
from swarm.errors import RouteNotFound
from swarm.rates import Rate
from swarm.web import impatient
from tests.api.conftest import RunningApi
from tests.api.test_requests import bodies
from tests.client.conftest import Pair

LIMITS = ApiLimits(max_tokens=3, max_rows_per_request=2, max_body_bytes=4096, body_timeout_s=5.0)
TIMEOUT_S = 60.0
JSON = {"Content-Type": "application/json"}
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions"])

COMMON: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 2),
    "max_tokens": st.none() | st.integers(1, 3),
    "temperature": st.none() | st.floats(0, 2) | st.sampled_from([1e-300, 1e-6]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 200),
    "seed": st.integers(-(1 << 63), (1 << 63) - 1),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.sampled_from(["w", " ", "1", "w5"]), max_size=3),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 95).map(str), st.floats(-100, 100), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.none() | st.fixed_dictionaries({"include_usage": st.booleans()}),
    "ignore_eos": st.booleans(),
}
contents = st.none() | st.text(max_size=8) | st.just([{"type": "text", "text": "w3"}])
roles = st.sampled_from(["user", "system", "developer", "assistant"])
chats = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=3)},
    optional={**COMMON, "logprobs": st.just(True), "max_completion_tokens": st.integers(1, 3)},
).map(lambda fields: ("/v1/chat/completions", fields))
words = st.sampled_from(["w3", "w4 w5", "w94 unheard-of words"])
ids = st.lists(st.integers(0, 95), min_size=1, max_size=4)
texts = st.fixed_dictionaries(
    {"prompt": words | ids | st.lists(words, min_size=1, max_size=1) | st.lists(ids, min_size=1, max_size=1)},
    optional={**COMMON, "logprobs": st.integers(0, 20)},
).map(lambda fields: ("/v1/completions", fields))


@pytest.fixture
def api(serve: Callable[..., RunningApi]) -> RunningApi:
    return serve(limits=LIMITS)


@pytest.fixture
def connection(api: RunningApi) -> Iterator[HTTPConnection]:
    connection = HTTPConnection("127.0.0.1", api.port, timeout=TIMEOUT_S)
    yield connection
    connection.close()


@pytest.fixture
def raw(api: RunningApi) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", api.port), timeout=TIMEOUT_S) as raw:
        yield raw


def post(connection: HTTPConnection, path: str, body: bytes, headers: dict[str, str] = JSON) -> tuple[int, Any]:
    """Status and answer; a stream's answer is its text."""
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    return response.status, content.decode() if is_stream else json.loads(content)


def read(raw: socket.socket) -> HTTPResponse:
    """The answer on a socket."""
    response = HTTPResponse(raw)
    response.begin()
    return response


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS, body=st.binary(max_size=32) | bodies.map(lambda it: json.dumps(it).encode()))
def test_anything_posted_is_refused_in_openais_form(connection: HTTPConnection, path: str, body: bytes) -> None:
    """Bytes, and JSON with the right names and wrong values."""
    status, answer = post(connection, path, body)
    assert status in (400, 404)
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=chats | texts)
def test_any_request_in_range_is_answered(
    connection: HTTPConnection, pair: Pair, request: tuple[str, dict[str, Any]]
) -> None:
    """In any combination of settings; no failure of ours, and no session is left."""
    path, fields = request
    status, answer = post(connection, path, json.dumps({"model": pair.path.name, **fields}).encode())
    assert status == 200, answer
    if isinstance(answer, str):
        assert answer.endswith("data: [DONE]\n\n") and '"error"' not in answer
    else:
        assert len(answer["choices"]) == fields.get("n", 1)
        assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])
    assert pair.service.num_open == 0


def test_a_body_that_is_too_large_is_refused(connection: HTTPConnection) -> None:
    """However its length is told."""
    status, answer = post(connection, "/v1/completions", b" " * 5000)
    assert status == 413 and "4096" in answer["error"]["message"]
    connection.close()
    connection.request("POST", "/v1/completions", iter([b" " * 3000] * 2), JSON, encode_chunked=True)
    assert connection.getresponse().status == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_web_page_can_send_unasked_is_refused(connection: HTTPConnection, kind: str) -> None:
    """Or else any page could use the API of whoever reads it."""
    status, answer = post(connection, "/v1/completions", b"{}", {"Content-Type": kind})
    assert status == 415 and kind in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/%00%ff", 404),
        ("GET", "/../keys.txt", 404),
        ("GET", "/" + "x" * 5000, 404),
    ],
)
def test_other_paths_and_methods_are_errors_too(
    connection: HTTPConnection, method: str, path: str, status: int
) -> None:
    """In the same form."""
    connection.request(method, path)
    response = connection.getresponse()
    assert response.status == status
    assert json.loads(response.read())["error"]["message"]


@pytest.mark.parametrize("head", [b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000])
def test_what_is_no_http_is_hung_up_on(raw: socket.socket, head: bytes) -> None:
    """Garbage, and heads without end."""
    raw.sendall(head)
    assert read(raw).status == 400


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: "])
def test_a_slow_head_is_hung_up_on(
    serve: Callable[..., RunningApi], monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    """Also when nothing comes at all."""
    monkeypatch.setattr(impatient, "HEAD_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", serve().port), timeout=TIMEOUT_S) as raw:
        raw.sendall(start)
        assert raw.recv(100) == b""


def test_a_second_slow_head_is_hung_up_on(serve: Callable[..., RunningApi], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that behaved before."""
    monkeypatch.setattr(impatient, "HEAD_TIMEOUT_S", 1.0)
    with socket.create_connection(("127.0.0.1", serve().port), timeout=TIMEOUT_S) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read(raw).read() == b'{"status":"ok"}'
        raw.sendall(b"GET")
        assert raw.recv(100) == b""


@pytest.mark.parametrize("has_keys", [False, True])
def test_a_page_elsewhere_that_takes_our_address_for_its_own_is_refused(
    serve: Callable[..., RunningApi], tmp_path: Path, has_keys: bool
) -> None:
    """Where there are no keys that it would need, the name by which it calls us gives it away."""
    add_key(tmp_path / "keys", "ann")
    api = serve(keys=Keys([tmp_path / "keys"]) if has_keys else None)
    answer = httpx2.get(f"{api.url}/healthz", headers={"Host": f"evil.example:{api.port}"})
    assert answer.status_code == (200 if has_keys else 403)
    assert httpx2.get(f"{api.url}/healthz").status_code == 200


def test_many_who_ask_for_health_cost_one_look_at_the_swarm(
    serve: Callable[..., RunningApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good or bad, it is told again for a second."""
    monkeypatch.setattr("swarm.api.gateway.HEALTH_VALID_S", 60.0)
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        raise RouteNotFound("no server for blocks 0:2")

    api = serve(look)
    answers = [httpx2.get(f"{api.url}/healthz") for _ in range(3)]
    assert {answer.status_code for answer in answers} == {503} and len(looks) == 1


@pytest.mark.parametrize("has_keys", [False, True])
def test_who_asks_too_often_is_told_when_to_come_back(
    serve: Callable[..., RunningApi], tmp_path: Path, has_keys: bool
) -> None:
    """429 with Retry-After, for one account, or for one address where there are no keys; others are served."""
    keys = [add_key(tmp_path / "keys", name) for name in ("ann", "bob")]
    limits = ApiLimits(request_rate=Rate(burst=2, per_s=0.1))
    api = serve(limits=limits, keys=Keys([tmp_path / "keys"]) if has_keys else None)

    def ask(key: str, source: str) -> tuple[int, str | None]:
        connection = HTTPConnection("127.0.0.1", api.port, timeout=TIMEOUT_S, source_address=(source, 0))
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        with connection.getresponse() as response:
            response.read()
            status = response.status, response.headers["retry-after"]
        connection.close()
        return status

    assert [ask(keys[0], "127.0.0.1")[0] for _ in range(2)] == [200, 200]
    status, retry_after = ask(keys[0], "127.0.0.1")
    assert status == 429 and 1 <= int(retry_after or 0) <= 10
    assert ask(keys[0], "127.0.0.2")[0] == (429 if has_keys else 200)
    assert ask(keys[1], "127.0.0.1")[0] == (200 if has_keys else 429)


def test_a_slow_body_gets_an_answer(serve: Callable[..., RunningApi]) -> None:
    """408, and its connection ends."""
    api = serve(limits=ApiLimits(body_timeout_s=0.05))
    with socket.create_connection(("127.0.0.1", api.port), timeout=TIMEOUT_S) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        raw.sendall(b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert read(raw).status == 408
