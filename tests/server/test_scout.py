"""A server notices who is gone long before records expire, and asks few."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.pings import NUM_NEAR, NUM_RANDOM, RoundTrips
from swarm.server.scout import FEW_HOLDERS, MAX_DOUBTS, Scout, doubtful, holding_of
from swarm.types import BlockRange, ServerState
from tests.swarm.test_directory import FakeRegistry, record


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


def scout_of(records, dead=(), blocks=(0, 4)):
    """A scout of a server with these blocks."""
    registry, pinger = FakeRegistry({0: records}), FakePinger(dead)
    directory = Directory(registry, model="0" * 64, num_blocks=24)
    scout = Scout(
        pinger, directory, own_id="own", own_blocks=lambda: BlockRange(*blocks), generator=np.random.default_rng(0)
    )
    return scout, pinger, registry


def ids(records):
    return {it.peer_id for it in records}


async def test_those_that_do_not_answer_are_left_out_until_they_renew_their_record():
    """A dead neighbour holds nothing; when it comes back with a new record, it does again."""
    records = [record("own"), record("dead", blocks=BlockRange(4, 8)), record("lives", blocks=BlockRange(4, 8))]
    scout, pinger, registry = scout_of(records, dead=["dead"])
    await scout.look()
    assert ids(scout.others) == {"lives"} and [it.peer_id for it in scout.holdings] == ["lives"]
    pinger.dead.clear()
    registry.shards[0][1] = record("dead", blocks=BlockRange(4, 8), expires_at=time.time() + 61.0)
    await scout.look(max_age_s=0.0)
    assert ids(scout.others) == {"dead", "lives"}


async def test_servers_that_leave_or_drain_hold_nothing_and_those_that_load_do():
    """Only who serves, or will soon, counts."""
    records = [record(state.name, state=state) for state in ServerState]
    scout, _, _ = scout_of(records)
    await scout.look()
    assert ids(scout.others) == {"ONLINE", "JOINING"} and scout.loading == {"JOINING"}


async def test_a_death_makes_it_ask_the_few_that_are_left_for_the_same_blocks():
    """All of a range have died at once: it takes one look to know, though only one was a neighbour."""
    far = [record(f"far{index}", blocks=BlockRange(12, 16)) for index in range(40)]
    lost = [record("near", blocks=BlockRange(4, 8)), record("next", blocks=BlockRange(6, 10))]
    scout, pinger, _ = scout_of([*far, *lost], dead=["near", "next"])
    await scout.look()
    assert ids(scout.others) == ids(far)
    assert len(pinger.asked) <= NUM_NEAR + NUM_RANDOM + 2


async def test_the_nearest_round_trips_are_announced():
    """At most eight, by tag."""
    scout, _, _ = scout_of([record(f"p{index}", blocks=BlockRange(4, 8)) for index in range(30)])
    for _ in range(5):
        await scout.look()
    assert len(scout.pings) == 8


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
