"""Whose requests a server without keys takes: those that call it by a name of its own."""

import socket

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from swarm.api.hosts import KnownHosts


async def hello(request: Request) -> PlainTextResponse:
    """The application."""
    return PlainTextResponse("hello")


APP = Starlette(routes=[Route("/", hello)], middleware=[Middleware(KnownHosts, names=["gpu1.lab"])])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST",
        "127.0.0.1:8000",
        "[::1]",
        "[::1]:8000",
        "10.0.0.1:80",
        "gpu1.lab:8000",
        f"{socket.gethostname()}:8000",
    ],
)
def test_our_own_names_and_addresses_are_taken(host: str):
    """With a port or without."""
    assert TestClient(APP).get("/", headers={"Host": host}).text == "hello"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", ":8000", "localhost.evil.example", "127.0.0.1.evil.example", "["]
)
def test_a_page_that_has_renamed_us_is_refused(host: str):
    """Its browser says where it believes to be."""
    answer = TestClient(APP).get("/", headers={"Host": host})
    assert answer.status_code == 403 and "--host NAME" in answer.text
