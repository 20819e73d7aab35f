"""Training through two remote servers against PEFT in one local process with as many threads: tokens per second.

    python tests/bench/bench_train.py [--rounds 5] [--steps 2] [--rows 8] [--columns 128]

The embedded model in fp32, on loopback: two servers of 15 blocks with one thread each, and the client, whose
embeddings, head and loss run with two; the local job has two. LoRA of rank 8 on q and v, and prompt tuning with 16
tokens. Remote and local jobs take their steps in turn, round by round, on the same batches; figures are medians over
rounds of the ratio.

    kept        the servers have memory for the graphs of a whole batch: the way back needs no second forward
    default     they have what they have without --training-memory: 1 GiB
    again       they keep what enters each block, and run each block once more on the way back
    star        as kept, but servers don't send to each other
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import judged, print_report
from swarms import Loopback, start_swarm
from training_jobs import METHODS, Job, local_model, random_batch, remote_model, traffic_of

SPANS = ("0:15", "15:30")
TARGETS = {"kept": 0.80, "default": 0.65, "again": 0.65}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="one more is run first and not counted (default: 5)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round (default: 2)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default: 8)")
    parser.add_argument("--columns", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--threads", type=int, default=2, help="of the local job, and of the client (default: 2)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processes: list[Any] = []
    try:
        kept = start_swarm(Loopback(), SPANS, processes, "--training-memory", "6GiB")
        default = start_swarm(Loopback(), SPANS, processes)
        again = start_swarm(Loopback(), SPANS, processes, module="altered_server", env={"SWARM_BENCH_NO_GRAPHS": "1"})
        results = {
            method: measure(method, kept.address, default.address, again.address, args) for method in args.methods
        }
    finally:
        for process in processes:
            process.stop()
    report(results, args)


def measure(method: str, kept: str, default: str, again: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of each way, round by round."""
    remotes = {
        "kept": remote_model(METHODS[method](), kept),
        "default": remote_model(METHODS[method](), default),
        "again": remote_model(METHODS[method](), again),
        "star": remote_model(METHODS[method](), kept, push=False),
    }
    jobs = {"local": Job(local_model(METHODS[method]())), **{name: Job(model) for name, model in remotes.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(args.rounds + 1):
        for name, job in jobs.items():
            batches = [random_batch(args.rows, args.columns, seed=number * args.steps + it) for it in range(args.steps)]
            started = time.perf_counter()
            for batch in batches:
                job.step(batch)
            if number:
                seconds[name].append((time.perf_counter() - started) / args.steps)
    right = jobs["local"].losses
    worst = max(abs(a / b - 1) for name in remotes for a, b in zip(jobs[name].losses, right, strict=True))
    num_tokens = args.rows * args.columns * args.steps * (args.rounds + 1)
    traffic = {name: [count / num_tokens for count in traffic_of(model)] for name, model in remotes.items()}
    for model in remotes.values():
        model.close()
    return {"seconds": seconds, "loss_difference": worst, "bytes_per_token": traffic}


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print all."""
    print(f"{'':16}{'tokens/s':>10}{'of local':>10}{'sent B/token':>14}{'received':>10}")
    targets, table = {}, {}
    for method, result in results.items():
        seconds = result["seconds"]
        for name, own in seconds.items():
            speed = args.rows * args.columns / statistics.median(own)
            ratio = statistics.median(local / mine for local, mine in zip(seconds["local"], own, strict=True))
            sent, received = result["bytes_per_token"].get(name, (0.0, 0.0))
            print(f"{method + ' ' + name:16}{speed:10.0f}{ratio:10.2f}{sent:14.0f}{received:10.0f}")
            table[f"{method} {name}"] = {
                "tokens_per_s": round(speed, 1),
                "of_local": round(ratio, 3),
                "sent": round(sent),
                "received": round(received),
            }
            if name in TARGETS:
                targets[f"{method}, {name}: of local"] = judged(ratio, ">=", TARGETS[name])
        print(f"{method}: losses differ from the local ones by at most {result['loss_difference']:.1e}")
    print_report("train", targets, rounds=args.rounds, rows=args.rows, columns=args.columns, table=table)


if __name__ == "__main__":
    main()
