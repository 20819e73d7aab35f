"""How the churn benchmark judges: when blocks were without a server, and how long a dead one stayed in routes."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def life(span, online_at, died_at=float("inf"), *, peer_id="", was_killed=True, ended_at=float("inf")):
    from bench_churn import Life

    server = SimpleNamespace(peer_id=peer_id, ended_at=ended_at)
    return Life(span, server, online_at, died_at, was_killed)


def test_there_is_a_gap_when_no_server_of_some_blocks_lives():
    """The next one must be online before the last one dies; one that loads its blocks does not count."""
    from bench_churn import had_gap

    others = [life("0:10", 0.0), life("20:30", 0.0)]
    follow = [life("10:20", 0.0, 5.0), life("10:20", 4.0, 9.0), life("10:20", 8.0)]
    late = [life("10:20", 0.0, 5.0), life("10:20", 6.0)]
    loading = [life("10:20", 0.0, 5.0), life("10:20", float("inf"))]
    assert not had_gap([*others, *follow], 1.0, 20.0)
    assert had_gap([*others, *late], 1.0, 20.0) and had_gap([*others, *loading], 1.0, 20.0)
    assert not had_gap([*others, *late], 1.0, 4.9) and not had_gap([*others, *late], 6.0, 20.0)
    assert had_gap([*others, *late], 5.5, 5.6) and had_gap(others, 1.0, 2.0)


def test_a_dead_server_is_forgotten_after_the_last_route_over_it():
    """Counted from SIGKILL, or from the end of one that was told to stop; routes before that don't count."""
    from bench_churn import forgotten_after_s

    routes = [{"at": 9.0, "peers": ["a", "b"]}, {"at": 12.0, "peers": ["a"]}, {"at": 30.0, "peers": ["b"]}]
    assert forgotten_after_s(life("0:10", 0.0, 10.0, peer_id="a"), routes) == 2.0
    assert forgotten_after_s(life("0:10", 0.0, 10.0, peer_id="c"), routes) == 0.0
    stopped = life("0:10", 0.0, 10.0, peer_id="b", was_killed=False, ended_at=15.0)
    assert forgotten_after_s(stopped, routes) == 15.0


def test_what_clients_tell_is_found_among_other_output(capsys):
    """Libraries print to the same pipe."""
    from churn_client import tell, told

    tell("look", error="")
    assert told(["Loading weights: 100%", *capsys.readouterr().out.splitlines(), ""]) == [{"kind": "look", "error": ""}]
