"""Canaries with a prober that never touches a network: what comes of each, and how often files are looked for."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.errors import RouteNotFound, UnknownModel
from swarm.health import canary as canary_module
from swarm.health.canary import MAX_MODELS, Canaries
from swarm.health.state import Model
from swarm.types import BlockRange, Hop
from tests.health.fakes import peer_ids, random_model


class FakeProber:
    """Does what it is told to."""

    made: list["FakeProber"]
    failure: Exception | None = None

    def __init__(self, initial_peers: Any, credentials: Any) -> None:
        self.initial_peers, self.credentials = initial_peers, credentials
        self.looked_for, self.probed = list[str](), list[str]()
        self.is_closed = False
        FakeProber.made.append(self)

    def add_checkpoint(self, name: str) -> None:
        self.looked_for.append(name)
        if name == "missing":
            raise UnknownModel("no such model")

    def has_checkpoint(self, digest: str) -> bool:
        return "model-0" in self.looked_for and digest.startswith("0000")

    def probe(self, target: Any) -> Any:
        self.probed.append(target.name)
        if self.failure is not None:
            raise self.failure
        route = (Hop(peer_id=peer_ids(1)[0], blocks=BlockRange(0, 30)),)
        text = " Paris\x1b[2J" if self.has_checkpoint(target.digest) else None
        return SimpleNamespace(text=text, first_s=0.1, next_s=0.02, route=route)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def prober(monkeypatch: pytest.MonkeyPatch) -> type[FakeProber]:
    """In place of the real one."""
    from swarm.client import probe

    FakeProber.made, FakeProber.failure = [], None
    monkeypatch.setattr(probe, "Prober", FakeProber)
    return FakeProber


def models(count: int) -> list[Model]:
    return [random_model(1, digest=f"{number:04x}" * 16, name=f"model-{number}") for number in range(count)]


async def rounds(canaries: Canaries, num_news: int, news: list[int]) -> None:
    """Run until so many canaries have come back or not."""
    task = asyncio.create_task(canaries.run())
    async with asyncio.timeout(20):
        while len(news) < num_news:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    await canaries.close()


def make_canaries(present: list[Model], *checkpoints: str) -> tuple[Canaries, list[int]]:
    news: list[int] = []
    canaries = Canaries(
        lambda: ["addr"],
        checkpoints,
        models=lambda: [(model, 64) for model in present],
        on_news=lambda: news.append(1),
        period_s=0.01,
    )
    return canaries, news


async def test_a_model_whose_files_are_here_says_words_and_others_do_not(prober: type[FakeProber]) -> None:
    """Words are made printable, hops get their servers' names."""
    present = models(2)
    canaries, news = make_canaries(present, "model-0")
    await rounds(canaries, 2, news)
    first, second = (canaries.last[model.digest] for model in present)
    assert first.ok and first.has_text and first.text == " Paris\N{REPLACEMENT CHARACTER}[2J"
    assert second.ok and not second.has_text and second.text is None
    assert (first.first_ms, first.next_ms) == (100.0, 20.0)
    assert first.route[0].name == present[0].servers[0].label
    assert prober.made[0].initial_peers == ["addr"] and prober.made[0].is_closed


async def test_files_are_looked_for_once_and_only_if_the_swarm_has_the_model(prober: type[FakeProber]) -> None:
    """A model that nobody serves is not converted or downloaded; one that isn't here is not looked for each minute."""
    canaries, news = make_canaries(models(1), "model-0", "model-7")
    await rounds(canaries, 3, news)
    assert prober.made[0].looked_for == ["model-0"] and len(prober.made) == 1
    broken = [random_model(1, name="missing")]
    canaries, news = make_canaries(broken, "missing")
    await rounds(canaries, 3, news)
    assert prober.made[1].looked_for == ["missing"] and canaries.last[broken[0].digest].ok


async def test_a_canary_that_does_not_come_back_says_why(prober: type[FakeProber]) -> None:
    """It is counted, and the next one is sent all the same."""
    prober.failure = RouteNotFound("no server holds blocks 3:6")
    present = models(1)
    canaries, news = make_canaries(present)
    await rounds(canaries, 2, news)
    canary = canaries.last[present[0].digest]
    assert not canary.ok and canary.error == "no server holds blocks 3:6" and canary.route == ()
    assert canaries.num_lost[present[0].digest] == canaries.num_sent[present[0].digest] >= 2


async def test_not_every_model_of_a_large_swarm_gets_one(prober: type[FakeProber]) -> None:
    """Strangers can't make the page busy with made-up models."""
    canaries, news = make_canaries(models(MAX_MODELS + 5))
    await rounds(canaries, MAX_MODELS + 1, news)
    assert set(prober.made[0].probed) == {f"model-{number}" for number in range(MAX_MODELS)}


async def test_a_page_that_stops_makes_no_client_any_more(prober: type[FakeProber]) -> None:
    """The thread may be importing what a client needs just then: it would join the swarm with nobody to close it."""
    canaries, _ = make_canaries(models(1))
    await canaries.close()
    canary = canaries._send(models(1)[0], 64)
    assert not canary.ok and prober.made == []


async def test_models_that_come_and_go_are_not_remembered_for_ever(prober, monkeypatch) -> None:
    """Digests are claims that cost nothing."""
    monkeypatch.setattr(canary_module, "MAX_REMEMBERED", 3)
    present = models(1)
    canaries, news = make_canaries(present)
    canaries._on_news = lambda: (news.append(1), present.__setitem__(0, models(len(news) + 1)[-1]))
    await rounds(canaries, 6, news)
    assert len(canaries.last) == len(canaries.num_sent) == 3 and len(canaries.num_lost) <= 3
