"""How the churn benchmark judges: what a server served when, where gaps were, who stayed in routes for how long."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from swarm.types import BlockRange

INF = float("inf")
MOVE = "INFO swarm.server.mover: moving from blocks 0:10 to 10:20: the swarm's worth grows by 3.2 tokens/s"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def life(said, died_at=INF, *, peer_id="", was_killed=True, ended_at=INF):
    from churn_servers import Life

    said = [(0.0, f"  /ip4/127.0.0.1/tcp/4001/p2p/{peer_id}"), *said] if peer_id else said
    times, lines = [at for at, _ in said], [line for _, line in said]
    server = SimpleNamespace(ended_at=ended_at, times=times, lines=lines)
    return Life(server, died_at=died_at, was_killed=was_killed)


def spell(blocks, since, until=INF, loading_since=0.0):
    from gaps import Spell

    return Spell(blocks=BlockRange.parse(blocks), loading_since=loading_since, since=since, until=until)


def route(at, *hops):
    return {"at": at, "hops": hops}


def test_a_server_serves_what_it_says_until_it_moves_or_dies():
    """Not what it has left, nor what it loads; and nothing any more once it was told to stop."""
    from churn_servers import moves_of

    said = [
        (1.0, "listening on"),
        (3.0, "ONLINE: blocks 0:10, unquantised float32 on cpu, KV cache for 4096 tokens"),
        (8.0, f"2026-11-28 {MOVE}, and a gap is filled"),
        (11.0, "ONLINE: blocks 10:20, unquantised float32 on cpu, KV cache for 4096 tokens"),
    ]
    first, second = life(said, died_at=15.0).spells
    assert (first.blocks, first.loading_since, first.since, first.until) == (BlockRange(0, 10), 1.0, 3.0, 8.0)
    assert (second.blocks, second.loading_since, second.since, second.until) == (BlockRange(10, 20), 8.0, 11.0, 15.0)
    assert second.is_moved and not first.is_moved
    assert [it.blocks for it in life(said, died_at=9.0).spells] == [BlockRange(0, 10)]
    assert life(said, ended_at=5.0).spells[0].until == 5.0 and life(said[:1]).spells == []
    (move,) = moves_of(said)
    assert (move.at, move.leaves, move.takes, move.fills_gap) == (8.0, BlockRange(0, 10), BlockRange(10, 20), True)
    assert not moves_of([(8.0, MOVE)])[0].fills_gap


def test_there_is_a_gap_when_no_server_of_some_blocks_lives():
    """The next one must be online before the last one ends; one that loads its blocks does not count."""
    from gaps import gaps_between, had_gap

    others = [spell("0:10", 0.0), spell("20:30", 0.0)]
    follow = [spell("10:20", 0.0, 5.0), spell("10:20", 4.0, 9.0), spell("10:20", 8.0)]
    assert gaps_between([*others, *follow], 30, 0.0, 20.0) == []
    late = gaps_between([*others, spell("10:20", 0.0, 5.0), spell("5:15", 6.0, loading_since=5.5)], 30, 0.0, 20.0)
    assert [(gap.blocks, gap.since, gap.until) for gap in late] == [
        (tuple(range(10, 15)), 5.0, 6.0),
        (tuple(range(15, 20)), 5.0, 20.0),
    ]
    filled, lasting = late
    assert filled.waited_s == 0.5 and filled.filled_by.blocks == BlockRange(5, 15)
    assert lasting.waited_s == 15.0 and lasting.filled_by is None
    assert had_gap(late, 1.0, 20.0) and had_gap(late, 5.5, 5.6) and not had_gap(late, 1.0, 4.9)
    assert not had_gap([filled], 6.0, 20.0)


def test_the_part_of_the_time_without_gaps_counts_gaps_at_the_same_time_once():
    """Blocks 10:15 miss a second, 15:20 fifteen, of twenty in all."""
    from gaps import covered_part, gaps_between

    spells = [spell("0:10", 0.0), spell("10:20", 0.0, 5.0), spell("5:15", 6.0)]
    assert covered_part(gaps_between(spells, 20, 0.0, 20.0), 0.0, 20.0) == 0.25
    assert covered_part([], 0.0, 20.0) == 1.0


def test_a_dead_server_is_forgotten_after_the_last_route_over_it():
    """Counted from SIGKILL, or from the end of one that was told to stop; routes before that don't count."""
    from bench_churn import forgotten_after_s

    routes = [
        route(9.0, ("a", "0:10"), ("b", "10:20")),
        route(12.0, ("a", "0:10")),
        route(30.0, ("b", "10:20")),
    ]
    assert forgotten_after_s(life([], 10.0, peer_id="a"), routes) == 2.0
    assert forgotten_after_s(life([], 10.0, peer_id="c"), routes) == 0.0
    assert forgotten_after_s(life([], 10.0, peer_id="b", was_killed=False, ended_at=15.0), routes) == 15.0


def test_routes_to_blocks_that_a_server_has_left_are_found():
    """It lives, but serves others: such a route can't be right; one over what it serves is."""
    from bench_churn import left_for_s

    said = [(3.0, "ONLINE: blocks 0:10,"), (8.0, MOVE), (11.0, "ONLINE: blocks 10:20,")]
    routes = [
        route(5.0, ("a", "0:10")),
        route(9.5, ("a", "2:7"), ("b", "7:30")),
        route(12.0, ("a", "10:20")),
        route(20.0, ("a", "0:10")),
    ]
    assert left_for_s(life(said, 15.0, peer_id="a"), routes) == [1.5]


def test_what_clients_tell_is_found_among_other_output(capsys):
    """Libraries print to the same pipe."""
    from churn_client import tell, told

    tell("look", error="")
    assert told(["Loading weights: 100%", *capsys.readouterr().out.splitlines(), ""]) == [{"kind": "look", "error": ""}]
