"""The page as text: it says what the state says, is small, and no stranger's word becomes markup."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.adapters.notes import MAX_NOTES, AdapterNote
from swarm.health.compose import compose_model
from swarm.health.history import Contributor
from swarm.health.monitor import Trends
from swarm.health.pages import PAGE_ROWS, render_badge, render_page
from swarm.health.state import Model, Verdict
from tests.health.fakes import (
    DIGEST,
    NOW,
    make_canary,
    make_entry,
    make_record,
    make_state,
    make_trends,
    peer_ids,
    random_model,
)

EVIL = "<script>alert('x')</script>\"'><img src=x onerror=y>&amp;"


class Outline(HTMLParser):
    """What elements and attributes a page has."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]


def page(*models: Model, trends: Trends | None = None, **options) -> str:
    return render_page(make_state(*models), trends or Trends(), revision=3, **options)


def test_it_says_what_the_state_says():
    """Name, verdict, every server, the canary's text."""
    model = random_model(8)
    text = page(model)
    assert model.name in text and f">{model.verdict}<" in text and "Paris." in text
    assert all(server.label in text for server in model.servers)
    assert f"<title>{model.name}: {model.verdict}" in text


@pytest.mark.parametrize("num_servers", [0, 1, 64, 2000])
def test_it_is_small_however_many_servers_there_are(num_servers: int):
    """At most 200 KB with style and script, before compression."""
    from swarm.health.pages import FOLDER

    model = random_model(num_servers, num_blocks=80)
    notes = tuple(AdapterNote.of(f"{number:02x}" * 32, 16, on_device=number < 2) for number in range(MAX_NOTES))
    adapters = compose_model(
        make_entry(2),
        [make_record(peer_ids(1)[0], "0:2", adapters=notes)],
        {},
        canary=None,
        before=None,
        now=NOW,
    )
    with_adapters = [msgspec.structs.replace(it, adapters=adapters.servers[0].adapters) for it in model.servers]
    model = msgspec.structs.replace(model, servers=tuple(with_adapters))
    text = page(model, trends=make_trends(model))
    static = sum(path.stat().st_size for path in (FOLDER / "static").iterdir())
    assert len(text.encode()) + static <= 200_000


def test_a_server_says_which_adapters_it_has():
    """The first ones to be seen at once, all of them in the title; nothing where there are none."""
    notes = tuple(AdapterNote.of(f"{number:02x}" * 32, 16, on_device=number < 2) for number in range(5))
    record = make_record(peer_ids(1)[0], "0:2", adapters=notes)
    model = compose_model(make_entry(2), [record], {}, canary=None, before=None, now=NOW)
    text = page(model)
    assert "5 adapters, 2 on the device" in text
    assert "<code>00000000 r16</code>, <code>01010101 r16</code>, …" in text and "<code>02" not in text
    assert "00000000 r16 on the device, 01010101 r16 on the device, 02020202 r16" in text
    assert "04040404" in text
    assert "on the device" not in page(random_model(8))


def test_many_models_have_a_line_each_and_a_page_of_their_own():
    """The first page stays small; every model is one click away."""
    models = [random_model(30, digest=f"{number:04x}" * 16, name=f"org/model-{number}") for number in range(32)]
    text = page(*models)
    assert len(text.encode()) <= 200_000
    assert all(f"org/model-{number}<" in text for number in range(32))
    assert text.count('class="model"') == 2
    own = page(*models, digest="0005")
    assert own.count('class="model"') == 1 and '<h2 id="m-000500050005-title">org/model-5</h2>' in own


def test_a_long_table_has_pages():
    """Each server is on exactly one; a page beyond the last is the last."""
    model = random_model(200)
    count = -(-200 // PAGE_ROWS)
    texts = [page(model, digest=DIGEST, number=number) for number in range(1, count + 1)]
    rows = [re.findall(r'<tr class="s-', text) for text in texts]
    assert sum(map(len, rows)) == 200 and max(map(len, rows)) == PAGE_ROWS
    assert page(model, digest=DIGEST, number=99) == texts[-1]


@settings(max_examples=25)
@given(st.text(min_size=1, max_size=40) | st.just(EVIL))
def test_no_strangers_text_becomes_markup(text: str):
    """Names, errors, versions, a model's words: all are shown, none is obeyed."""
    clean, strange = (_with_texts(word) for word in ("word", text))
    assert Outline(strange).tags == Outline(clean).tags
    assert not [name for name, _ in Outline(strange).attributes if name.startswith("on") or name == "style"]


def _with_texts(text: str) -> str:
    model = random_model(18)
    servers = tuple(
        msgspec.structs.replace(server, name=text, version=text, quantization=text or "none", trouble=text or "x")
        for server in model.servers
    )
    canary = msgspec.structs.replace(make_canary([], NOW), text=text)
    model = msgspec.structs.replace(model, servers=servers, name=text, reason=text, canary=canary)
    who = Contributor(name=text, num_servers=1, block_hours=1.0, num_tokens=1)
    return render_page(make_state(model), Trends(contributors=(who,)), revision=1)


def test_parts_that_are_replaced_have_ids_and_no_id_comes_twice():
    """The script finds the old part by the new one's id."""
    outline = Outline(page(random_model(5), random_model(5, digest="ab" * 32)))
    assert len(outline.ids) == len(set(outline.ids))
    assert sum(name == "data-live" for name, _ in outline.attributes) >= 12


def test_nothing_comes_from_elsewhere():
    """No address of another host in anything that a browser would load."""
    outline = Outline(page(random_model(5)))
    loaded = [value for name, value in outline.attributes if name in ("src", "href") and value]
    assert loaded and not [value for value in loaded if re.match(r"[a-z]+:|//", value)]


def test_an_empty_swarm_says_what_to_do():
    """Before the first look, and when nobody announces anything."""
    assert "Looking at the swarm" in render_page(make_state(), Trends(), revision=1)
    assert "swarm server" in page()


def test_old_news_is_called_old():
    """When the DHT is silent the page says so."""
    state = make_state(random_model(3), stale_s=95.0)
    assert "has not answered for 1 min" in render_page(state, Trends(), revision=2)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_badge_is_svg_for_every_verdict(verdict: Verdict):
    """It says the model's name and how it is; hostile names are escaped."""
    badge = render_badge(msgspec.structs.replace(random_model(2), verdict=verdict, name=EVIL))
    root = ET.fromstring(badge)
    assert "".join(root.itertext()).count(verdict) == 2 and "script" not in {node.tag for node in root.iter()}


def test_the_badge_of_nothing_says_so():
    """No model yet."""
    assert "no model" in render_badge(None)
