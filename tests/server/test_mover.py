"""Newcomers take different places, one of many that could move does, and gaps are filled at once."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from swarm.errors import PeerTimeout, PeerUnreachable
from swarm.leases import Claim, LeaseDesk
from swarm.placement import Holding, Move
from swarm.server import mover as mover_module
from swarm.server.mover import GAP_DRAIN_S, MAX_RANK, MAX_YIELDS, RANK_S, Mover, delay, may_others_follow
from swarm.types import BlockRange

NUM_BLOCKS = 12
MODEL = "ab" * 32


class World:
    """What all servers of a small swarm know of each other, at once."""

    def __init__(self):
        self.holdings: dict[str, Holding] = {}
        self.loading: set[str] = set()
        self.leaving: set[str] = set()
        self.claims: dict[str, tuple[bytes, float]] = {}
        self.most_at_once = 0
        """Servers that loaded at the same time."""


class FakeScout:
    def __init__(self, world, own_id):
        self.world, self.own_id, self.num_looks = world, own_id, 0
        self.share_in_doubt = 0.0
        self.error = None
        self.is_sure = True
        self.when_asked_again = None
        self.seen = None
        """What was read last, where that matters."""

    @property
    def holdings(self):
        return [it for it in self.world.holdings.values() if it.peer_id != self.own_id]

    def holdings_after(self, moves):
        seen = self.holdings if self.seen is None else self.seen
        return [replace(it, blocks=moves.get(it.peer_id, it.blocks)) for it in seen]

    @property
    def leaving(self):
        return self.world.leaving

    @property
    def loading(self):
        return self.world.loading

    async def look(self):
        self.num_looks += 1
        await asyncio.sleep(0)

    async def look_closely(self, **_):
        if self.error is not None:
            raise self.error
        await self.look()

    async def read_closely(self, **_):
        if self.error is not None:
            raise self.error

    async def ask_again(self):
        if self.when_asked_again is not None:
            await self.when_asked_again()

    async def confirm(self):
        self.seen = None
        return self.is_sure


class FakeTable:
    def __init__(self, world, peer_id):
        self.world, self.peer_id, self.error = world, peer_id, None

    async def dht_store(self, key, subkey, value, expires_at):
        self.world.claims[subkey] = value, expires_at
        return True

    async def dht_get(self, key):
        if self.error is not None:
            raise self.error
        return {peer: value for peer, (value, expires_at) in self.world.claims.items() if expires_at > time.time()}


class FakeServer:
    """One server of the world."""

    def __init__(self, world, peer_id, blocks, capacity=10.0):
        self.world, self.moves, self.drains = world, [], []
        self.error, self.goes_back, self.load_s = None, False, 0.02
        self.holding = Holding(peer_id=peer_id, blocks=BlockRange(*blocks), capacity_tps=capacity)
        self.num_sessions = 0

    def serve(self):
        self.world.holdings[self.holding.peer_id] = self.holding

    async def announce_blocks(self, blocks):
        self.holding = Holding(peer_id=self.holding.peer_id, blocks=blocks, capacity_tps=self.holding.capacity_tps)
        self.world.holdings[self.holding.peer_id] = self.holding
        self.world.loading.add(self.holding.peer_id)

    async def leave_for(self, blocks, *, drain_s):
        self.drains.append(drain_s)
        self.before = self.holding.blocks
        await self.announce_blocks(blocks)
        self.world.most_at_once = max(self.world.most_at_once, len(self.world.loading))

    async def arrive(self):
        await asyncio.sleep(self.load_s)
        if self.error is not None:
            raise self.error
        if self.goes_back:
            await self.announce_blocks(self.before)
        self.world.loading.discard(self.holding.peer_id)
        self.moves.append(self.holding.blocks)
        return not self.goes_back


def mover_of(world, server, seed=0):
    own_id = server.holding.peer_id
    return Mover(
        server,
        FakeScout(world, own_id),
        LeaseDesk(FakeTable(world, own_id), MODEL, settle_s=0.01, now=lambda: 0.0),
        num_blocks=NUM_BLOCKS,
        length=len(server.holding.blocks),
        reload_s=lambda: [1.0] * NUM_BLOCKS,
        generator=np.random.default_rng(seed),
    )


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """All waits are short."""
    for name in ("CHECK_S", "GAP_DELAY_S", "GAIN_DELAY_S", "SETTLE_S", "LOOK_S"):
        monkeypatch.setattr(mover_module, name, 0.01)


async def run_until(movers, condition):
    """Let all of them run until something is true."""
    tasks = [asyncio.create_task(mover.run()) for mover in movers]
    try:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)
                for task in tasks:
                    if task.done():
                        task.result()
    finally:
        for task in tasks:
            task.cancel()


def covers_all(world):
    return {block for it in world.holdings.values() for block in it.blocks} == set(range(NUM_BLOCKS))


async def test_newcomers_that_come_at_the_same_moment_take_different_places():
    """Three with a third of the model each cover it, though each began with the same idea."""
    world = World()
    first = FakeServer(world, "z", (0, 4))
    first.serve()
    servers = [FakeServer(world, name, (0, 4)) for name in "abc"]
    choices = await asyncio.gather(*(mover_of(world, it, seed).choose(10.0) for seed, it in enumerate(servers)))
    assert covers_all(world)
    assert [choice.blocks for choice in choices] == [it.holding.blocks for it in servers]


async def test_the_first_server_of_a_swarm_does_not_wait():
    """There is nobody to wait for."""
    world = World()
    server = FakeServer(world, "a", (0, 4))
    choice = await mover_of(world, server).choose(10.0)
    assert choice.blocks == BlockRange(0, 4) and not world.holdings


async def test_of_many_that_could_fill_a_gap_one_moves(monkeypatch):
    """Five replicas see that nobody serves 8:12; four of them stay where they are."""
    monkeypatch.setattr(mover_module, "CHECK_S", 1e6)  # nobody looks for gains
    world = World()
    servers = [FakeServer(world, f"p{index}", (0, 4)) for index in range(5)] + [FakeServer(world, "q", (4, 8))]
    for server in servers:
        server.serve()
    movers = [mover_of(world, server, seed) for seed, server in enumerate(servers)]
    await run_until(movers, lambda: any(it.moves for it in servers) and all(it._scout.num_looks > 20 for it in movers))
    assert [move for server in servers for move in server.moves] == [BlockRange(8, 12)]


async def test_of_many_that_could_gain_one_moves_at_a_time():
    """Six replicas of 0:6 and one of 6:12: some move, never two at once, until both halves are about as strong."""
    world = World()
    servers = [FakeServer(world, f"p{index}", (0, 6)) for index in range(6)] + [FakeServer(world, "q", (6, 12))]
    for server in servers:
        server.serve()
    movers = [mover_of(world, server, seed) for seed, server in enumerate(servers)]
    await run_until(movers, lambda: sum(len(it.moves) for it in servers) == 2)
    await run_until(movers, lambda: all(it._scout.num_looks > 30 for it in movers))
    assert world.most_at_once == 1
    assert sum(it.holding.blocks.start == 6 for it in servers) == 3


async def test_a_server_whose_lease_cannot_be_had_stays():
    """The DHT does not answer: nothing is moved, and it goes on looking."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    other.serve()
    mover = mover_of(world, server)
    mover._leases._node.error = PeerTimeout("no answer")
    await run_until([mover], lambda: mover._scout.num_looks > 10)
    assert not server.moves
    mover._leases._node.error = None
    await run_until([mover], lambda: bool(server.moves))


async def test_a_newcomer_that_cannot_read_the_records_does_not_take_itself_for_the_first():
    """It would take the first blocks, as all others did that could not."""
    world = World()
    FakeServer(world, "a", (0, 4)).serve()
    mover = mover_of(world, FakeServer(world, "b", (0, 4)))
    mover._scout.error = PeerTimeout("no answer")
    with pytest.raises(PeerTimeout):
        await mover.choose(10.0)


async def test_a_server_that_cannot_read_the_records_again_stays():
    """It has the lease, and gives it back: what it saw before may have changed."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    other.serve()
    mover = mover_of(world, server)
    mover._scout.error = PeerTimeout("no answer")
    for _ in range(3):
        await mover._consider(may_gain=True)
    assert world.claims and not server.moves
    assert await LeaseDesk(FakeTable(world, "c"), MODEL).claims() == []
    mover._scout.error = None
    await mover._consider(may_gain=True)
    assert server.moves


async def test_a_gap_that_is_not_sure_makes_nobody_claim_anything():
    """In a large swarm hundreds would see one at any time in what they read minutes ago."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    other.serve()
    mover = mover_of(world, server)
    mover._scout.is_sure = False
    await mover._consider(may_gain=True)
    assert not world.claims and not server.moves
    mover._scout.is_sure = True
    await mover._consider(may_gain=False)
    assert server.moves


@pytest.mark.parametrize("answers", [False, True])
async def test_nobody_moves_into_a_gap_before_the_silent_had_their_second_chance(answers):
    """They are asked while it waits for the lease; who answers after all, as the last moment, keeps it where it is."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    other.serve()
    mover, has_lease = mover_of(world, server), asyncio.Event()
    acquire = mover._leases.acquire

    async def acquiring(*args, **kwargs):
        has_it = await acquire(*args, **kwargs)
        has_lease.set()
        return has_it

    async def ask_again():
        await has_lease.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert await LeaseDesk(FakeTable(world, "c"), MODEL).claims() and not server.drains
        if answers:
            FakeServer(world, "slow", (6, 12)).serve()

    mover._leases.acquire, mover._scout.when_asked_again = acquiring, ask_again
    await asyncio.wait_for(mover._consider(may_gain=False), 20)
    assert server.moves == ([] if answers else [BlockRange(6, 12)])
    assert await LeaseDesk(FakeTable(world, "c"), MODEL).claims() == []


async def test_a_server_that_can_load_nothing_any_more_says_so():
    """Neither the new blocks nor the old ones: the server's owner must know, and the lease is given back."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    other.serve()
    server.error = PeerUnreachable("the disk is gone")
    with pytest.raises(PeerUnreachable):
        await run_until([mover_of(world, server)], lambda: False)
    assert await LeaseDesk(FakeTable(world, "c"), MODEL).claims() == []


async def test_a_server_that_could_not_load_other_blocks_stays_for_a_while():
    """It went back, and does not try the same again with the next look."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.goes_back = True
    server.serve()
    other.serve()
    mover = mover_of(world, server)
    await run_until([mover], lambda: bool(server.moves))
    num_looks = mover._scout.num_looks
    await run_until([mover_of(world, other)], lambda: bool(other.moves))
    assert server.moves == [BlockRange(0, 6)] and mover.num_moves == 0
    assert mover._scout.num_looks <= num_looks + 1
    assert server.drains == [GAP_DRAIN_S], "sessions are handed over, and others wait for the gap to be filled"


async def test_nobody_moves_for_a_gain_while_many_are_in_doubt():
    """Their records may tell of servers that died; when that is clear, it moves."""
    world = World()
    servers = [FakeServer(world, f"p{index}", (0, 6)) for index in range(3)] + [FakeServer(world, "q", (6, 12))]
    for server in servers:
        server.serve()
    mover = mover_of(world, servers[0])
    mover._scout.share_in_doubt = 0.2
    await run_until([mover], lambda: mover._scout.num_looks > 20)
    assert not servers[0].moves
    mover._scout.share_in_doubt = 0.0
    await run_until([mover], lambda: bool(servers[0].moves))


async def test_a_server_lets_one_that_would_gain_more_go_first_but_not_for_ever():
    """The other one may be told its blocks by its owner, which nobody knows."""
    world = World()
    weak, strong = FakeServer(world, "weak", (0, 6), capacity=15.0), FakeServer(world, "strong", (0, 6), capacity=30.0)
    for server in (weak, strong, FakeServer(world, "p", (0, 6), capacity=30.0), FakeServer(world, "q", (6, 12))):
        server.serve()
    mover = mover_of(world, weak)
    for num_yields in range(1, MAX_YIELDS + 1):
        await mover._consider(may_gain=True)
        assert not weak.moves and mover._num_yields == num_yields
    await mover._consider(may_gain=True)
    assert weak.moves == [BlockRange(6, 12)] and mover._num_yields == 0


async def test_a_gap_that_another_has_filled_is_no_reason_to_hurry_for_a_gain():
    """When its turn has come, the same place would still be better: that is for another look."""
    world = World()
    server = FakeServer(world, "p0", (0, 6))
    for it in (
        server,
        FakeServer(world, "p1", (0, 6)),
        FakeServer(world, "p2", (0, 6)),
        FakeServer(world, "q", (6, 12)),
    ):
        it.serve()
    mover = mover_of(world, server)
    move = mover._decide()
    assert move is not None and not move.fills_gap
    await mover._try(replace(move, fills_gap=True), 0.0)
    assert not server.moves
    await mover._try(move, 0.0)
    assert server.moves == [move.blocks]


async def test_who_has_given_its_claim_back_is_seen_by_its_record():
    """A rival leaves for the gap and gives its claim back, just before we read claims: records are read after that."""
    world = World()
    server, rival = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    server.serve()
    rival.serve()
    mover = mover_of(world, server)
    mover._scout.seen = mover._scout.holdings
    read_claims = mover._leases._node.dht_get

    async def dht_get(key):
        found = await read_claims(key)
        await rival.announce_blocks(BlockRange(6, 12))
        return found

    mover._leases._node.dht_get = dht_get
    await mover._consider(may_gain=False)
    assert not world.claims and not server.moves


async def test_a_claim_that_may_never_come_true_makes_no_gap():
    """A liar claims to leave blocks that it serves: the spare server fills the gap that there is, not that one."""
    world = World()
    spare = FakeServer(world, "a", (3, 6))
    for server in (
        spare,
        FakeServer(world, "b", (3, 6)),
        FakeServer(world, "c", (6, 9)),
        FakeServer(world, "liar", (0, 3)),
    ):
        server.serve()
    claim = Claim(peer_id="liar", leaves=BlockRange(0, 3), takes=BlockRange(9, 12), expires_at=time.time() + 60.0)
    world.claims["liar"] = claim.encode(), claim.expires_at
    mover = mover_of(world, spare)
    await mover._consider(may_gain=False)
    assert not spare.moves and spare.holding.blocks == BlockRange(3, 6)
    del world.claims["liar"]
    await mover._consider(may_gain=False)
    assert spare.moves == [BlockRange(9, 12)]


async def test_who_has_the_lease_looks_who_is_on_its_way():
    """One with the higher lot, whose claim it did not wait for, drains already for the same place: one of both goes."""
    world = World()
    server, other = FakeServer(world, "a", (0, 6)), FakeServer(world, "b", (0, 6))
    for it in (server, other, FakeServer(world, "c", (0, 6))):
        it.serve()
    mover = mover_of(world, server)
    acquire = mover._leases.acquire

    async def acquiring(*args, **kwargs):
        lease = await acquire(*args, **kwargs)
        claim = Claim(peer_id="b", leaves=BlockRange(0, 6), takes=BlockRange(6, 12), expires_at=time.time() + 60.0)
        world.claims["b"] = claim.encode(), claim.expires_at
        world.leaving.add("b")
        return lease

    mover._leases.acquire = acquiring
    await mover._consider(may_gain=False)
    assert not server.moves


async def test_a_newcomer_counts_those_that_are_on_their_way():
    """They hold nothing yet, and their place is not free."""
    world = World()
    FakeServer(world, "a", (0, 4)).serve()
    FakeServer(world, "b", (0, 4)).serve()
    claim = Claim(peer_id="b", leaves=BlockRange(0, 4), takes=BlockRange(4, 8), expires_at=time.time() + 60.0)
    world.claims["b"] = claim.encode(), claim.expires_at
    world.leaving.add("b")
    choice = await mover_of(world, FakeServer(world, "new", (0, 4))).choose(10.0)
    assert choice.blocks == BlockRange(8, 12)


async def test_two_that_fill_a_gap_together_do_not_wait_for_each_other():
    """It takes both; the second one takes the first one's claim as done, while that one has not even left."""
    world = World()
    both = [FakeServer(world, name, (0, 4)) for name in "ab"]
    for server in (*both, FakeServer(world, "c", (0, 4))):
        server.serve()
    have_left = asyncio.Barrier(2)
    for server in both:
        leave = server.leave_for

        async def leaving(blocks, *, drain_s, leave=leave):
            await have_left.wait()
            await leave(blocks, drain_s=drain_s)

        server.leave_for = leaving
    await run_until([mover_of(world, it, seed) for seed, it in enumerate(both)], lambda: all(it.moves for it in both))
    assert covers_all(world)


def move_of(**fields) -> Move:
    usual = {
        "blocks": BlockRange(0, 4),
        "gain_tps": 1.0,
        "cost_tokens": 0.0,
        "fills_gap": False,
        "opens_gap": False,
        "num_missing": 0,
        "capacity_part": 0.1,
    }
    return Move(**{**usual, **fields})


def test_others_follow_before_it_has_loaded_only_where_that_costs_little():
    """Into a gap, or in a swarm so large that one server more or less makes no difference."""
    assert not may_others_follow(move_of())
    assert may_others_follow(move_of(fills_gap=True))
    assert may_others_follow(move_of(capacity_part=0.001))


async def test_in_a_large_swarm_several_load_at_the_same_time():
    """Who moves next waits until those before it have left, not until they have loaded."""
    world = World()
    servers = [FakeServer(world, f"p{index}", (0, 6)) for index in range(150)]
    weak = [FakeServer(world, f"q{index}", (6, 12)) for index in range(50)]
    for server in (*servers, *weak):
        server.serve()
        server.load_s = 0.2
    movers = [mover_of(world, server, seed) for seed, server in enumerate(servers[:8])]
    await run_until(movers, lambda: world.most_at_once > 1)


@pytest.mark.parametrize("opens_gap", [False, True])
def test_who_would_fill_a_gap_best_comes_first(opens_gap):
    """Each that is better gets a second; who opens another gap waits until all have looked."""
    move = move_of(fills_gap=True, opens_gap=opens_gap)
    generator = np.random.default_rng(0)
    for num_better in range(8):
        ahead_s = RANK_S * min(num_better, MAX_RANK) + mover_module.LOOK_S * opens_gap
        assert ahead_s <= delay(move, num_better, generator) <= ahead_s + mover_module.GAP_DELAY_S
