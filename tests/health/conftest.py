"""Real swarms of a tiny model, and pages that look at them, all on loopback in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.client.runtime import LoopThread
from swarm.health.monitor import Settings
from swarm.health.serving import Page
from tests.browser import browser
from tests.integration.conftest import LocalSwarm, save_tiny_llama

__all__ = ["browser"]


class LocalPage:
    """A page on an event loop in a thread.

    Args:
        initial_peers: of the swarm.
        history: its file.
    """

    def __init__(self, initial_peers: tuple[str, ...], history: Path | str, **settings: Any):
        chosen = {"period_s": 1.0, "has_canary": False, **settings}
        self._loop = LoopThread("health-page")
        self._page = self._loop.run(
            Page.start(Settings(initial_peers=initial_peers, **chosen), host="127.0.0.1", port=0, history=history),
            60,
        )
        self.monitor, self.url = self._page.monitor, self._page.url

    def refresh(self) -> Any:
        """Look at the swarm now; the new state."""
        return self._loop.run(self.monitor.refresh(), 30)

    def run(self, coroutine: Any) -> Any:
        """Run something on the page's loop."""
        return self._loop.run(coroutine, 30)

    def close(self) -> None:
        """End it."""
        self._loop.run(self._page.close(), 30)
        self._loop.stop()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def make_swarm(tiny_llama: Path) -> Iterator[Callable[..., LocalSwarm]]:
    """Swarms with a named server for each span."""
    made: list[LocalSwarm] = []

    def make(*spans: str) -> LocalSwarm:
        swarm = LocalSwarm(tiny_llama)
        made.append(swarm)
        for blocks in spans:
            swarm.add_server(blocks, public_name=f"server-{blocks}")
        return swarm

    yield make
    for swarm in made:
        swarm.close()


@pytest.fixture
def make_page(tmp_path: Path) -> Iterator[Callable[..., LocalPage]]:
    """Pages that look at a swarm."""
    made: list[LocalPage] = []

    def make(*initial_peers: str, **settings: Any) -> LocalPage:
        made.append(LocalPage(initial_peers, tmp_path / f"history-{len(made)}", **settings))
        return made[-1]

    yield make
    for page in made:
        page.close()
