"""An answer ends with its client: one that is gone, one that doesn't read, and a server that stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarm.api.admission import Admission
from swarm.api.engine import Engine
from swarm.api.generation import Job
from swarm.api.models import ServedModel
from swarm.api.replies import Header, TextForm
from swarm.api.sampling import Sampling
from swarm.api.streaming import GeneratedResponse
from swarm.client.cache import BlockService
from tests.client.conftest import Pair


@pytest.fixture
def admission() -> Admission:
    return Admission(max_rows=1, max_waiting=1, max_wait_s=60.0)


@pytest.fixture
def response(served: ServedModel, pair: Pair, admission: Admission) -> GeneratedResponse:
    """A stream of forty tokens, for a client that is patient for a moment."""

    @asynccontextmanager
    async def service_of(account: str) -> AsyncIterator[BlockService]:
        yield pair.service

    job = Job(model=served, prompt=(3, 4, 5), rows=1, max_tokens=40, sampling=Sampling(logit_bias=((20, 100.0),)))
    header = Header(id="x", created=0, model="m", fingerprint="f")
    form = TextForm(header, served.prompts.spell, with_logprobs=False, with_usage=False)
    return GeneratedResponse(
        Engine(admission, service_of), [job], "ann", form, stream=True, include_usage=False, send_timeout_s=0.05
    )


async def never() -> dict[str, Any]:
    """A client that stays."""
    await asyncio.Event().wait()
    raise AssertionError


class Client:
    """Takes so many messages, and no more."""

    def __init__(self, patience: int):
        self.patience = patience
        self.bodies: list[bytes] = []
        self.has_enough = asyncio.Event()

    async def send(self, message: Any) -> None:
        if len(self.bodies) >= self.patience:
            self.has_enough.set()
            await asyncio.Event().wait()
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])

    async def receive(self) -> dict[str, Any]:
        await self.has_enough.wait()
        return {"type": "http.disconnect"}


async def test_a_whole_stream_ends_with_done(response: GeneratedResponse, pair: Pair, admission: Admission) -> None:
    """And gives its turn back."""
    client = Client(1000)
    await response({"type": "http"}, never, client.send)
    assert client.bodies[-1] == b"data: [DONE]\n\n"
    assert len(client.bodies) == 41
    assert pair.service.num_open == 0 and admission.queue.free_rows == 1


async def test_a_client_that_does_not_read_is_given_up(
    response: GeneratedResponse, pair: Pair, admission: Admission
) -> None:
    """Its turn is somebody else's then."""
    client = Client(3)
    await response({"type": "http"}, never, client.send)
    assert len(client.bodies) == 3
    assert pair.service.num_open == 0 and admission.queue.free_rows == 1


async def test_a_client_that_hangs_up_is_noticed_between_tokens(
    response: GeneratedResponse, pair: Pair, admission: Admission
) -> None:
    """Not only when something is sent."""
    client = Client(3)
    await response({"type": "http"}, client.receive, client.send)
    assert pair.service.num_open == 0 and admission.queue.free_rows == 1


async def test_a_server_that_stops_cancels_its_answers(
    response: GeneratedResponse, pair: Pair, admission: Admission
) -> None:
    """And they end before it does; being told twice changes nothing."""
    client = Client(3)
    task = asyncio.ensure_future(response({"type": "http"}, never, client.send))
    await client.has_enough.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    async with admission.hold("next", 1):  # the second cancellation may have overtaken the first one's end
        pass
    assert pair.service.num_open == 0 and admission.queue.free_rows == 1
