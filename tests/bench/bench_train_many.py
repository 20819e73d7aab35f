"""Several tenants train at once on the same two servers, and somebody is answered meanwhile.

    python tests/bench/bench_train_many.py [--tenants 4] [--steps 8] [--rounds 3] [--rows 2] [--columns 64]

The embedded model in fp32, two servers of 15 blocks with one thread each, on loopback; each tenant is a process of its
own with one thread, and trains a LoRA of rank 8 on q and v. Two figures:

    together    seconds until all tenants have taken their steps at once, by the sum of what each takes alone, in turn
    decode      99th percentile of the time between two tokens of an answer while all train, by that without training;
                the tenants then only go forth and back through the blocks, since this machine has no cores for them

The losses of a tenant must be those that it has alone: company changes the last bits at most.
"""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import judged, percentile, print_report
from swarms import Loopback, answer, chat_tokens, connect_here, start_swarm

SPANS = ("0:15", "15:30")
QUESTION = "Explain in a few sentences why the sky looks blue during the day and red in the evening."
TARGETS = {"together": 0.7, "decode": 2.0}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=4, help="who train at once (default: 4)")
    parser.add_argument("--steps", type=int, default=8, help="of each tenant in a round (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="one more is run first and not counted (default: 3)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch (default: 2)")
    parser.add_argument("--columns", type=int, default=64, help="tokens of a row (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--answers", type=int, default=3, help="with and without training (default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processes: list[Any] = []
    tenants: list[Tenant] = []
    try:
        swarm = start_swarm(Loopback(), SPANS, processes, "--training-memory", "2GiB")
        tenants = [Tenant(swarm.address, seed, args) for seed in range(args.tenants)]
        for tenant in tenants:
            tenant.wait()
        ratios, difference, seconds = together(tenants, args)
        gaps = decode(swarm, tenants, args)
    finally:
        for tenant in tenants:
            tenant.close()
        for process in processes:
            process.stop()
    report(ratios, difference, seconds, gaps, args)


class Tenant:
    """A process that trains when it is told to."""

    def __init__(self, address: str, seed: int, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = (theirs, address, seed, args.rows, args.columns)
        self._process = context.Process(target=serve_tenant, args=given, daemon=True)
        self._process.start()

    def start(self, num_steps: int) -> None:
        """Take steps, from the first values on."""
        self._pipe.send((num_steps, False))

    def load(self) -> None:
        """Go forth and back through the blocks, without embeddings, head and optimiser, until `unload`."""
        self._pipe.send((0, True))

    def unload(self) -> None:
        """End that."""
        self._pipe.send(None)
        self.wait()

    def wait(self) -> list[float]:
        """The losses of what was started."""
        losses: list[float] = self._pipe.recv()
        return losses

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(30)
        self._process.kill()


def serve_tenant(pipe: Connection, address: str, seed: int, rows: int, columns: int) -> None:
    """What runs in a tenant's process."""
    from training_jobs import Job, lora, random_batch, remote_model

    torch.set_num_threads(1)
    model = remote_model(lora(), address, seed=seed)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [random_batch(rows, columns, seed=100 * seed + it) for it in range(8)]
    pipe.send([])
    while True:
        try:
            num_steps, is_load = pipe.recv()
        except EOFError:
            return model.close()
        if is_load:
            hidden = torch.randn(rows, columns, model.config.hidden_size).requires_grad_()
            while not pipe.poll():
                model.get_base_model().blocks(hidden).sum().backward()
            pipe.send([float(pipe.recv() is None)])
            continue
        model.load_state_dict(first)
        job = Job(model)
        pipe.send([job.step(batches[it % len(batches)]) for it in range(num_steps)])


def together(tenants: list[Tenant], args: argparse.Namespace) -> tuple[list[float], float, list[tuple[float, float]]]:
    """Ratios by round, the greatest difference of losses, and seconds in turn and at once."""
    seconds, difference = [], 0.0
    for number in range(args.rounds + 1):
        started = time.perf_counter()
        alone = []
        for tenant in tenants:
            tenant.start(args.steps)
            alone.append(tenant.wait())
        between = time.perf_counter()
        for tenant in tenants:
            tenant.start(args.steps)
        at_once = [tenant.wait() for tenant in tenants]
        ended = time.perf_counter()
        for own, others in zip(alone, at_once, strict=True):
            difference = max(difference, *(abs(a / b - 1) for a, b in zip(own, others, strict=True)))
        if number:
            seconds.append((between - started, ended - between))
    return [at_once_s / in_turn_s for in_turn_s, at_once_s in seconds], difference, seconds


def decode(swarm: Any, tenants: list[Tenant], args: argparse.Namespace) -> dict[str, list[float]]:
    """Times between tokens without and with training, in turn."""
    model = connect_here(swarm.model, swarm.address)
    tokens = chat_tokens(QUESTION)
    answer(model, tokens, 8)
    gaps: dict[str, list[float]] = {"alone": [], "beside training": []}
    for _ in range(args.answers):
        gaps["alone"] += answer(model, tokens, args.new_tokens).gaps
        for tenant in tenants:
            tenant.load()
        answer(model, tokens, 8)  # all are under way
        gaps["beside training"] += answer(model, tokens, args.new_tokens).gaps
        for tenant in tenants:
            tenant.unload()
    model.close()
    return gaps


def report(
    ratios: list[float], difference: float, seconds: list[tuple[float, float]], gaps: dict[str, list[float]],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Print all."""
    print(f"{args.tenants} tenants, {args.steps} steps of {args.rows} x {args.columns} tokens each")
    for in_turn_s, at_once_s in seconds:
        print(f"in turn {in_turn_s:6.2f} s   at once {at_once_s:6.2f} s   {at_once_s / in_turn_s:.3f}")
    print(f"losses differ by at most {difference:.1e}")
    table = {}
    for name, own in gaps.items():
        table[name] = {"median_ms": 1e3 * statistics.median(own), "p99_ms": 1e3 * percentile(own, 0.99)}
        print(f"{name:16} median {table[name]['median_ms']:6.1f} ms   p99 {table[name]['p99_ms']:6.1f} ms")
    targets = {
        "all at once, of one after another": judged(statistics.median(ratios), "<=", TARGETS["together"]),
        "decode p99, of without training": judged(
            table["beside training"]["p99_ms"] / table["alone"]["p99_ms"], "<=", TARGETS["decode"]
        ),
    }
    print_report("train_many", targets, tenants=args.tenants, gaps=table, difference=difference)


if __name__ == "__main__":
    main()
