"""A real browser for tests of pages: headless Chromium, driven by Playwright.

Chromium is Debian's, or any other that is installed. Where there is none, tests that ask for the fixture are skipped;
under CI, where .ci/run installs it, its absence is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; $CHROMIUM names another."""
    candidates = (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES))
    return next((path for path in candidates if path and Path(path).is_file()), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A `playwright.sync_api.Browser`; make contexts and pages of it."""
    path = find_chromium()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium is installed; .ci/run should have installed it")
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()
