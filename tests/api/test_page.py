"""The chat page in a real browser, at a phone's size, against an API with local blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from swarm.api.config import ApiLimits
from swarm.api.keys import Keys, add_key
from swarm.errors import RouteNotFound
from tests.api.conftest import RunningApi, wait_until
from tests.browser import browser
from tests.client.conftest import Pair

__all__ = ["browser"]

PHONE = {"width": 360, "height": 640}
expect.set_options(timeout=60_000)

LIMITS = ApiLimits(max_tokens=9)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page as large as a phone's; what it complains about on its console fails the test."""
    with browser.new_context(viewport=PHONE) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda it: complaints.append(it.text) if it.type in ("error", "warning") else None)
        page.on("pageerror", lambda it: complaints.append(str(it)))
        yield page
        assert complaints == []


def visit(page: Page, api: RunningApi) -> None:
    """Open the page, and let answers be what they are each time."""
    page.goto(api.url)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Send").click()


def test_a_question_is_answered_with_its_route(page: Page, serve: Callable[..., RunningApi], pair: Pair) -> None:
    """The model by its name, the answer's text, the servers and blocks it went through, and counts."""
    visit(page, serve(limits=LIMITS))
    expect(page.get_by_label("Model")).to_have_value(pair.path.name)
    page.get_by_label("Longest answer").fill("7")
    ask(page, "w3 w4 w5")
    answer = page.locator(".assistant")
    expect(answer.locator(".route")).to_contain_text("7 tokens")
    expect(answer.locator(".route li")).to_have_text(["12D3local blocks 0:3"])
    assert answer.locator("p").inner_text().split()
    assert pair.service.num_open == 0


def test_a_conversation_is_sent_whole(page: Page, serve: Callable[..., RunningApi], pair: Pair) -> None:
    """Until a new one is begun."""
    visit(page, serve(limits=LIMITS))
    for count in (1, 2):
        page.get_by_label("Question").fill("w3 w4")
        page.get_by_label("Question").press("Enter")
        expect(page.locator(".route")).to_have_count(count)
    first, second = (session.steps[0].num_tokens[0] for session in pair.service.sessions)
    assert second > first + 4
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "w3 w4")
    expect(page.locator(".route")).to_have_count(1)
    assert pair.service.sessions[2].steps[0].num_tokens[0] == first


def test_an_answer_comes_word_by_word_and_can_be_stopped(
    page: Page, serve: Callable[..., RunningApi], pair: Pair
) -> None:
    """What was said stays, and the work ends."""
    steps: list[None] = []

    def wait() -> None:
        steps.append(None)
        if len(steps) == 7:  # six words were said
            wait_until(lambda: pair.service.num_open == 0)

    pair.service.before_step = wait
    visit(page, serve())
    ask(page, "w3 w4")
    answer = page.locator(".assistant p")
    expect(answer).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert 1 <= len(answer.inner_text().split()) <= 6
    expect(page.locator(".route")).to_have_count(0)
    wait_until(lambda: pair.service.num_open == 0)


def test_a_failure_is_told_under_what_was_said(page: Page, serve: Callable[..., RunningApi], pair: Pair) -> None:
    """In the swarm's own words; and one can ask again."""
    steps: list[None] = []

    def fail() -> None:
        steps.append(None)
        if len(steps) == 4:
            raise RouteNotFound("nobody serves blocks 1:2", missing=[1])

    pair.service.before_step = fail
    visit(page, serve(limits=LIMITS))
    ask(page, "w3 w4")
    expect(page.locator(".assistant .error")).to_have_text("nobody serves blocks 1:2")
    ask(page, "w3 w4")
    expect(page.locator(".route")).to_have_count(1)


def test_it_fits_a_phone(page: Page, serve: Callable[..., RunningApi]) -> None:
    """Nothing is wider than the screen, and the question can be seen."""
    visit(page, serve(limits=LIMITS))
    ask(page, "w3 " * 60 + "w" * 200)
    expect(page.locator(".route")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.get_by_label("Question")).to_be_in_viewport()


def test_what_is_written_is_no_html(page: Page, serve: Callable[..., RunningApi]) -> None:
    """It is shown as it is."""
    visit(page, serve(limits=LIMITS))
    ask(page, "<img src=x onerror=alert(1)> w3")
    expect(page.locator(".user p")).to_have_text("<img src=x onerror=alert(1)> w3")
    assert page.locator("#log img").count() == 0
    expect(page.locator(".route")).to_have_count(1)


def test_nothing_comes_from_elsewhere(page: Page, serve: Callable[..., RunningApi]) -> None:
    """All requests go to the server itself."""
    api = serve()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(api.url)
    expect(page.get_by_label("Model")).not_to_have_value("")
    assert {"/chat.css", "/chat.js", "/v1/models"} <= {url.removeprefix(api.url) for url in asked}
    assert all(url.startswith(api.url) for url in asked)


def test_a_key_is_kept_and_used(page: Page, serve: Callable[..., RunningApi], pair: Pair, tmp_path: Path) -> None:
    """Where the API needs one."""
    path = tmp_path / "keys.txt"
    key = add_key(path, "ann")
    page.add_init_script(f"localStorage.setItem('key', {key!r})")
    visit(page, serve(keys=Keys([path]), limits=LIMITS))
    expect(page.get_by_label("Model")).to_have_value(pair.path.name)
    ask(page, "w3")
    expect(page.locator(".route")).to_have_count(1)
