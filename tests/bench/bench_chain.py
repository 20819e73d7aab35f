"""Time per token through 2 to 4 servers on hosts of their own, against what the way and the compute alone take.

    python tests/bench/bench_chain.py [--delays 5 25 50] [--hops 2 3 4] [--rounds 3] [--new-tokens 24]

Every pair of hosts has the same one-way delay (see tests/wan). With servers that push to each other a token needs
(N + 1) ways at best, through the client (the star) 2 N. The ideal is those ways and the compute: what the servers say
their blocks took, and the client's own share between two steps. Both kinds of client ask the same servers in turn.
Servers and client have one thread each and run one after another for a single session, so two cores are enough.
"""

import argparse
import statistics
from itertools import pairwise
from typing import Any

import torch
from common import judged, print_report
from swarms import MODEL, Answer, answer, chat_tokens, connect, start_swarm

from swarm.client.processes import PeerProcess, all_stopped
from tests.wan import DelayProxies, Wan, open_network

NUM_BLOCKS = 30
QUESTION = "Explain in a few sentences why the sky looks blue during the day and red in the evening."
TARGET_OVER_IDEAL = 1.10
SETTLE_TOKENS = 4
"""First gaps of an answer that are not counted: connections open, windows grow."""


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    kind, late_p99_ms = "", 0.0
    print(
        f"{'hops':>4}{'delay ms':>10}{'push ms':>9}{'ideal':>8}{'ratio':>7}{'star ms':>9}{'ideal':>8}{'ratio':>7}",
        end="",
    )
    print(f"{'star/push':>11}{'compute ms':>12}{'same tokens':>13}", flush=True)
    for hops in args.hops:
        network = open_network(1 + hops)
        processes: list[PeerProcess] = []
        with network, all_stopped(processes):
            rows += measure(network, hops, processes, args)
        kind = network.kind
        if network.report is not None:
            late_p99_ms = max(late_p99_ms, 1000 * network.report.late_p99_s)
    worst = max(row["push"]["over_ideal"] for row in rows)
    targets = {
        "worst_push_over_ideal": judged(worst, "<=", TARGET_OVER_IDEAL),
        "least_star_over_push": judged(min(row["star_over_push"] for row in rows), ">=", 1.0),
        "same_tokens": judged(sum(row["same_tokens"] for row in rows) / len(rows), "==", 1.0),
    }
    details = {"network": kind, "emulator_late_p99_ms": round(late_p99_ms, 3), "model": MODEL, "rows": rows}
    print_report("chain", targets, rounds=args.rounds, new_tokens=args.new_tokens, **details)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[5, 25, 50], help="one-way, ms (default: 5 25 50)")
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 3, 4], help="servers (default: 2 3 4)")
    parser.add_argument("--rounds", type=int, default=3, help="answers per client and delay (default: 3)")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens per answer (default: 24)")
    return parser.parse_args()


def measure(
    network: Wan | DelayProxies, hops: int, processes: list[PeerProcess], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per delay for this number of servers."""
    options = ("--quantization", "none", "--threads", "1", "--kv-cache", "4096")
    swarm = start_swarm(network, spans(NUM_BLOCKS, hops), processes, *options)
    clients = {"push": connect(network, swarm), "star": connect(network, swarm, push=False)}
    prompt = chat_tokens(QUESTION)
    rows = []
    for delay_ms in args.delays:
        network.set_delay(delay_ms / 1000)
        answers: dict[str, list[Answer]] = {name: [] for name in clients}
        for _ in range(args.rounds):
            for name, model in clients.items():
                answers[name].append(answer(model, prompt, args.new_tokens))
        rows.append(make_row(hops, delay_ms, answers))
        print_row(rows[-1])
    network.set_delay(0.0)
    for model in clients.values():
        model.close()
    return rows


def spans(num_blocks: int, num_servers: int) -> list[str]:
    """The blocks cut into ranges whose lengths differ by at most one."""
    edges = [num_blocks * i // num_servers for i in range(num_servers + 1)]
    return [f"{start}:{end}" for start, end in pairwise(edges)]


def make_row(hops: int, delay_ms: float, answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """What is reported of one delay."""
    push = summary(answers["push"], ways_ms=(hops + 1) * delay_ms)
    star = summary(answers["star"], ways_ms=2 * hops * delay_ms)
    return {
        "hops": hops,
        "delay_ms": delay_ms,
        "push": push,
        "star": star,
        "star_over_push": round(star["token_ms"] / push["token_ms"], 2),
        "same_tokens": len({tuple(one.tokens) for kind in answers.values() for one in kind}) == 1,
    }


def summary(answers: list[Answer], *, ways_ms: float) -> dict[str, float]:
    """Medians over all tokens: time, servers' and client's compute, the ideal, and each token's ratio to its ideal."""
    gaps, servers, client, queues = [], [], [], []
    for one in answers:
        gaps += one.gaps[SETTLE_TOKENS:]
        servers += one.server_seconds()[SETTLE_TOKENS:]
        queues += one.server_seconds("queue_s")[SETTLE_TOKENS:]
        client += [gap - step for gap, step in zip(one.gaps, one.steps[1:], strict=True)][SETTLE_TOKENS:]
    ideals = [ways_ms / 1000 + sum(parts) for parts in zip(servers, client, strict=True)]
    ratios = [gap / ideal for gap, ideal in zip(gaps, ideals, strict=True)]
    return {
        "token_ms": round(1000 * statistics.median(gaps), 2),
        "ideal_ms": round(1000 * statistics.median(ideals), 2),
        "over_ideal": round(statistics.median(ratios), 3),
        "server_compute_ms": round(1000 * statistics.median(servers), 2),
        "client_compute_ms": round(1000 * statistics.median(client), 2),
        "server_queue_ms": round(1000 * statistics.median(queues), 2),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(f"{row['hops']:4}{row['delay_ms']:10g}", end="")
    for kind in ("push", "star"):
        part = row[kind]
        print(f"{part['token_ms']:9.1f}{part['ideal_ms']:8.1f}{part['over_ideal']:7.3f}", end="")
    compute_ms = row["push"]["server_compute_ms"] + row["push"]["client_compute_ms"]
    print(f"{row['star_over_push']:11.2f}{compute_ms:12.1f}{row['same_tokens']!s:>13}", flush=True)


if __name__ == "__main__":
    main()
