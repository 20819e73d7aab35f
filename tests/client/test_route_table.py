"""The table of routes: made once for all who ask, anew when something has changed, and large ones beside the loop."""

import asyncio
import threading
from typing import Any, cast

import pytest

from swarm.client import route_table as module
from swarm.client.observed import Observed
from swarm.client.route_table import LIFE_S, RouteTable
from swarm.types import BlockRange

from .test_peers import record


class FakeDirectory:
    version = 1
    online = (record("a"), record("b"))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The threads in which tables were made."""
    threads = []

    def make_router(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return router(*args, **options)

    router = module.Router
    monkeypatch.setattr(module, "Router", make_router)
    return threads


@pytest.fixture
def table() -> RouteTable:
    return RouteTable(cast(Any, FakeDirectory()), Observed(), None)


@pytest.mark.asyncio
async def test_a_table_is_made_anew_when_there_is_news_or_it_is_old(table, made, monkeypatch):
    """And when its owner says so; else the one that is there will do."""
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    first = await table.fresh()
    assert await table.fresh() is first is table.latest
    table._directory.version += 1
    second = await table.fresh()
    assert second is not first and second.version == 2
    now += LIFE_S + 0.1
    third = await table.fresh()
    table.expire()
    assert await table.fresh() is not third and len(made) == 4


@pytest.mark.asyncio
async def test_a_large_table_is_made_once_in_a_thread_for_all_who_ask(table, made, monkeypatch):
    """Sessions of a gateway go on meanwhile."""
    monkeypatch.setattr(module, "LARGE", 2)
    found = await asyncio.gather(*(table.fresh() for _ in range(5)))
    assert len(made) == 1 and made[0] != threading.current_thread().name
    assert all(it is found[0] for it in found)
    assert found[0].router.fastest(BlockRange(0, 2)).hops


@pytest.mark.asyncio
async def test_who_gives_up_waiting_takes_the_table_from_nobody(table, made, monkeypatch):
    """A cancelled route is one of several that want it."""
    monkeypatch.setattr(module, "LARGE", 2)
    impatient, patient = (asyncio.create_task(table.fresh()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).records.keys() == {"a", "b"} and len(made) == 1
