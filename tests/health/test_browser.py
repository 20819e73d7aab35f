"""The page in a real browser: it renders, follows the swarm, says nothing on the console, and fits a phone."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from swarm.health.state import Status

PHONE = {"width": 375, "height": 667}
WIDE = {"width": 1280, "height": 900}


@contextmanager
def opened(browser: Any, url: str, *, size: dict[str, int] = WIDE, **options: Any) -> Iterator[Any]:
    """A page of its own; at the end, nothing must have been said on its console nor loaded from elsewhere."""
    context = browser.new_context(viewport=size, **options)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else said.append(request.url))
    page.goto(url)
    try:
        yield page
        assert said == []
    finally:
        context.close()


@pytest.fixture
def swarm_and_page(browser: Any, make_swarm, make_page):
    """Three servers, seen by a page; the browser is asked for first, so that its absence skips before all that."""
    swarm = make_swarm("0:3", "3:6", "1:5")
    page = make_page(swarm.address)
    while not page.refresh().models:
        pass
    return swarm, page


def test_it_renders_and_follows_a_server_that_dies(browser: Any, swarm_and_page):
    """The dead server changes in the table, the picture and the verdict, without a reload, and nothing else moves."""
    swarm, local = swarm_and_page
    with opened(browser, local.url) as page:
        page.locator("body.is-live").wait_for()
        assert page.title().startswith("tiny-llama: at risk")
        assert page.locator("h2", has_text="tiny-llama").is_visible()
        assert page.locator(".lanes .bar").count() == 3 and page.locator(".servers tbody tr").count() == 3
        page.evaluate("window.stayed = true")
        page.locator("label", has_text="week").click()
        swarm.remove_server(swarm.servers[1], politely=False)
        page.locator(".servers tr.s-unreachable", has_text="server-3:6").wait_for(timeout=30_000)
        page.locator(".lanes .b-unreachable").wait_for()
        assert page.locator(".verdict").first.inner_text() == "incomplete"
        assert "Nobody serves block 5:6" in page.locator(".reason").first.inner_text()
        assert page.evaluate("window.stayed") and page.locator("input[value=week]").is_checked()
        assert page.locator(".w-week").is_visible() and not page.locator(".w-hour").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(browser: Any, swarm_and_page, scheme: str):
    """Nothing is wider than 375 pixels, every text is large enough, and text stands out from its ground."""
    _, local = swarm_and_page
    with opened(browser, local.url, size=PHONE, color_scheme=scheme) as page:
        page.locator("body.is-live").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate(SMALLEST_TEXT) >= 10
        assert page.evaluate(LEAST_CONTRAST) >= 4.5


def test_names_without_spaces_do_not_widen_a_phones_page(browser: Any, make_page, make_swarm):
    """Long names of strangers wrap or are cut."""
    swarm = make_swarm()
    swarm.add_server("0:6", public_name="W" * 32)
    local = make_page(swarm.address)
    while not local.refresh().models:
        pass
    with opened(browser, local.url, size=PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_it_works_with_a_keyboard_and_without_scripts(browser: Any, swarm_and_page):
    """The first Tab leads past the header; headings are in order; without scripts everything is there, too."""
    _, local = swarm_and_page
    with opened(browser, local.url) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the models"
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(it => Number(it.tagName[1]))")
        assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
        assert page.evaluate("[...document.querySelectorAll('svg[role=img]')].every(it => it.ariaLabel)")
    with opened(browser, local.url, java_script_enabled=False) as page:
        assert page.locator(".servers tbody tr").count() == 3


def test_it_says_when_it_is_alone(browser: Any, make_swarm, make_page):
    """The page's server stops: the browser says that the connection is lost, and does not pretend to be live."""
    swarm = make_swarm("0:6")
    local = make_page(swarm.address)
    assert local.refresh().models[0].servers[0].status is Status.ONLINE
    context = browser.new_context()
    page = context.new_page()
    page.goto(local.url)
    page.locator("body.is-live").wait_for()
    local.run(_stop(local))
    page.get_by_text("connection lost").wait_for()
    assert page.locator("body.is-live").count() == 0
    context.close()


async def _stop(local: Any) -> None:
    local.monitor.dismiss()


SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("body *")]
  .filter((it) => !it.closest("svg") && [...it.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
  .filter((it) => it.getBoundingClientRect().width > 1)
  .map((it) => parseFloat(getComputedStyle(it).fontSize)))
"""
LEAST_CONTRAST = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (it) => {
    for (; it; it = it.parentElement) {
      const colour = getComputedStyle(it).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const texts = [...document.querySelectorAll("body *")]
    .filter((it) => !it.closest("svg, script, noscript"))
    .filter((it) => [...it.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return Math.min(...texts.map((it) => {
    const [a, b] = [light(getComputedStyle(it).color), light(ground(it))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
})()
"""
