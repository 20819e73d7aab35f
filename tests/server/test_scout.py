"""A server measures its neighbours, tells what it found, and forgets those that are gone."""

import asyncio

import numpy as np
import pytest

from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.errors import PeerTimeout
from swarm.pings import Pinger
from swarm.registry import MAX_PINGS, peer_tag
from swarm.server import scout as scout_module
from swarm.server.scout import Scout
from swarm.types import BlockRange, ServerState
from tests.swarm.test_directory import FakeRegistry, record
from tests.swarm.test_pings import FakeTransport

HERE = Place(position=(0.0, 0.0, 0.0), height_s=0.001, error=0.2)
FAR = Place(position=(0.08, 0.0, 0.0), height_s=0.001, error=0.2)


def scout_of(records, transport) -> tuple[Scout, FakeRegistry]:
    registry = FakeRegistry({0: records})
    generator = np.random.default_rng(0)
    pinger = Pinger(transport, generator, now=lambda: transport.now)
    directory = Directory(registry, model="0" * 64, num_blocks=24)
    return Scout(pinger, directory, own_id="own", blocks=BlockRange(0, 4), generator=generator), registry


async def test_what_is_measured_is_told_and_gives_a_place():
    """Never of ourselves, nor of those that leave; a newcomer's place is of use after the first look."""
    transport = FakeTransport({"near": 0.004, "far": 0.09, "leaves": 0.01})
    records = [
        record("own"),
        record("near", blocks=BlockRange(4, 8), place=HERE),
        record("far", blocks=BlockRange(4, 8), place=FAR),
        record("leaves", blocks=BlockRange(4, 8), state=ServerState.DRAINING),
    ]
    scout, _ = scout_of(records, transport)
    assert scout.place.error == 1.0 and scout.pings == ()
    await scout.look()
    assert [(ping.tag, ping.rtt_s) for ping in scout.pings] == [
        (peer_tag("near"), pytest.approx(0.004)),
        (peer_tag("far"), pytest.approx(0.09)),
    ]
    assert scout.place.error < 0.7
    assert scout.place.position[0] < 0.04


async def test_no_more_is_told_than_a_record_holds_and_the_absent_are_forgotten():
    names = [f"p{index}" for index in range(20)]
    transport = FakeTransport({name: 0.01 * (1 + index) for index, name in enumerate(names)})
    scout, registry = scout_of([record(name, blocks=BlockRange(4, 8), place=HERE) for name in names], transport)
    for _ in range(20):
        await scout.look()
    assert len(scout.pings) == MAX_PINGS
    registry.shards[0] = registry.shards[0][:1]
    scout._directory._refreshed_at = float("-inf")
    await scout.look()
    assert [ping.tag for ping in scout.pings] == [peer_tag("p0")]


async def test_a_look_at_nobody_who_answers_ends(monkeypatch: pytest.MonkeyPatch):
    """What goes wrong with others is no trouble of ours, and takes a bounded time."""
    transport = FakeTransport({"dead": 0.01, "hangs": 0.01})
    transport.errors = {"dead": PeerTimeout("silent", peer_id="dead")}
    scout, _ = scout_of([record("dead", blocks=BlockRange(4, 8)), record("hangs", blocks=BlockRange(4, 8))], transport)
    monkeypatch.setattr(scout_module, "LOOK_TIMEOUT_S", 0.05)
    call = transport.call

    async def hanging(peer_id, *args, **kwargs):
        if peer_id == "hangs":
            await asyncio.Event().wait()
        await call(peer_id, *args, **kwargs)

    transport.call = hanging
    await asyncio.wait_for(scout.look(), 10)
    assert scout.pings == ()
