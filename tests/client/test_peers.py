"""What a client remembers of servers beside their records."""

import asyncio
import logging
import threading
import time
from typing import Any, cast

import pytest

from swarm.client import peers as peers_module
from swarm.client.peers import NUM_ACQUAINTANCES, NUM_PROMISING, PUSH_RETRY_S, REFRESH_S, Peers
from swarm.client.timings import HopTiming
from swarm.client.way_back import Leg
from swarm.coordinates import Place
from swarm.errors import PeerDisconnected, PeerTimeout, PeerUnreachable, RelaysBusy, RouteNotFound
from swarm.registry import ServerRecord
from swarm.routing import Router
from swarm.types import BlockRange, Hop, ServerState


@pytest.fixture
def peers() -> Peers:
    """Nobody is asked for records here."""
    return Peers(cast(Any, None), model="0" * 64, model_name="fake", num_blocks=2)


def test_servers_that_cannot_reach_each_other_are_named_once(peers, caplog):
    """The user learns which two; the pair is known from then on, in this direction only."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            peers.cannot_push("sender-12345678", "receiver-87654321")
    assert [record.message for record in caplog.records] == [
        "server …12345678 can't send to server …87654321: what goes from one to the other now passes this client"
    ]
    assert peers.pairs_without_push == {("sender-12345678", "receiver-87654321")}


def test_servers_that_could_not_reach_each_other_get_another_try(peers, monkeypatch):
    """After some minutes the network may be another."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    peers.cannot_push("a", "b")
    now += PUSH_RETRY_S - 1
    assert peers.pairs_without_push
    now += 1
    assert not peers.pairs_without_push


class SlowRegistry:
    """Answers when it is told to; everything is in the first shard."""

    def __init__(self, *records):
        self.records, self.num_lookups = records, 0
        self.may_answer = asyncio.Event()

    async def lookup_shards(self, model, shards, *, num_blocks):
        self.num_lookups += 1
        await self.may_answer.wait()
        return [list(self.records) if shard == 0 else [] for shard in shards]


BLOCKS = BlockRange(0, 2)


def record(peer_id: str, **fields) -> ServerRecord:
    usual = {
        "peer_id": peer_id,
        "model": "0" * 64,
        "blocks": BLOCKS,
        "state": ServerState.ONLINE,
        "decode_tps": 100.0,
        "load": 0.0,
        "kv_free_tokens": 1000,
        "quantization": "none",
        "dtype": "float32",
        "public_name": "",
        "version": "0",
        "expires_at": time.time() + 60.0,
    }
    return ServerRecord(**{**usual, **fields})


def timing(peer_id: str, *, compute_s: float, overhead_s: float, blocks: BlockRange = BLOCKS) -> HopTiming:
    return HopTiming(
        peer_id=peer_id,
        blocks=blocks,
        num_tokens=1,
        round_trip_s=compute_s + overhead_s,
        compute_s=compute_s,
        queue_s=0.0,
    )


async def test_a_route_does_not_wait_for_old_records_to_be_read_again(peers, monkeypatch):
    """A failover in a long session goes on with what is known, and the news comes in the background, once."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    registry = peers._directory._registry = SlowRegistry(record("old"))
    registry.may_answer.set()
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["old"]
    num_lookups = registry.num_lookups
    registry.may_answer.clear()
    registry.records = (record("new"),)
    now += REFRESH_S
    for _ in range(3):
        peers.keep_fresh()
        assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["old"]
    registry.may_answer.set()
    await peers._reader
    assert registry.num_lookups == num_lookups + 1
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["new"]


async def test_a_route_over_a_server_that_failed_is_only_made_with_fresh_records(peers, monkeypatch):
    """Nobody better is known: perhaps there is news."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    registry = peers._directory._registry = SlowRegistry(record("only"))
    registry.may_answer.set()
    await peers.route(BlockRange(0, 2))
    now += 1.0
    peers.failed("only", PeerDisconnected("gone"))
    registry.records = (record("spare"), record("only"))
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["spare"]


def use(peers, pinger) -> None:
    """Have this measure the ways."""
    peers._pinger = peers._table.pinger = pinger


async def read(peers, *records):
    """Let `peers` know these records."""
    registry = peers._directory._registry = SlowRegistry(*records)
    registry.may_answer.set()
    await peers.refresh(max_age_s=0.0)


async def chosen(peers, **wishes) -> str:
    (hop,) = await peers.route(BlockRange(0, 2), **wishes)
    return hop.peer_id


async def test_a_server_that_is_slower_than_it_says_is_found_out_by_what_steps_took(peers, monkeypatch):
    """What it announces is believed until steps over it were measured, and again a good while later."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("boasts", decode_tps=1e9), record("honest", decode_tps=100.0))
    assert await chosen(peers) == "boasts"
    for _ in range(3):
        peers.measured([timing("boasts", compute_s=0.5, overhead_s=0.1)])
    now += 2.0
    assert await chosen(peers) == "honest"
    now += 1000.0
    peers._directory._refreshed_at = now
    assert await chosen(peers) == "boasts"


async def test_a_server_that_claims_no_time_but_takes_it_is_found_out_too(peers, monkeypatch):
    """Time that nobody admits counts as excess of the hops that it was spent on, and fades."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("liar", decode_tps=1e9), record("honest", decode_tps=100.0))
    assert await chosen(peers) == "liar"
    for _ in range(10):
        peers.measured([timing("liar", compute_s=0.0, overhead_s=3.0)])
    now += 2.0
    assert await chosen(peers) == "honest"


async def test_the_honest_hops_of_a_chain_are_cleared_by_other_chains(peers, monkeypatch):
    """Only totals are known: the time is the liar's, since chains without it are quick and all with it are slow."""
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: 1000.0)
    first, second = BlockRange(0, 1), BlockRange(1, 2)
    await read(peers, *(record(name, blocks=first) for name in "ab"), *(record(name, blocks=second) for name in "lc"))
    await peers.route(BLOCKS)
    overhead_s = {"a": 0.01, "b": 0.01, "c": 0.01, "l": 3.0}
    for chain in ["al"] * 10 + ["bc", "ac", "bl", "al"] * 60:
        share_s = sum(overhead_s[name] for name in chain) / 2
        blocks = dict(zip(chain, (first, second), strict=True))
        peers.measured([timing(name, compute_s=0.0, overhead_s=share_s, blocks=blocks[name]) for name in chain])
    excess_s = {name: peers._observed[name].excess_s(1000.0) for name in "abcl"}
    assert excess_s["l"] > 1.0 and all(excess_s[name] < 0.1 * excess_s["l"] for name in "abc"), excess_s


async def test_a_failed_server_is_avoided_for_a_while(peers, monkeypatch):
    """Its penalty halves every 20 seconds."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("fast", decode_tps=1000.0), record("slow", decode_tps=100.0))
    peers.failed("fast", PeerDisconnected("gone"))
    assert await chosen(peers) == "slow"
    now += 240.0
    peers._directory._refreshed_at = now
    assert await chosen(peers) == "fast"


async def test_a_server_whose_relays_are_busy_is_avoided_until_they_have_room(peers, monkeypatch):
    """It is as good as before then: it has not failed."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("fast", decode_tps=1000.0), record("slow", decode_tps=100.0))
    peers.failed("fast", RelaysBusy("no room", retry_after_s=7.0))
    assert await chosen(peers) == "slow" and not peers._has_failed("fast")
    now += 7.0
    assert await chosen(peers) == "fast"


async def test_a_server_that_announces_but_does_not_answer_is_avoided_whatever_it_claims(peers, monkeypatch):
    """A new record with better promises does not absolve it; where it is the only one, it gets another try."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    honest = record("honest", decode_tps=10.0, load=1.0)
    for promised_tps in (1000.0, 1e6, 1e9):
        await read(peers, record("silent", decode_tps=promised_tps), honest)
        assert await chosen(peers) == ("silent" if promised_tps == 1000.0 else "honest")
        peers.failed("silent", PeerTimeout("no answer"))
        now += 2.0
    await read(peers, record("silent", decode_tps=1e9))
    assert await chosen(peers) == "silent"


async def test_queues_room_and_distance_decide_between_equal_servers(peers):
    """What servers announce of their queues, caches and places goes into the cost."""
    use(peers, FakePinger())
    for worse, better in [
        ({"queue_s": 0.2}, {}),
        ({"kv_free_tokens": 100}, {"kv_free_tokens": 200}),
        ({"place": Place(position=(0.2, 0.0, 0.0))}, {"place": Place(position=(0.01, 0.0, 0.0))}),
        ({"is_relayed": True}, {}),
    ]:
        await read(peers, record("worse", **worse), record("better", **better))
        assert await chosen(peers, num_tokens=100) == "better"


class FakePinger:
    """A client at the origin that has measured nobody.

    Args:
        heard: servers to which it is connected; all by default.
        silent: what asking others for a sign of life gives.
    """

    place = Place(error=0.1)

    def __init__(self, heard=None, silent=None):
        self.heard, self.silent, self.asked = heard, silent or {}, []

    def rtt_s(self, peer_id):
        return None

    def hears(self, peer_id):
        return self.heard is None or peer_id in self.heard

    async def ping(self, records):
        ids = [it.peer_id for it in records]
        self.asked += ids
        return {peer_id: self.silent[peer_id] for peer_id in ids if peer_id in self.silent}


async def test_who_is_not_heard_is_asked_before_a_route_over_it_is_handed_out(peers):
    """Records outlive their servers: the route goes over one that answers, also where that is slower."""
    pinger = FakePinger(heard={"slow"}, silent={"dead": PeerUnreachable("refused"), "off": PeerTimeout("3 s")})
    use(peers, pinger)
    await read(peers, record("dead", decode_tps=1e4), record("off", decode_tps=1e3), record("slow"))
    assert await chosen(peers) == "slow"
    assert pinger.asked == ["dead", "off"]
    await read(peers, record("new", decode_tps=1e4), record("slow"))
    assert await chosen(peers) == "new"
    assert pinger.asked == ["dead", "off", "new"]


async def test_sessions_move_and_training_goes_to_servers_that_are_there(peers):
    """As new sessions do, even where chance decides."""
    pinger = FakePinger(heard={"slow"}, silent={"dead": PeerUnreachable("refused")})
    use(peers, pinger)
    await read(peers, record("dead", prefill_tps=1e8), record("slow", prefill_tps=1.0))
    assert [hop.peer_id for hop in await peers.spread(BlockRange(0, 2))] == ["slow"]
    assert (await peers.replica(BlockRange(0, 2), without={"old"})).peer_id == "slow"
    assert set(pinger.asked) == {"dead"}


async def test_blocks_of_servers_that_are_gone_are_missing(peers):
    """It is said at once, and no session is opened anywhere in vain."""
    peers._pinger = peers._table.pinger = cast(
        Any, FakePinger(heard={"first"}, silent={"dead": PeerUnreachable("refused")})
    )
    await read(peers, record("first", blocks=BlockRange(0, 1)), record("dead", blocks=BlockRange(1, 2)))
    with pytest.raises(RouteNotFound, match="1:2 are gone") as caught:
        await peers.route(BlockRange(0, 2))
    assert list(caught.value.missing) == [1]
    with pytest.raises(RouteNotFound):
        await peers.replica(BlockRange(1, 2), without=set())


async def test_a_server_whose_record_was_late_and_has_just_expired_is_gone(peers, monkeypatch):
    """The table of routes is a second old, at most; without a record nobody is asked, and nobody is handed out."""
    use(peers, FakePinger(heard={"first"}))
    now = time.time()
    first = record("first", blocks=BlockRange(0, 1), expires_at=now + 65.0)
    await read(peers, first, record("old", blocks=BlockRange(1, 2), expires_at=now + 20.0))
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["first", "old"]
    monkeypatch.setattr("swarm.directory.time.time", lambda: now + 21.0)
    with pytest.raises(RouteNotFound, match="1:2 are gone"):
        await peers.route(BlockRange(0, 2))


async def test_a_server_that_is_slow_to_answer_is_used_where_it_is_the_only_one(peers):
    """A session gives it more time to open than a route does."""
    use(peers, FakePinger(heard=set(), silent={"far": PeerTimeout("3 s")}))
    await read(peers, record("far"))
    assert await chosen(peers) == "far"


async def test_an_acquaintance_that_does_not_answer_has_failed(peers):
    """What a look around finds out counts for the next route."""
    use(peers, FakePinger(silent={"dead": PeerTimeout("3 s")}))
    await read(peers, record("dead", decode_tps=1e4), record("slow"))
    await peers._get_to_know()
    assert await chosen(peers) == "slow"


async def test_a_busy_server_costs_more_than_an_idle_one(peers, monkeypatch):
    """By the share of its capacity that is in use, and by how long steps wait there."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("busy", load=0.6), record("idle"))
    assert await chosen(peers) == "idle"
    await read(peers, record("idle", load=0.6), record("queue", queue_s=0.05))
    assert await chosen(peers) == "idle"


async def test_a_place_that_nothing_was_measured_of_is_not_believed(peers, monkeypatch):
    """A newcomer announces one, so that others can find theirs."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    await read(peers, record("new", place=Place()), record("old", place=Place(error=0.5)))
    locations = {offer.peer_id: offer.location for offer in (peers._table.offer(it, now) for it in peers.records)}
    assert locations["new"].place is None and locations["old"].place is not None


async def test_ways_are_measured_again_with_the_records_and_first_to_those_that_are_used(peers, monkeypatch):
    """Else all are forgotten after some minutes."""
    now, asked = 1000.0, []

    class FakePinger:
        place = Place()

        def rtt_s(self, peer_id: str) -> float | None:
            return None

        async def ping(self, records):
            asked.append({it.peer_id for it in records})
            return {}

    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    peers._pinger = FakePinger()
    await read(peers, *(record(f"p{index}") for index in range(30)))
    await peers._table.fresh()
    peers.measured([timing("p7", compute_s=0.01, overhead_s=0.0)])
    now += REFRESH_S
    peers.keep_fresh()
    await peers._reader
    assert len(asked) == 1 and "p7" in asked[0] and len(asked[0]) == NUM_ACQUAINTANCES
    chain = (Hop(peer_id="p7", blocks=BlockRange(0, 2)),)
    best = {it.target.peer_id for it in (await peers.outlook(chain)).prospects[:NUM_PROMISING]}
    await peers._get_to_know()  # first to those to which a session may go
    assert best | {"p7"} <= asked[1] and len(asked[1]) == NUM_ACQUAINTANCES


async def test_a_session_moves_to_the_best_server_that_has_all_its_blocks(peers, monkeypatch):
    """Room and load decide; who has only a part of the blocks, or was tried, is out of the question."""
    monkeypatch.setattr(peers_module, "NEWS_S", 0.05)
    blocks = BlockRange(0, 2)
    part = record("part", blocks=BlockRange(0, 1), decode_tps=1e6)
    leaving = record("leaving", state=ServerState.DRAINING, decode_tps=1e6)
    await read(
        peers,
        record("old", decode_tps=1e6),
        part,
        leaving,
        record("full", kv_free_tokens=99),
        record("busy", load=0.9),
        record("good"),
    )
    found, tried = [], {"old"}
    for _ in range(3):
        hop = await peers.replica(blocks, without=tried, num_tokens=100)
        assert hop.blocks == blocks
        found.append(hop.peer_id)
        tried.add(hop.peer_id)
    assert found == ["good", "busy", "full"]
    with pytest.raises(RouteNotFound, match="no other server holds blocks 0:2"):
        await peers.replica(blocks, without=tried)


async def test_a_replica_that_has_just_come_is_found(peers, monkeypatch):
    """Where nobody is known, the records are read again, even if that was done a moment ago."""
    monkeypatch.setattr(peers_module, "NEWS_S", 0.05)
    await read(peers, record("old"))
    peers._directory._registry.records = (record("old"), record("new"))
    assert (await peers.replica(BlockRange(0, 2), without={"old"})).peer_id == "new"


async def test_a_live_chain_is_compared_with_others_by_what_was_measured(peers, monkeypatch):
    """A server that has become slow shows, though its record is as good as that of another one."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    half = {"blocks": BlockRange(0, 1)}
    rest = {"blocks": BlockRange(1, 2)}
    await read(
        peers,
        record("slow", **half),
        record("end", **rest),
        record("other", **half),
        record("odd", **half, dtype="float16"),
    )
    chain = (Hop(peer_id="slow", blocks=half["blocks"]), Hop(peer_id="end", blocks=rest["blocks"]))
    before = await peers.outlook(chain, num_tokens=100)
    assert [it.target.peer_id for it in before.prospects] == ["other"]
    assert before.prospects[0].predicted_s == pytest.approx(before.predicted_s)
    for _ in range(3):
        slow, end = (
            HopTiming(peer_id=hop.peer_id, blocks=hop.blocks, num_tokens=1, round_trip_s=s, compute_s=s, queue_s=0.0)
            for hop, s in zip(chain, (0.5, 0.01), strict=True)
        )
        peers.measured([slow, end])
    peers._table.expire()
    after = await peers.outlook(chain, num_tokens=100)
    assert after.version == before.version
    assert after.predicted_s - after.prospects[0].predicted_s == pytest.approx(0.49)
    assert not (await peers.outlook(chain, num_tokens=1000)).prospects  # nobody has room for so many
    assert await peers.outlook((Hop(peer_id="gone", blocks=BlockRange(0, 2)),)) is None


async def test_servers_of_a_large_swarm_are_balanced_for_training_beside_the_loop(peers, monkeypatch):
    """That takes a third of a second for thousands; who asks for a route over a gap hears of it as ever."""
    threads, balance = [], Router.balance

    def watched(*args, **options) -> None:
        threads.append(threading.current_thread())
        balance(*args, **options)

    monkeypatch.setattr(Router, "balance", watched)
    monkeypatch.setattr(peers_module, "LARGE", 2)
    await read(peers, record("a"), record("b"))
    assert (await peers.spread(BLOCKS))[0].blocks == BLOCKS
    assert threads[0] is not threading.current_thread()
    with pytest.raises(RouteNotFound):
        await peers.spread(BlockRange(0, 3))


async def test_a_training_run_leaves_a_slow_server_for_a_chain_that_is_much_quicker(peers, monkeypatch):
    """Not for one that only announces more, nor for another slow one; and it comes back when that has faded."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    chain, fast = (Hop(peer_id="liar", blocks=BLOCKS),), record("fast", prefill_tps=4e4)
    await read(peers, record("liar", prefill_tps=1e4), fast)
    assert await peers.quicker(chain) == ()
    for _ in range(30):  # a tenth of what it announces, which would be 3 * 1000 * 2 / 1e4 seconds for each batch
        now += 6.0
        peers.trained(Leg(hops=chain, since=now - 6.0), 1000)
    await read(peers, record("liar", prefill_tps=1e4), fast)
    assert [hop.peer_id for hop in await peers.quicker(chain)] == ["fast"]
    now += REFRESH_S + 1
    peers._directory._refreshed_at = now
    await read(peers, record("liar", prefill_tps=1e4), record("slow", prefill_tps=100.0))
    assert await peers.quicker(chain) == ()
    now += 7200.0
    await read(peers, record("liar", prefill_tps=1e4), fast)
    assert await peers.quicker(chain) == ()
    peers._observed.forget_faded(now)
    assert "liar" not in peers._observed


async def test_routes_of_training_avoid_who_gives_less_than_it_announces(peers, monkeypatch):
    """In proportion to what it gave; a server that is busy by what it announces is as slow as it should be."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    for load, share in ((0.0, 0.14), (0.9, 0.5)):
        peers._observed.clear()
        now += 1.0
        await read(peers, record("a", prefill_tps=1e4, load=load), record("b", prefill_tps=1e4 * (1.0 - load)))
        await peers.spread(BLOCKS)
        for _ in range(30):
            now += 6.0
            peers.trained(Leg(hops=(Hop(peer_id="a", blocks=BLOCKS),), since=now - 6.0), 1000)
        await read(peers, *peers._directory._registry.records)
        chosen = [(await peers.spread(BLOCKS))[0].peer_id for _ in range(100)]
        assert chosen.count("a") == pytest.approx(100 * share, abs=4)


async def test_a_large_swarm_is_not_read_whole_again_before_that_has_paid(peers, monkeypatch):
    """A gap in it makes many clients ask again and again; each reads all records once in a while."""
    now, reads = 1000.0, []
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(peers_module, "READ_BYTES_PER_S", 65)
    await read(peers, record("a"), record("b"))  # 2600 bytes: 40 s of the budget, a quarter of which is waited for

    async def refresh(*, max_age_s, everything=False):
        reads.append(everything)

    peers.refresh = refresh
    for later_s in (0.0, 2.0, 7.0, 1.5, 1.5):
        now += later_s
        await peers._read_everything(0.5)
    assert reads == [True, False, False, True, False]
