"""`python tests/health/make_screenshot.py`: docs/images/health.png, the page of a simulated swarm of 14 servers."""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from playwright.sync_api import sync_playwright  # noqa: E402

from swarm.health.serving import PageServer  # noqa: E402
from tests.browser import find_chromium  # noqa: E402
from tests.health.fakes import FakeMonitor, fresh_monitor  # noqa: E402

TARGET = ROOT / "docs" / "images" / "health.png"


class LiveMonitor(FakeMonitor):
    """Keeps those who watch waiting, as a real one does between two looks."""

    async def watch(self) -> AsyncIterator[int]:
        yield self.revision
        await asyncio.Event().wait()


def main() -> None:
    """Serve the page, photograph it."""
    made = fresh_monitor(14, seed=2)
    monitor = LiveMonitor(made.state, made.trends)
    listener = socket.create_server(("127.0.0.1", 0))
    server = PageServer(monitor)  # type: ignore[arg-type]
    threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        page.locator("body.is-live").wait_for()
        page.screenshot(path=TARGET, clip={"x": 0, "y": 0, "width": 1240, "height": 1720}, full_page=True)
        browser.close()
    server.should_exit = True


if __name__ == "__main__":
    main()
