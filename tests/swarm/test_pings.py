"""Round trips are smoothed and forgotten, places follow from them, and neighbours are few and near."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import pings as pings_module
from swarm.coordinates import Place
from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved, PeerTimeout
from swarm.pings import (
    NUM_NEAR,
    NUM_PARTNERS,
    NUM_RANDOM,
    PING_TIMEOUT_S,
    SLOW_S,
    STALE_S,
    Pinger,
    RoundTrips,
    neighbours,
    partners,
    slow_after_s,
)
from swarm.types import BlockRange, ServerState
from tests.swarm.test_directory import record


class FakeTransport:
    """Peers at fixed round trips; time passes only while they are asked."""

    def __init__(self, rtts):
        self.rtts, self.now, self.errors, self.connected = rtts, 0.0, {}, set()

    def rtt_s(self, peer_id):
        return self.rtts[peer_id] if peer_id in self.connected else None

    async def call(self, peer_id, service, message, *, timeout_s):
        if peer_id in self.errors:
            raise self.errors[peer_id]
        self.now += self.rtts[peer_id] * (1 if peer_id in self.connected else 4)  # a new connection takes longer
        self.connected.add(peer_id)


def pinger(transport) -> Pinger:
    return Pinger(transport, np.random.default_rng(0), now=lambda: transport.now)


async def test_a_ping_does_not_count_the_making_of_the_connection():
    """A peer that was not connected is asked twice, and the second answer counts."""
    transport = FakeTransport({"a": 0.05})
    measuring = pinger(transport)
    assert await measuring.ping([record("a", place=Place(error=0.1))]) == {}
    assert measuring.rtt_s("a") == pytest.approx(0.05)
    assert measuring.place.error < 1.0


async def test_those_that_do_not_answer_are_named_and_forgotten():
    """One that refuses as it loads its blocks, or is busy as one that goes to others, has answered; it is alive."""
    transport = FakeTransport({"dead": 0.05, "lives": 0.02, "loads": 0.01, "busy": 0.01})
    measuring = pinger(transport)
    states = {"loads": ServerState.JOINING}
    records = [record(peer_id, state=states.get(peer_id, ServerState.ONLINE)) for peer_id in transport.rtts]
    await measuring.ping(records)
    transport.errors = {"dead": PeerTimeout("silent", peer_id="dead"), "loads": InvalidRequest("no")}
    transport.errors["busy"] = PeerBusy("goes to other blocks")
    assert await measuring.ping(records) == {"dead": transport.errors["dead"]}
    assert measuring.hears("lives") and not measuring.hears("stranger")
    assert measuring.rtt_s("dead") is None and measuring.rtt_s("lives") == pytest.approx(0.02)


async def test_who_announces_blocks_and_serves_nothing_is_as_good_as_gone():
    """It answers that it does not know what it is asked, for as long as it likes."""
    transport = FakeTransport({"liar": 0.01})
    measuring = pinger(transport)
    transport.errors = {"liar": InvalidRequest("liar does not serve 'info'")}
    (error,) = (await measuring.ping([record("liar")])).values()
    assert isinstance(error, PeerMisbehaved) and error.peer_id == "liar"
    assert await measuring.ping([record("liar", state=ServerState.JOINING)]) == {}


async def test_who_is_slow_is_told_of_and_still_waited_for(monkeypatch: pytest.MonkeyPatch):
    """Where it is known how long an answer takes; that of a stranger is never slow."""
    monkeypatch.setattr(pings_module, "SLOW_S", 0.0)
    transport = FakeTransport({"slow": 0.0, "quick": 0.0, "stranger": 0.0})
    measuring = pinger(transport)
    await measuring.ping([record("slow"), record("quick")])
    call, may_answer, slow = transport.call, asyncio.Event(), []

    async def waiting(peer_id, *args, **kwargs):
        if peer_id != "quick":
            await may_answer.wait()
        await call(peer_id, *args, **kwargs)

    def on_slow(peer_id):
        slow.append(peer_id)
        may_answer.set()

    transport.call = waiting
    assert await measuring.ping([record(peer_id) for peer_id in transport.rtts], on_slow=on_slow) == {}
    assert slow == ["slow"]


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_an_answer_is_slow_after_a_second_and_some_round_trips_at_the_latest_when_it_counts_no_more(one, other):
    """The further away, the later."""
    near, far = (slow_after_s(rtt_s) for rtt_s in sorted((one, other)))
    assert SLOW_S <= near <= far <= PING_TIMEOUT_S == slow_after_s(None)


def test_round_trips_are_smoothed_and_grow_stale():
    """A spike counts a little; what was not measured for minutes does not count at all."""
    known = RoundTrips()
    known.measured("a", 0.1, 0.0)
    known.measured("a", 1.1, 10.0)
    assert known.get("a", 10.0) == pytest.approx(0.4)
    assert known.get("a", 10.0 + STALE_S) is not None and known.get("a", 11.0 + STALE_S) is None
    known.keep_only({"b"})
    assert known.get("a", 10.0) is None


@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_a_server_measures_few_others_however_many_there_are(num_servers, seed):
    """At most ten, none twice: the nearest likely successors, those on whom its blocks depend, and some at random."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(num_servers):
        start = int(generator.integers(0, 12))
        place = Place(position=(float(generator.uniform(0, 0.2)), 0.0, 0.0))
        records.append(record(f"p{index}", blocks=BlockRange(start, start + 4), place=place))
    chosen = neighbours(BlockRange(0, 4), records, Place(), generator)
    ids = [it.peer_id for it in chosen]
    assert len(ids) == len(set(ids)) <= NUM_NEAR + NUM_PARTNERS + NUM_RANDOM
    assert len(ids) >= min(NUM_NEAR + NUM_RANDOM, num_servers)
    following = [it for it in records if 4 in it.blocks] or [it for it in records if it.blocks.start == 0]
    near = sorted(following, key=lambda it: it.place.position[0])[:NUM_NEAR]
    assert {it.peer_id for it in near} <= set(ids)
    holders = [[it.peer_id for it in records if block in it.blocks] for block in range(4)]
    alone = {held[0] for held in holders if len(held) == 1} - {it.peer_id for it in near}
    assert len(alone & set(ids)) >= min(len(alone), NUM_PARTNERS)


def test_the_last_servers_measure_the_first_ones_which_follow_nobody():
    """Else their blocks would be watched by chance only."""
    first = [record(f"first{index}", blocks=BlockRange(0, 4), place=Place()) for index in range(NUM_NEAR)]
    records = first + [record(f"p{index}", blocks=BlockRange(4, 8), place=Place()) for index in range(40)]
    chosen = neighbours(BlockRange(8, 12), records, Place(), np.random.default_rng(0))
    assert {it.peer_id for it in first} <= {it.peer_id for it in chosen}


def test_a_server_asks_whether_those_are_there_without_whom_it_must_stay():
    """The few that hold its blocks as well; of many, none need be asked."""
    beside, others = BlockRange(2, 6), [record(f"p{index}", blocks=BlockRange(20, 24)) for index in range(40)]
    few = [record(f"few{index}", blocks=beside) for index in range(NUM_PARTNERS)]
    many = [record(f"many{index}", blocks=beside) for index in range(NUM_PARTNERS + 1)]
    assert partners(BlockRange(0, 4), others + few) == few
    assert partners(BlockRange(0, 4), others + many) == []
    assert partners(BlockRange(0, 4), [*others, *many, record("last", blocks=BlockRange(0, 1))])[0].peer_id == "last"
