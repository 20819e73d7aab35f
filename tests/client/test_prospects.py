"""Chains with one other server are compared with the present one like with like."""

import pytest

from swarm.client.prospects import MAX_SLOWNESS, Outlook, Seen, look_ahead
from swarm.route_map import Location
from swarm.routing import Need, Offer, Router
from swarm.types import BlockRange, Hop

FORMAT = ("float32", "none")
FIRST, SECOND = Hop(peer_id="a", blocks=BlockRange(0, 4)), Hop(peer_id="b", blocks=BlockRange(4, 8))


def offer(peer_id: str, blocks: BlockRange, block_s: float = 0.01, **fields) -> Offer:
    """A server right beside us."""
    return Offer(
        peer_id=peer_id, blocks=blocks, block_s=block_s, visit_s=0.0, location=Location(client_rtt_s=0.0), **fields
    )


def look(*offers: Offer, chain=(FIRST, SECOND), formats=None, **known) -> Outlook | None:
    """What is expected where these servers are known, and those of the chain."""
    offers = (offer("a", BlockRange(0, 4), kv_free_tokens=0), offer("b", BlockRange(4, 8), kv_free_tokens=0), *offers)
    wishes = {"version": 7, "need": Need(kv_tokens=100), "penalties": {}, "seen": {}, **known}
    return look_ahead(Router(offers), chain, format_of=lambda peer_id: (formats or {}).get(peer_id, FORMAT), **wishes)


def gains(outlook: Outlook | None) -> dict[str, float]:
    """Seconds per token that each prospect saves, by its server."""
    assert outlook is not None
    return {it.target.peer_id: outlook.predicted_s - it.predicted_s for it in outlook.prospects}


def test_every_hop_has_its_prospects():
    """Servers that hold all of its blocks, priced within the whole chain; the version says by which records."""
    outlook = look(
        offer("c", BlockRange(0, 4), 0.005), offer("d", BlockRange(2, 8), 0.02), offer("e", BlockRange(2, 6))
    )
    assert outlook is not None and outlook.version == 7
    assert gains(outlook) == {"c": pytest.approx(0.02), "d": pytest.approx(-0.04)}
    assert {it.target.peer_id: it.hop for it in outlook.prospects} == {"c": FIRST, "d": SECOND}
    assert all(it.target.blocks == it.hop.blocks for it in outlook.prospects)


def test_who_has_no_room_another_format_or_no_way_is_no_prospect():
    """A move that must fail, or that would change the answer, is none."""
    servers = [offer(name, SECOND.blocks, 0.005) for name in ("int8", "half", "cut-off", "good")]
    outlook = look(
        offer("full", SECOND.blocks, 0.005, kv_free_tokens=99),
        *servers,
        formats={"int8": ("float32", "int8"), "half": ("float16", "none")},
        without_push={("a", "cut-off"), ("good", "a")},
    )
    assert gains(outlook).keys() == {"good"}
    outlook = look(offer("cut-off", FIRST.blocks), offer("good", FIRST.blocks), without_push={("cut-off", "b")})
    assert gains(outlook).keys() == {"good"}


def test_failures_count_against_other_servers_alone():
    """A hop that fails is replaced by others; that it has failed is no reason to go where it was not tried."""
    outlook = look(offer("c", FIRST.blocks), penalties={"a": 10.0, "c": 1.0})
    assert gains(outlook) == {"c": pytest.approx(-1.0)}


def test_newcomers_are_as_slow_beyond_their_word_as_others_turned_out():
    """What all take more than they say, the next one will; the hop that is to be replaced doesn't count."""
    seen = {"a": Seen(slowness=5.0, excess_s=1.0), "b": Seen(slowness=1.5, excess_s=0.001)}
    assert gains(look(offer("c", FIRST.blocks, 0.005), seen=seen)) == {"c": pytest.approx(0.02 - 0.01 - 0.001)}
    seen["far"] = Seen(slowness=1.25, excess_s=0.002)
    assert gains(look(offer("c", FIRST.blocks, 0.005), seen=seen)) == {"c": pytest.approx(0.02 - 0.005 - 0.001)}


@pytest.mark.parametrize(("slowness", "is_better"), [(2.5, False), (3.0, False), (9.0, True)])
def test_where_nobody_else_was_measured_a_twin_is_as_slow_as_the_server_in_use(slowness: float, is_better: bool):
    """All take more than they say; only a server that has become much slower than that is worth leaving."""
    whole = BlockRange(0, 8)
    offers = (offer("one", whole, 0.01 * slowness, kv_free_tokens=1000), offer("twin", whole, 0.01))
    outlook = look_ahead(
        Router(offers),
        (Hop(peer_id="one", blocks=whole),),
        version=1,
        need=Need(kv_tokens=100),
        penalties={},
        seen={"one": Seen(slowness=slowness, excess_s=0.0)},
        format_of=lambda peer_id: FORMAT,
    )
    assert (gains(outlook)["twin"] > 1e-9) is is_better


@pytest.mark.parametrize(("missing_s", "least_s", "most_s"), [(0.05, 0.0, 0.0), (0.08, 0.0, 0.0), (1.0, 0.8, 0.92)])
def test_a_chain_in_which_much_goes_missing_is_worth_a_try_elsewhere(missing_s: float, least_s: float, most_s: float):
    """By the steps of one chain nobody can tell with whom it goes, so all have equal shares. Little goes everywhere."""
    seen = {name: Seen(slowness=1.0, excess_s=missing_s) for name in "ab"}
    offers = [
        Offer(peer_id=peer_id, blocks=blocks, block_s=0.01, visit_s=visit_s, location=Location(client_rtt_s=0.0))
        for peer_id, blocks, visit_s in (
            ("a", FIRST.blocks, missing_s),
            ("b", SECOND.blocks, missing_s),
            ("c", FIRST.blocks, 0.0),
            ("d", SECOND.blocks, 0.0),
        )
    ]
    outlook = look_ahead(
        Router(offers),
        (FIRST, SECOND),
        version=1,
        need=Need(),
        penalties={},
        seen=seen,
        format_of=lambda peer_id: FORMAT,
    )
    found = gains(outlook)
    assert found.keys() == {"c", "d"} and all(least_s - 1e-9 <= it <= most_s + 1e-9 for it in found.values())


def test_who_was_measured_is_taken_at_that():
    """Its price has what it took already."""
    seen = {"b": Seen(slowness=2.0, excess_s=0.01), "c": Seen(slowness=3.0, excess_s=0.02)}
    assert gains(look(offer("c", FIRST.blocks, 0.005), seen=seen)) == {"c": pytest.approx(0.02)}


@pytest.mark.parametrize(("slowness", "factor"), [(0.1, 1.0), (1e9, MAX_SLOWNESS)])
def test_quick_servers_make_no_newcomer_quicker_and_none_infinitely_slow(slowness, factor):
    """Nobody is believed to be better than it says; and one wrong word of another server is no wall."""
    outlook = look(offer("c", FIRST.blocks, 0.005), seen={"b": Seen(slowness=slowness, excess_s=0.0)})
    assert gains(outlook) == {"c": pytest.approx(0.02 - 0.02 * (factor - 1.0))}


def test_of_a_chain_with_somebody_unknown_nothing_is_expected():
    """A server whose record has expired has no price."""
    assert look(chain=(FIRST, Hop(peer_id="gone", blocks=SECOND.blocks))) is None
    assert look(chain=()) is None
