"""The health page: how long a look at the swarm takes, until the page is there, and how heavy the page is.

    64 simulated servers (real peers on loopback, each asked and answering) ─► look ─► GET /     target <= 1 s
    2,000 records in the DHT, whose servers are nowhere                     ─► look ─► GET /     target <= 3 s

A refresh is a whole one: all records are read from the DHT and checked, every server that is due is asked, the state is
composed, the page rendered and fetched over HTTP. The first look also makes all the connections; it is reported, too.
"""

import argparse
import asyncio
import gzip
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, judged, print_report

from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap
from swarm.client.runtime import LoopThread
from swarm.health.monitor import Settings
from swarm.health.pages import FOLDER
from swarm.health.serving import Page

START_TIMEOUT_S = 240.0


def main() -> None:
    """Run both swarms, print a table and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=64, metavar="N", help="simulated servers (default: 64)")
    parser.add_argument("--records", type=int, default=2000, metavar="N", help="records (default: 2000)")
    parser.add_argument("--looks", type=int, default=12, metavar="N", help="looks at each swarm (default: 12)")
    args = parser.parse_args()
    env = {"PYTHONPATH": str(ROOT / "tests" / "bench")}
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        processes.append(start_bootstrap())
        address = processes[0].address()
        processes.append(PeerProcess("simulated_servers", [address, str(args.servers)], env=env))
        processes[1].wait_for("READY", START_TIMEOUT_S)
        few = measure(address, args.looks, lambda state: sum(it.is_serving for it in servers_of(state)))
    processes.clear()
    with all_stopped(processes):
        processes.append(PeerProcess("simulated_servers", ["records", str(args.records)], env=env))
        address = processes[0].wait_for(r"READY (\S+)", START_TIMEOUT_S)[1]
        many = measure(address, args.looks, lambda state: len(servers_of(state)))
    for name, result in ((f"{args.servers} servers", few), (f"{args.records} records", many)):
        print(
            f"{name:14} first {result['first_s']:.2f} s, then median {result['median_s']:.3f} s,"
            f" worst {result['worst_s']:.3f} s; {result['found']} found, {result['fresh']:.0f} answered meanwhile;"
            f" page {result['page_kb']:.1f} KB ({result['gzip_kb']:.1f} KB gzipped)"
        )
    print_report(
        "health",
        {
            "servers_found": judged(few["found"], "==", args.servers),
            "refresh_64_servers_median_s": judged(few["median_s"], "<=", 1.0),
            "records_found": judged(many["found"], "==", args.records),
            "refresh_2000_records_worst_s": judged(many["worst_s"], "<=", 3.0),
            "page_kb": judged(max(few["page_kb"], many["page_kb"]), "<=", 200.0),
        },
        servers=few,
        records=many,
    )


def servers_of(state: Any) -> tuple[Any, ...]:
    """All servers of a state."""
    return tuple(server for model in state.models for server in model.servers)


def measure(address: str, num_looks: int, count: Callable[[Any], int]) -> dict[str, float]:
    """Look at a swarm again and again.

    Args:
        address: of a peer of it.
        num_looks: how often.
        count: what of a state has to be found.
    """
    loop = LoopThread("page")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(initial_peers=(address,), period_s=1.0, has_canary=False)
        page = loop.run(_start(settings, Path(folder) / "history"), 60)
        try:
            seconds = []
            fresh = []
            for _ in range(num_looks):
                started, asked = time.perf_counter(), time.monotonic()
                state = loop.run(page.monitor.refresh(), 60)
                text = urllib.request.urlopen(page.url).read()
                seconds.append(time.perf_counter() - started)
                answers = page.monitor._census._answers.values()
                fresh.append(sum(it.asked_at >= asked and it.info is not None for it in answers))
                time.sleep(1.0)  # so that everybody is due again
        finally:
            loop.run(page.close(), 60)
            loop.stop()
    static = b"".join(path.read_bytes() for path in sorted((FOLDER / "static").iterdir()))
    return {
        "first_s": seconds[0],
        "median_s": statistics.median(seconds[1:]),
        "worst_s": max(seconds[1:]),
        "found": count(state),
        "fresh": statistics.median(fresh[1:]),
        "page_kb": (len(text) + len(static)) / 1000,
        "gzip_kb": (len(gzip.compress(text)) + len(gzip.compress(static))) / 1000,
    }


async def _start(settings: Settings, history: Path) -> Page:
    """A page that looks only when it is told to."""
    page = await Page.start(settings, host="127.0.0.1", port=0, history=history)
    page._tasks[0].cancel()
    await asyncio.wait({page._tasks[0]})
    return page


if __name__ == "__main__":
    main()
