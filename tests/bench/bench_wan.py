"""How exact the emulated network of tests/wan is: error of the one-way delay, on an idle machine and on a busy one.

    python tests/bench/bench_wan.py [--packets 400]

A datagram carries the time at which it was sent, the kernel notes when it came to the other host, so neither end's own
scheduling counts. Busy means twice as many spinning processes as cores. Packets are sent at random intervals of a few
milliseconds, in short bursts, as activations are.
"""

import argparse
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from common import judged, percentile, print_report

from tests.wan import Wan

DELAYS_S = (0.005, 0.025, 0.05)
TARGET_P99_MS = 1.0
SO_TIMESTAMPNS = 35
SPIN = [sys.executable, "-c", "while True: pass"]
PACKET_BYTES = 1200
NEW_BURST = 0.4
"""Probability that a burst ends after a packet."""


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=400, help="datagrams per delay (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    rows = []
    for spinning in (0, 2 * cores):
        with spinners(spinning), Wan(2) as wan:
            rows += [measure(wan, delay_s, spinning, args) for delay_s in DELAYS_S]
    print(f"{'delay ms':>9}{'spinning':>10}{'error ms: median':>18}{'p99':>8}{'max':>8}")
    for row in rows:
        print(f"{row['delay_ms']:9}{row['spinning']:10}{row['median_ms']:18}{row['p99_ms']:8}{row['max_ms']:8}")
    worst = max(row["p99_ms"] for row in rows)
    targets = {"error_p99_ms": judged(worst, "<=", TARGET_P99_MS)}
    print_report("wan", targets, cores=cores, seed=args.seed, rows=rows)


def measure(wan: Wan, delay_s: float, spinning: int, args: argparse.Namespace) -> dict[str, float]:
    """Errors against this delay."""
    wan.set_delay(delay_s)
    errors = [1000 * (seconds - delay_s) for seconds in one_way(wan, args.packets, random.Random(args.seed))]
    return {
        "delay_ms": 1000 * delay_s,
        "spinning": spinning,
        "median_ms": round(statistics.median(errors), 3),
        "p99_ms": round(percentile(errors, 0.99), 3),
        "max_ms": round(max(errors), 3),
    }


def one_way(wan: Wan, num_packets: int, chance: random.Random) -> list[float]:
    """Seconds that datagrams took from host 0 to host 1."""
    with wan.inside(0):
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with wan.inside(1):
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, far:
        far.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        far.bind((wan.address(1), 0))
        far.settimeout(5.0)
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(lambda: [flight_s(far) for _ in range(num_packets)])
            for sent in range(num_packets):
                near.sendto(struct.pack("q", time.time_ns()).ljust(PACKET_BYTES), far.getsockname())
                if chance.random() < NEW_BURST or sent == num_packets - 1:
                    time.sleep(chance.uniform(0.001, 0.006))
            return received.result()


def flight_s(far: socket.socket) -> float:
    """Receive one datagram; how long it was under way, by the kernel's note of its arrival."""
    data, ancillary, _, _ = far.recvmsg(PACKET_BYTES, socket.CMSG_SPACE(16))
    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
    arrived: int = seconds * 1_000_000_000 + nanoseconds
    return (arrived - struct.unpack("q", data[:8])[0]) / 1e9


@contextmanager
def spinners(count: int) -> Iterator[None]:
    """Processes that want all of the processor."""
    processes = [subprocess.Popen(SPIN) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
