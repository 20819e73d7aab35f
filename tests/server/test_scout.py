"""A server measures its neighbours, tells what it found, and notices who is gone long before records expire."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import directory as directory_module
from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.errors import PeerTimeout
from swarm.pings import NUM_NEAR, NUM_RANDOM, Pinger, RoundTrips
from swarm.registry import MAX_PINGS, NUM_SHARDS, peer_tag
from swarm.server import scout as scout_module
from swarm.server.attendance import NEWS_S, PROMISE_S
from swarm.server.mover import MAX_DOUBT
from swarm.server.scout import (
    AGAIN_S,
    CONFIRM_S,
    FEW_HOLDERS,
    LOOK_TIMEOUT_S,
    MAX_AGAIN,
    MAX_DOUBTS,
    NUM_READS,
    Scout,
    doubtful,
    holding_of,
)
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


class Clock:
    """Time that passes when it is told to, in the place of the module `time`."""

    def __init__(self):
        self.now, self._epoch = 0.0, time.time()

    def monotonic(self):
        return self.now

    def time(self):
        return self.unix(self.now)

    def unix(self, now):
        return self._epoch + now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(directory_module, "time", clock)
    monkeypatch.setattr(scout_module, "time", clock)
    return clock


class FakePinger:
    """Knows who is dead."""

    place = Place()

    def __init__(self, dead=()):
        self.dead, self.asked, self.round_trips, self.num_most = set(dead), [], RoundTrips(), 0

    def rtt_s(self, peer_id):
        return self.round_trips.get(peer_id, 0.0)

    async def ping(self, records, *, on_slow=None):
        ids = [it.peer_id for it in records]
        self.asked += ids
        self.num_most = max(self.num_most, len(ids))
        for peer_id in set(ids) - self.dead:
            self.round_trips.measured(peer_id, 0.01, 0.0)
        return set(ids) & self.dead


def watcher_of(records, dead=()):
    """A scout of a server of 0:4 that is told at once who is dead."""
    registry, pinger = FakeRegistry({0: records}), FakePinger(dead)
    return scout_with(registry, pinger), pinger, registry


def scout_with(registry, pinger) -> Scout:
    directory = Directory(registry, model="0" * 64, num_blocks=24)
    return Scout(
        pinger, directory, own_id="own", own_blocks=lambda: BlockRange(0, 4), generator=np.random.default_rng(0)
    )


def ids(records):
    return {it.peer_id for it in records}


async def test_those_that_do_not_answer_are_left_out_until_they_do(clock):
    """A dead neighbour holds nothing, however often its record is renewed; when it answers again, it does."""
    records = [record("own"), record("dead", blocks=BlockRange(4, 8)), record("lives", blocks=BlockRange(4, 8))]
    scout, pinger, registry = watcher_of(records, dead=["dead"])
    for _ in range(100):
        await scout.look()
        clock.now += 5.0
        registry.shards[0] = [replace(it, expires_at=clock.time() + 60.0) for it in records]
        assert ids(scout.others) == {"lives"} and [it.peer_id for it in scout.holdings] == ["lives"]
    assert pinger.asked.count("dead") <= 1 + 500.0 / AGAIN_S, "the silent cost three seconds each time"
    pinger.dead.clear()
    clock.now += AGAIN_S
    await scout.look()
    assert ids(scout.others) == {"dead", "lives"}


async def test_a_server_that_announces_and_never_answers_does_not_keep_others_from_moving_for_ever(clock):
    """It is in doubt until all have had the time to notice; in a swarm of ten one is more than MAX_DOUBT."""
    records = [record(f"p{index}", blocks=BlockRange(4, 8)) for index in range(10)]
    scout, _, registry = watcher_of(records, dead=["p0"])
    shares = []
    while clock.now < 300.0:
        registry.shards[0] = [replace(it, expires_at=clock.time() + 60.0) for it in records]
        await scout.look()
        shares.append((clock.now, scout.share_in_doubt))
        clock.now += 5.0
    first = next(at for at, share in shares if share > MAX_DOUBT)
    assert all((share > MAX_DOUBT) == (first <= at <= first + NEWS_S) for at, share in shares)
    assert "p0" not in ids(scout.others)


async def test_a_server_that_is_cut_off_does_not_move_for_a_gain(clock):
    """What it knows grows old, so all others are in doubt as long as it can't read their records."""
    scout, _, registry = watcher_of([record(f"p{index}") for index in range(100)])
    await scout.look()
    assert scout.share_in_doubt == 0.0
    registry.error = PeerTimeout("no answer")
    clock.now += 15.0
    await scout.look()
    assert scout.share_in_doubt == 1.0
    registry.error = None
    await scout.look()
    assert scout.share_in_doubt == 0.0


class Swarm(FakeRegistry):
    """Many servers that renew their records every 20 s, each at its own moment, until they die."""

    def __init__(self, count, clock):
        super().__init__({})
        self.clock, self.dead, self.died_at = clock, frozenset(), 0.0
        generator = np.random.default_rng(count)
        self.members = [[] for _ in range(NUM_SHARDS)]
        for index in range(count):
            start = int(generator.integers(0, 12))
            member = record(f"p{index}", blocks=BlockRange(start, start + 12))
            self.members[index % NUM_SHARDS].append((member, float(generator.uniform(0.0, 20.0))))

    def die(self, part):
        names = [it.peer_id for shard in self.members for it, _ in shard]
        self.dead = set(np.random.default_rng(1).choice(names, int(part * len(names)), replace=False).tolist())
        self.died_at = self.clock.now

    async def lookup_shards(self, model, shards, *, num_blocks):
        self.reads.append(list(shards))
        return [[it for it in self._records(shard) if it.is_valid(self.clock.time())] for shard in shards]

    def _records(self, shard):
        for member, phase_s in self.members[shard]:
            now = self.died_at if member.peer_id in self.dead else self.clock.now
            renewed_at = now - (now - phase_s) % 20.0
            yield replace(member, expires_at=self.clock.unix(renewed_at) + 60.0)


@pytest.mark.parametrize("count", [20, 1000, 10_000])
async def test_healthy_servers_are_not_in_doubt_however_large_the_swarm_and_the_dead_are_soon(count, clock):
    """In a large swarm most records were read minutes ago: that is no news of the servers. A quarter's death is."""
    swarm = Swarm(count, clock)
    pinger = FakePinger()
    scout = scout_with(swarm, pinger)
    await scout.look_closely()
    while clock.now < 100.0:
        await scout.look()
        assert scout.share_in_doubt == 0.0
        clock.now += 5.0
    assert len(scout.holdings) == count, "what was there when it was read is there, though its record has expired since"
    swarm.die(0.25)
    pinger.dead = swarm.dead
    shares = []
    while clock.now < 260.0:
        await scout.look()
        shares.append((clock.now - 100.0, scout.share_in_doubt))
        clock.now += 5.0
    assert all(share > MAX_DOUBT for since_s, share in shares if 20.0 <= since_s <= 55.0)
    assert all(share <= MAX_DOUBT for since_s, share in shares if since_s >= 140.0)
    assert pinger.num_most <= NUM_NEAR + NUM_RANDOM + MAX_AGAIN


async def test_those_that_are_late_or_silent_are_in_doubt():
    """Of 20 of whom eight are asked one is silent, and the record of one that was not asked was not renewed in time."""
    near = [record("dead", blocks=BlockRange(4, 8)), *(record(f"p{it}", blocks=BlockRange(4, 8)) for it in range(4))]
    late = record("late", expires_at=time.time() + 10.0)
    scout, pinger, registry = watcher_of([*near, *(record(f"q{index}") for index in range(14)), late], dead=["dead"])
    assert scout.share_in_doubt == 0.0
    while "late" in pinger.asked or not pinger.asked:
        pinger.asked.clear()
        scout = scout_with(registry, pinger)
        scout._generator = np.random.default_rng()
        await scout.look()
    assert scout.share_in_doubt == pytest.approx(0.1)


async def test_a_server_that_answers_is_not_in_doubt_though_its_record_is_late():
    """It only was slow to announce itself."""
    scout, pinger, _ = watcher_of([record("late", expires_at=time.time() + 10.0)])
    await scout.look()
    assert pinger.asked == ["late"] and scout.share_in_doubt == 0.0


async def test_the_silent_are_asked_once_more_before_anything_is_done_about_it():
    """A server that was only slow is there again, though it has not renewed its record yet."""
    scout, pinger, _ = watcher_of([record("slow", blocks=BlockRange(4, 8))], dead=["slow"])
    await scout.look()
    assert scout.others == []
    pinger.dead.clear()
    await scout.look()
    assert scout.others == []
    await scout.look_closely()
    assert ids(scout.others) == {"slow"}


async def test_servers_that_leave_or_drain_hold_nothing_and_those_that_load_do():
    """Only who serves, or will soon, counts."""
    records = [record(state.name, state=state) for state in ServerState]
    scout, _, _ = watcher_of(records)
    await scout.look()
    assert ids(scout.others) == {"ONLINE", "JOINING"} and scout.loading == {"JOINING"}


async def test_who_has_claimed_to_move_holds_what_it_goes_to():
    """As it serves, and as it drains for that; not who drains to leave, nor who is silent whatever it has claimed."""
    states = {"serves": ServerState.ONLINE, "moves": ServerState.DRAINING, "leaves": ServerState.DRAINING}
    records = [record("stays", blocks=BlockRange(4, 8)), record("dead", blocks=BlockRange(4, 8))]
    records += [record(name, state=state) for name, state in states.items()]
    scout, _, _ = watcher_of(records, dead=["dead"])
    await scout.look()
    moves = dict.fromkeys(("serves", "moves", "dead", "stranger"), BlockRange(8, 12))
    held = {it.peer_id: it.blocks for it in scout.holdings_after(moves)}
    assert held == {"stays": BlockRange(4, 8), "serves": BlockRange(8, 12), "moves": BlockRange(8, 12)}
    assert scout.holdings_after({}) == scout.holdings


async def test_who_only_says_that_it_loads_covers_blocks_for_a_quarter_of_an_hour(clock):
    """It answers, as those do that load; a newcomer takes its place then."""
    loading = record("promises", state=ServerState.JOINING)
    scout, _, registry = watcher_of([loading])
    while clock.now < 2 * PROMISE_S:
        registry.shards[0] = [replace(loading, expires_at=clock.time() + 60.0)]
        await scout.look()
        assert [it.peer_id for it in scout.holdings] == (["promises"] if clock.now <= PROMISE_S else [])
        clock.now += 10.0


@pytest.mark.parametrize("num_failures", [NUM_READS - 1, NUM_READS])
async def test_a_close_look_tries_again_and_says_so_when_it_could_not_read_the_records(num_failures, clock):
    """A slow DHT is no empty swarm; each search may take as long as it is given."""
    scout, _, registry = watcher_of([record("a")])
    lookup_shards, tries = registry.lookup_shards, []

    async def slow(*args, **kwargs):
        tries.append(args)
        if len(tries) <= num_failures:
            clock.now += 2 * LOOK_TIMEOUT_S
            raise PeerTimeout("no answer within 15 s")
        return await lookup_shards(*args, **kwargs)

    registry.lookup_shards = slow
    if num_failures < NUM_READS:
        await scout.look_closely()
        assert ids(scout.others) == {"a"}
        return
    with pytest.raises(PeerTimeout):
        await scout.look_closely()
    assert scout.share_in_doubt == 1.0


async def test_reading_may_take_longer_than_asking_and_two_looks_do_not_overlap(monkeypatch):
    """A slow DHT must not keep a server that serves from ever seeing the others."""
    monkeypatch.setattr(scout_module, "LOOK_TIMEOUT_S", 0.05)
    scout, pinger, registry = watcher_of([record("a")])
    lookup_shards, may_answer = registry.lookup_shards, asyncio.Event()
    num_reading, num_most = 0, 0

    async def slow(*args, **kwargs):
        nonlocal num_reading, num_most
        num_reading += 1
        num_most = max(num_most, num_reading)
        await may_answer.wait()
        num_reading -= 1
        return await lookup_shards(*args, **kwargs)

    registry.lookup_shards = slow
    looks = [asyncio.ensure_future(scout.look()) for _ in range(3)]
    _, pending = await asyncio.wait(looks, timeout=4 * scout_module.LOOK_TIMEOUT_S)
    assert len(pending) == 3
    may_answer.set()
    await asyncio.gather(*looks)
    assert num_most == 1 and pinger.asked == ["a"]
    assert ids(scout.others) == {"a"} and scout.share_in_doubt == 0.0


async def test_who_could_not_read_the_records_asks_those_that_it_knows(clock):
    """Whether they are there does not depend on the DHT."""
    scout, pinger, registry = watcher_of([record("a"), record("b")], dead={"b"})
    pinger.dead = set()
    await scout.look()
    registry.error, pinger.dead = PeerTimeout("no answer"), {"b"}
    clock.now += AGAIN_S
    await scout.look()
    assert ids(scout.others) == {"a"} and scout.share_in_doubt == 1.0


async def test_a_gap_is_confirmed_by_reading_what_is_old(clock):
    """Not at all, while the DHT does not answer."""
    scout, _, registry = watcher_of([record("a")])
    await scout.look()
    assert await scout.confirm() and len(registry.reads) == 2
    clock.now += CONFIRM_S
    registry.error = PeerTimeout("no answer")
    assert not await scout.confirm()
    registry.error = None
    clock.now += CONFIRM_S
    assert await scout.confirm() and len(registry.reads) == 3


async def test_a_death_makes_it_ask_the_few_that_are_left_for_the_same_blocks():
    """All of a range have died at once: it takes one look to know, though only one was a neighbour."""
    far = [record(f"far{index}", blocks=BlockRange(12, 16)) for index in range(40)]
    lost = [record("near", blocks=BlockRange(4, 8)), record("next", blocks=BlockRange(6, 10))]
    scout, pinger, _ = watcher_of([*far, *lost], dead=["near", "next"])
    await scout.look()
    assert ids(scout.others) == ids(far)
    assert len(pinger.asked) <= NUM_NEAR + NUM_RANDOM + 2


class SlowPinger(FakePinger):
    """Some answer late: when `may_answer` is set."""

    def __init__(self, slow, dead=()):
        super().__init__(dead)
        self.slow, self.may_answer, self.when_asked = set(slow), asyncio.Event(), lambda: None

    async def ping(self, records, *, on_slow=None):
        silent = await super().ping(records)
        self.when_asked()
        for peer_id in ids(records) & self.slow:
            on_slow(peer_id)
            await self.may_answer.wait()
        return silent


async def test_others_are_asked_while_an_answer_is_slow_which_is_not_held_against_who_gives_it():
    """A slow neighbour makes us ask who else holds its blocks; nobody is taken for dead before its time is over."""
    far = [record(f"far{index}", blocks=BlockRange(12, 16)) for index in range(40)]
    near = [record("slow", blocks=BlockRange(4, 8)), record("next", blocks=BlockRange(6, 10))]
    pinger = SlowPinger(["slow"])
    scout = scout_with(FakeRegistry({0: [*far, *near]}), pinger)
    seen = []

    def when_asked():
        if "next" in pinger.asked:
            seen.append(ids(scout.others))
            pinger.may_answer.set()

    pinger.when_asked = when_asked
    await asyncio.wait_for(scout.look(), 20)
    assert seen and all(others >= ids(near) for others in seen), "it is there as long as it may answer"
    assert "next" in pinger.asked and ids(scout.others) >= ids(near) and scout.share_in_doubt == 0.0


async def test_who_is_slow_and_never_answers_is_silent_when_its_time_is_over():
    """And the one that was asked for its sake as well: both had the whole time to answer."""
    lost = [record("near", blocks=BlockRange(4, 8)), record("next", blocks=BlockRange(6, 10))]
    far = [record(f"far{index}", blocks=BlockRange(12, 16)) for index in range(40)]
    pinger = SlowPinger(["near", "next"], dead=["near", "next"])
    scout = scout_with(FakeRegistry({0: [*far, *lost]}), pinger)
    pinger.when_asked = lambda: {"near", "next"} <= set(pinger.asked) and pinger.may_answer.set()
    async with asyncio.timeout(20):
        await scout.look()
    assert ids(scout.others) == ids(far)


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
    late = {it.peer_id for it in living if it.is_late(now)}
    found = doubtful(living, suspects, late, asked)
    assert len(found) <= MAX_DOUBTS and not ids(found) & (asked | ids(suspects))
    for one in found:
        fresh = [it for it in living if it.peer_id not in late]
        assert any(sum(block in it.blocks for it in fresh) <= FEW_HOLDERS for block in one.blocks)
    if not suspects and not late:
        assert found == []


def test_a_server_holds_what_it_says_at_the_rate_of_full_batches():
    """Where it does not say that, the rate of one session counts."""
    assert holding_of(record("a", batch_tps=500.0)).capacity_tps == 500.0
    assert holding_of(record("a", decode_tps=40.0)).capacity_tps == 40.0
