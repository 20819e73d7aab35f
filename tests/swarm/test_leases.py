"""One server moves per region at a time, whoever sees the same need at the same moment."""

import asyncio
import struct
import time
from contextlib import suppress
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import leases as leases_module
from swarm.errors import PeerMisbehaved
from swarm.leases import (
    CLAIM_S,
    FORGET_S,
    GAP_FORGET_S,
    GAP_PATIENCE_S,
    MAX_LEASE_S,
    Claim,
    LeaseDesk,
    Patience,
    claims_before,
    touch_nothing,
)
from swarm.network import Node, NodeConfig
from swarm.types import BlockRange

MODEL = "ab" * 32
ranges = st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda pair: BlockRange(pair[0], sum(pair)))
claims = st.builds(
    Claim, peer_id=st.sampled_from("abcdefgh"), leaves=ranges, takes=ranges, expires_at=st.floats(100.0, 200.0)
)


@given(st.lists(claims, max_size=8, unique_by=lambda claim: claim.peer_id))
def test_of_settled_rivals_one_may_move_in_each_region(found):
    """No two rivals both win, and of all that are there somebody does."""
    winners = [claim for claim in found if touch_nothing(claim, claims_before(claim, found, 50.0, is_settled=True))]
    assert not any(one.rivals(two) for one in winners for two in winners if one is not two)
    assert bool(winners) == bool(found)


@given(claims, st.lists(claims, max_size=8), st.data())
def test_what_was_claimed_before_comes_before(own, found, data):
    """Before a claim has settled all others do, then those that were known; none that has ended or lasts too long."""
    others = [claim for claim in found if claim.peer_id != own.peer_id]
    assert claims_before(own, found, 50.0, is_settled=False) == others
    known = {claim.lot for claim in data.draw(st.lists(st.sampled_from(found)))} if found else set()
    settled = claims_before(own, found, 50.0, is_settled=True, known=known)
    assert settled == [claim for claim in others if claim.lot in known or claim.lot < own.lot]
    for now in (200.0, -MAX_LEASE_S):
        assert claims_before(own, found, now, is_settled=False) == []


@given(claims)
def test_a_claim_survives_the_wire(claim):
    """It is read back as it was written, in 17 bytes."""
    assert Claim.decode(claim.encode(), peer_id=claim.peer_id) == claim
    assert len(claim.encode()) == 17


@given(st.binary(max_size=24))
def test_garbage_is_a_misbehaving_peer_and_nothing_else(data):
    """Whatever somebody stores, others only ignore it."""
    with suppress(PeerMisbehaved):
        Claim.decode(data, peer_id="x")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((2, 0, 4, 8, 12, 1e9), "format 2"),
        ((1, 4, 4, 8, 12, 1e9), "4:4"),
        ((1, 0, 4, 12, 8, 1e9), "12:8"),
        ((1, 0, 4, 8, 13, 1e9), "0:4 and 8:13, the model has 0:12"),
        ((1, 0, 60000, 8, 12, 1e9), "0:60000"),
        ((1, 0, 4, 8, 12, float("nan")), "nan"),
        ((1, 0, 4, 8, 12, float("inf")), "inf"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(fields, reason):
    """Blocks that the model does not have would keep everybody from moving; an end that never comes, for ever."""
    with pytest.raises(PeerMisbehaved, match=reason) as caught:
        Claim.decode(struct.pack("!BHHHHd", *fields), peer_id="liar", num_blocks=12)
    assert caught.value.peer_id == "liar"


class FakeTable:
    """A DHT that many desks share; a later expiry replaces an earlier one."""

    def __init__(self, values, peer_id):
        self.values, self.peer_id = values, peer_id
        self.may_store, self.stores = asyncio.Event(), asyncio.Event()
        self.may_store.set()
        self.is_full = False

    async def dht_store(self, key, subkey, value, expires_at):
        assert subkey == self.peer_id
        self.stores.set()
        await self.may_store.wait()
        if self.is_full:
            return False
        if expires_at <= self.values.get(subkey, (b"", 0.0))[1]:
            return False
        self.values[subkey] = value, expires_at
        return True

    async def dht_get(self, key):
        await asyncio.sleep(0)
        return {peer_id: value for peer_id, (value, expires_at) in self.values.items() if expires_at > time.time()}


def desks(count):
    values = {}
    return [LeaseDesk(FakeTable(values, f"p{index}"), MODEL, settle_s=0.01, now=lambda: 0.0) for index in range(count)]


def alone(claims):
    """Whether one fills a gap that needs one: nobody comes before it."""
    return not claims


async def at_once(rivals, *, lease_s, fills_gap=None):
    """Who gets the right to move of those that have all looked before any of them has claimed."""
    for desk in rivals:
        desk._node.may_store.clear()
    here, there = BlockRange(0, 4), BlockRange(8, 12)
    trying = [
        asyncio.create_task(desk.acquire(here, there, delay_s=0.0, lease_s=lease_s, fills_gap=fills_gap))
        for desk in rivals
    ]
    for desk in rivals:
        await desk._node.stores.wait()
    for desk in rivals:
        desk._node.may_store.set()
    return [lease is not None for lease in await asyncio.gather(*trying)]


async def test_of_servers_that_claim_at_the_same_moment_one_gets_the_lease():
    """Eight that all want to the same blocks: the others stay, and one of them may move when it has arrived."""
    rivals = desks(8)
    here, there = BlockRange(0, 4), BlockRange(8, 12)
    results = await at_once(rivals, lease_s=60.0)
    assert sum(results) == 1
    winner = results.index(True)
    assert not await rivals[(winner + 1) % 8].acquire(here, there, delay_s=0.0, lease_s=60.0)
    await rivals[winner].release(here, there)
    assert await rivals[(winner + 1) % 8].acquire(here, there, delay_s=0.0, lease_s=60.0)


@pytest.mark.parametrize("late", [0, 1])
async def test_a_server_whose_claim_took_long_to_store_does_not_move_beside_one_that_did_not_see_it(late):
    """Both looked before either had claimed; whoever has the lower lot, who was late finds the other's claim."""
    now = [0.0]
    both = desks(2)
    for desk in both:
        desk._now = lambda: now[0]
    slow, quick = both[late], both[1 - late]
    here, there = BlockRange(0, 4), BlockRange(8, 12)
    slow._node.may_store.clear()
    slow_one = asyncio.create_task(slow.acquire(here, there, delay_s=0.0, lease_s=60.0))
    await slow._node.stores.wait()
    assert await quick.acquire(here, there, delay_s=0.0, lease_s=60.0)
    now[0] = 5.0
    slow._node.may_store.set()
    assert not await slow_one


async def test_of_those_that_fill_a_gap_as_many_go_as_it_takes():
    """Five want to at the same moment and two are needed: each takes the claims before its own as done."""
    rivals = desks(5)
    results = await at_once(rivals, lease_s=60.0, fills_gap=lambda claims: len(claims) < 2)
    assert sum(results) == 2


async def test_who_fills_a_gap_knows_who_else_does():
    """Also those with the higher lot, if they came first; and it leaves alone who is waited for no more."""
    both = desks(2)
    here, there, beside = BlockRange(0, 4), BlockRange(8, 12), BlockRange(10, 14)
    for one, other in (both, reversed(both)):
        first = await one.acquire(here, there, delay_s=0.0, lease_s=60.0, fills_gap=alone)
        second = await other.acquire(here, beside, delay_s=0.0, lease_s=60.0, fills_gap=lambda claims: True)
        assert first is not None and first.moves == {}
        assert second is not None and second.moves == {one._node.peer_id: there}
        assert [claim.peer_id for claim in await other.respected(here, there)] == [one._node.peer_id]
        await one.release(here, there)
        await other.release(here, beside)


async def test_of_slow_servers_one_fills_a_gap_and_none_moves_for_a_gain():
    """Nobody can be sure of being seen: a gap is not left open for that."""
    for fills_gap, num_winners in ((alone, 1), (None, 0)):
        both = desks(2)
        for desk in both:
            desk._now = count(step=5.0).__next__
        assert sum(await at_once(both, lease_s=60.0, fills_gap=fills_gap)) == num_winners


async def test_a_table_that_takes_no_more_claims_keeps_gaps_from_nobody():
    """2,048 identities fill a key: nobody moves for a gain then, and gaps are filled all the same."""
    (desk,) = desks(1)
    desk._node.is_full = True
    here, there = BlockRange(0, 4), BlockRange(8, 12)
    assert not await desk.acquire(here, there, delay_s=0.0, lease_s=60.0)
    assert await desk.acquire(here, there, delay_s=0.0, lease_s=60.0, fills_gap=alone)


async def test_claims_of_those_that_did_not_win_are_soon_gone_from_the_table():
    """They lost to one that may keep its claim for half an hour; theirs would fill the key."""
    rivals = desks(8)
    results = await at_once(rivals, lease_s=MAX_LEASE_S)
    left_s = {peer_id: expires_at - time.time() for peer_id, (_, expires_at) in rivals[0]._node.values.items()}
    winner = f"p{results.index(True)}"
    assert left_s.pop(winner) > MAX_LEASE_S - 60.0
    assert len(left_s) == 7 and max(left_s.values()) <= CLAIM_S + 1.0


async def test_claims_beyond_the_model_keep_nobody_from_moving():
    """They don't exist."""
    values = {}
    liar = LeaseDesk(FakeTable(values, "liar"), MODEL, settle_s=0.01)
    honest = LeaseDesk(FakeTable(values, "honest"), MODEL, num_blocks=12, settle_s=0.01)
    assert await liar.acquire(BlockRange(0, 200), BlockRange(0, 200), delay_s=0.0, lease_s=60.0)
    assert await honest.acquire(BlockRange(0, 4), BlockRange(8, 12), delay_s=0.0, lease_s=60.0)


async def test_servers_of_different_regions_move_at_the_same_time():
    """Claims that touch no common block don't hinder each other."""
    left, right = desks(2)
    assert await left.acquire(BlockRange(0, 4), BlockRange(4, 8), delay_s=0.0, lease_s=60.0)
    assert await right.acquire(BlockRange(8, 12), BlockRange(12, 16), delay_s=0.0, lease_s=60.0)


def claim_of(peer_id, now, start=0) -> Claim:
    leaves, takes = BlockRange(start, start + 4), BlockRange(start + 8, start + 12)
    return Claim(peer_id=peer_id, leaves=leaves, takes=takes, expires_at=now + 300.0)


@given(st.lists(st.floats(1.0, 120.0), min_size=200, max_size=200))
def test_who_claims_for_ever_without_moving_is_waited_for_until_patience_ends(pauses):
    """However it times its claims, it keeps us for little more than half an hour, and not again for an hour."""
    patience, now, waited_s = Patience(MAX_LEASE_S, FORGET_S), 0.0, 0.0
    for pause_s in pauses:
        now += pause_s
        if patience.respected(claim_of("own", now), [claim_of("liar", now)], now):
            waited_s += pause_s
    assert waited_s <= (MAX_LEASE_S + 120.0) * (1 + now // (MAX_LEASE_S + FORGET_S))


def test_patience_ends_with_one_peer_and_not_with_others():
    """A claim elsewhere costs none, and after an hour without claims in our way a peer starts anew."""
    patience, own = Patience(60.0, FORGET_S), claim_of("own", 0.0)
    assert len(patience.respected(own, [claim_of("liar", 0.0), claim_of("other", 0.0, start=16)], 0.0)) == 2
    for now in (30.0, 60.0):
        assert len(patience.respected(own, [claim_of("liar", now)], now)) == 1
    rivals = [claim_of("liar", 61.0), claim_of("other", 61.0)]
    assert [it.peer_id for it in patience.respected(own, rivals, 61.0)] == ["other"]
    late = 60.0 + FORGET_S
    assert len(patience.respected(own, [claim_of("liar", late)], late)) == 1


def test_the_time_between_two_gaps_costs_no_patience():
    """Two servers that have met at one are to keep out of each other's way at the next one as well."""
    patience, own = Patience(GAP_PATIENCE_S, GAP_FORGET_S), claim_of("own", 0.0)
    for now in (0.0, 3.0, 6.0, 100.0, 103.0, 106.0):
        assert patience.respected(own, [claim_of("other", now)], now)


async def test_a_gap_is_not_left_open_for_a_claim_that_leads_to_nothing(monkeypatch):
    """Ten seconds after it was met first, a peer that claims again and again is not waited for any more."""
    now = time.time()
    monkeypatch.setattr(leases_module.time, "time", lambda: now)
    liar, honest = desks(2)
    here, there = BlockRange(0, 4), BlockRange(8, 12)
    began, tries = now, 0
    while True:
        await liar._store(claim_of("p0", now))
        tries += 1
        if await honest.acquire(here, there, delay_s=0.0, lease_s=60.0, fills_gap=alone):
            break
        now += 5.0
    assert GAP_PATIENCE_S < now - began <= GAP_PATIENCE_S + 5.0 and tries > 2
    assert not await honest.acquire(here, there, delay_s=0.0, lease_s=60.0), "for a gain it waits longer"


async def test_garbage_among_the_claims_is_ignored():
    """A stranger's nonsense keeps nobody from moving."""
    (desk,) = desks(1)
    desk._node.values["stranger"] = b"nonsense", time.time() + 60.0
    assert await desk.acquire(BlockRange(0, 4), BlockRange(4, 8), delay_s=0.0, lease_s=60.0)


@pytest.mark.parametrize("num_rounds", [2])
async def test_leases_work_over_a_real_dht(num_rounds):
    """Two peers of a real DHT: one gets it, and after it has given it back the other does."""
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as first,
        await Node.start(NodeConfig(host="127.0.0.1", initial_peers=first.addresses)) as second,
    ):
        one, other = (LeaseDesk(node, MODEL, settle_s=0.2) for node in (first, second))
        here, there = BlockRange(0, 4), BlockRange(8, 12)
        for _ in range(num_rounds):
            assert await one.acquire(here, there, delay_s=0.0, lease_s=60.0)
            assert not await other.acquire(here, there, delay_s=0.0, lease_s=60.0)
            await one.release(here, there)
            one, other = other, one


async def test_a_move_that_is_given_up_while_its_claim_settles_leaves_none():
    """As when the server is told to stop just then: others need not wait for the claim's end."""
    values, stored = {}, asyncio.Event()

    class Telling(FakeTable):
        async def dht_store(self, *args):
            stored.set()
            return await super().dht_store(*args)

    desk = LeaseDesk(Telling(values, "a"), MODEL, settle_s=600.0)
    moving = asyncio.create_task(desk.acquire(BlockRange(0, 2), BlockRange(2, 4), delay_s=0.0, lease_s=100.0))
    await stored.wait()
    await asyncio.sleep(0)
    moving.cancel()
    with suppress(asyncio.CancelledError):
        await moving
    assert Claim.decode(values["a"][0], peer_id="a").expires_at == 0.0
