"""Tests of the arithmetic and the child processes of the benchmarks; the benchmarks themselves need a quiet machine."""

import json
import os
import select
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(HERE))


def make_answer(gaps, *, servers_s, client_s, hops=2):
    """An answer whose steps take `servers_s` on all servers together, and some way."""
    from swarms import Answer

    from swarm.client.timings import HopTiming
    from swarm.types import BlockRange

    times = [1.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    timings = [
        HopTiming(
            peer_id=str(hop),
            blocks=BlockRange(hop, hop + 1),
            num_tokens=tokens,
            round_trip_s=1.0,
            compute_s=servers_s / hops,
            queue_s=0.0,
        )
        for tokens in [7] + [1] * len(gaps)
        for hop in range(hops)
    ]
    steps = [0.5, *(gap - client_s for gap in gaps)]
    return Answer(tokens=[1, 2, 3], started=0.0, times=times, steps=steps, timings=timings)


def test_a_chain_without_overhead_is_ideal_and_a_slower_one_is_not():
    """The ideal is the ways, the servers' compute and the client's."""
    from bench_chain import make_row

    ways_s, servers_s, client_s = 3 * 0.025, 0.030, 0.005
    ideal = make_answer([ways_s + servers_s + client_s] * 10, servers_s=servers_s, client_s=client_s)
    slow = make_answer([2 * (4 * 0.025 + servers_s + client_s)] * 10, servers_s=servers_s, client_s=client_s)
    row = make_row(2, 25.0, {"push": [ideal], "star": [slow]})
    assert row["push"]["over_ideal"] == 1.0
    assert row["star"]["over_ideal"] == 2.0
    assert row["push"]["ideal_ms"] == pytest.approx(110)
    assert row["same_tokens"]


@given(st.integers(1, 80), st.integers(1, 8))
def test_spans_cover_all_blocks_evenly(num_blocks, servers):
    """Each block once, and no server has two more than another."""
    from bench_chain import spans

    if servers > num_blocks:
        return
    cut = [tuple(map(int, span.split(":"))) for span in spans(num_blocks, servers)]
    assert [block for start, end in cut for block in range(start, end)] == list(range(num_blocks))
    sizes = [end - start for start, end in cut]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 60), st.integers(0, 3))
def test_failures_are_seeded_and_half_of_each_kind(runs, seed):
    """The same seed plans the same failures; every one comes before the answer ends."""
    from bench_failover import HOPS, plan

    failures = plan(seed, runs, 20)
    assert failures == plan(seed, runs, 20)
    kinds = [failure.signal for failure in failures]
    assert abs(kinds.count(signal.SIGKILL) - kinds.count(signal.SIGSTOP)) <= 1
    assert all(-1 <= failure.token < 17 and failure.hop in range(HOPS) for failure in failures)


def test_a_stall_is_the_longest_gap_beyond_the_usual():
    """Also when it comes before the first token."""
    from bench_failover import Usual, stall_s

    usual = Usual()
    usual.learn(make_answer([0.01] * 20, servers_s=0.001, client_s=0.0))
    usual.first_s.append(1.0)
    assert stall_s(make_answer([0.01] * 9 + [0.51], servers_s=0.0, client_s=0.0), usual) == pytest.approx(0.5)
    late = make_answer([0.01] * 10, servers_s=0.0, client_s=0.0)
    late.started = -2.0
    assert stall_s(late, usual) == pytest.approx(2.0)


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_not_exceeded_by_its_share(values, share):
    """And no smaller value does as well."""
    from common import percentile

    found = percentile(values, share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_the_last_line_of_a_report_is_json_with_verdicts(capsys):
    """Whoever reads a benchmark by program needs nothing else."""
    from common import judged, print_report

    print_report("x", {"fast": judged(2.0, ">=", 1.6), "lean": judged(2.0, "<=", 1.6)}, rows=[1])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bench"] == "x" and report["rows"] == [1]
    assert [target["pass"] for target in report["targets"].values()] == [True, False]


def test_local_and_swarm_ways_are_compared_round_by_round():
    """A drift of the machine's speed that hits all alike changes no ratio."""
    from bench_prefill import ratio, run_rounds

    speed = iter([1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 7.0, 7.0])
    ways = {"slow": lambda _: (2 * next(speed), 0), "fast": lambda _: (next(speed), 0)}
    measured = run_rounds(ways, [[0]] * 4)
    assert ratio(measured["slow"], measured["fast"]) == 2.0
    assert statistics.median(seconds for seconds, _ in measured["fast"]) == 5.0


def test_the_server_for_benchmarks_notices_a_renamed_setting():
    """A benchmark that changes nothing must not look as if it did."""
    from altered_server import set_default

    class Limited:
        def __init__(self, *, limit=1):
            self.limit = limit

    set_default(Limited, "limit", 5)
    assert Limited().limit == 5
    with pytest.raises(KeyError, match="max_limit"):
        set_default(Limited, "max_limit", 5)


def test_what_the_server_for_benchmarks_changes_is_there():
    """The names that it changes are those of the server."""
    program = "import altered_server; altered_server.take_whole_prompts(4096); altered_server.sleep_for_tokens(0.1)"
    program += "; altered_server.slow_down(0.1)"
    program += "\nfrom swarm.server.limits import HandlerLimits; assert HandlerLimits().max_step_tokens == 4096"
    subprocess.run([sys.executable, "-c", program], cwd=HERE, check=True)


def test_forked_servers_die_with_the_benchmark_that_is_killed():
    """A server and what it has started end when their owner gets SIGKILL."""
    program = (
        "import sys\nfrom forked import ServerFactory, process_tree\n"
        "with ServerFactory() as factory:\n"
        "    server = factory.start(['--blocks', '0:1', '--host', '127.0.0.1', '--quantization', 'none'])\n"
        "    server.peer_id\n"
        "    print(*process_tree(server.pid), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        watches = [os.pidfd_open(pid) for pid in pids]
        owner.kill()
        for watch in watches:
            ended, _, _ = select.select([watch], [], [], 60)
            os.close(watch)
            assert ended
    assert len(pids) >= 2
