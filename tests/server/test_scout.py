"""A server measures its neighbours, tells what it found, and notices who is gone long before records expire."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.errors import PeerTimeout
from swarm.pings import NUM_NEAR, NUM_RANDOM, Pinger, RoundTrips
from swarm.registry import MAX_PINGS, peer_tag
from swarm.server import scout as scout_module
from swarm.server.scout import FEW_HOLDERS, MAX_DOUBTS, Scout, doubtful, holding_of
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
    own_blocks = BlockRange(0, 4)
    return Scout(pinger, directory, own_id="own", own_blocks=lambda: own_blocks, generator=generator), registry


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


class FakePinger:
    """Knows who is dead."""

    place = Place()

    def __init__(self, dead=()):
        self.dead, self.asked, self.round_trips = set(dead), [], RoundTrips()

    def rtt_s(self, peer_id):
        return self.round_trips.get(peer_id, 0.0)

    async def ping(self, records):
        ids = [it.peer_id for it in records]
        self.asked += ids
        for peer_id in set(ids) - self.dead:
            self.round_trips.measured(peer_id, 0.01, 0.0)
        return set(ids) & self.dead


def watcher_of(records, dead=()):
    """A scout of a server of 0:4 that is told at once who is dead."""
    registry, pinger = FakeRegistry({0: records}), FakePinger(dead)
    directory = Directory(registry, model="0" * 64, num_blocks=24)
    scout = Scout(
        pinger, directory, own_id="own", own_blocks=lambda: BlockRange(0, 4), generator=np.random.default_rng(0)
    )
    return scout, pinger, registry


def ids(records):
    return {it.peer_id for it in records}


async def test_those_that_do_not_answer_are_left_out_until_they_renew_their_record():
    """A dead neighbour holds nothing; when it comes back with a new record, it does again."""
    records = [record("own"), record("dead", blocks=BlockRange(4, 8)), record("lives", blocks=BlockRange(4, 8))]
    scout, pinger, registry = watcher_of(records, dead=["dead"])
    await scout.look()
    assert ids(scout.others) == {"lives"} and [it.peer_id for it in scout.holdings] == ["lives"]
    pinger.dead.clear()
    registry.shards[0][1] = record("dead", blocks=BlockRange(4, 8), expires_at=time.time() + 61.0)
    await scout.look(max_age_s=0.0)
    assert ids(scout.others) == {"dead", "lives"}


async def test_those_that_are_late_or_silent_are_in_doubt():
    """One of four is silent, another one has not renewed its record in time."""
    late = record("late", expires_at=time.time() + 10.0)
    scout, _, _ = watcher_of([record("a"), record("b"), late, record("dead", blocks=BlockRange(4, 8))], dead=["dead"])
    assert scout.share_in_doubt == 0.0
    await scout.look()
    assert scout.share_in_doubt == 0.5


async def test_the_silent_are_asked_once_more_before_anything_is_done_about_it():
    """A server that was only slow is there again, though it has not renewed its record yet."""
    scout, pinger, _ = watcher_of([record("slow", blocks=BlockRange(4, 8))], dead=["slow"])
    await scout.look()
    assert scout.others == []
    pinger.dead.clear()
    await scout.look()
    assert scout.others == []
    await scout.look(everything=True)
    assert ids(scout.others) == {"slow"}


async def test_servers_that_leave_or_drain_hold_nothing_and_those_that_load_do():
    """Only who serves, or will soon, counts."""
    records = [record(state.name, state=state) for state in ServerState]
    scout, _, _ = watcher_of(records)
    await scout.look()
    assert ids(scout.others) == {"ONLINE", "JOINING"} and scout.loading == {"JOINING"}


async def test_a_death_makes_it_ask_the_few_that_are_left_for_the_same_blocks():
    """All of a range have died at once: it takes one look to know, though only one was a neighbour."""
    far = [record(f"far{index}", blocks=BlockRange(12, 16)) for index in range(40)]
    lost = [record("near", blocks=BlockRange(4, 8)), record("next", blocks=BlockRange(6, 10))]
    scout, pinger, _ = watcher_of([*far, *lost], dead=["near", "next"])
    await scout.look()
    assert ids(scout.others) == ids(far)
    assert len(pinger.asked) <= NUM_NEAR + NUM_RANDOM + 2


@given(st.integers(0, 80), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_doubts_are_few_and_concern_blocks_that_could_be_missing(num_servers, num_suspects, seed):
    """Nobody is asked twice, nor whose blocks are held by many."""
    generator = np.random.default_rng(seed)
    now = time.time()
    records = []
    for index in range(num_servers + num_suspects):
        start = int(generator.integers(0, 20))
        expires_at = now + float(generator.uniform(1.0, 60.0))
        records.append(record(f"p{index}", blocks=BlockRange(start, start + 4), expires_at=expires_at))
    suspects, living = records[:num_suspects], records[num_suspects:]
    asked = {it.peer_id for it in living[::3]}
    found = doubtful(living, suspects, now, asked)
    assert len(found) <= MAX_DOUBTS and not ids(found) & (asked | ids(suspects))
    for one in found:
        fresh = [it for it in living if not it.is_late(now)]
        assert any(sum(block in it.blocks for it in fresh) <= FEW_HOLDERS for block in one.blocks)
    if not suspects and not any(it.is_late(now) for it in living):
        assert found == []


def test_a_server_holds_what_it_says_at_the_rate_of_full_batches():
    """Where it does not say that, the rate of one session counts."""
    assert holding_of(record("a", batch_tps=500.0)).capacity_tps == 500.0
    assert holding_of(record("a", decode_tps=40.0)).capacity_tps == 40.0
