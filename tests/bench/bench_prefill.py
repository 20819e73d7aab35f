"""A long prompt through three servers: in chunks that overlap, hop after hop, and in plain transformers.

    python tests/bench/bench_prefill.py [--prompt-tokens 2048] [--rounds 3] [--token-ms 0.5]

pipelined   as servers do it: chunks of the prompt, so that all hops work at the same time
sequential  servers that take the prompt whole (see altered_server.py): a hop begins when the one before is done
local       transformers in this process, with one thread, and with as many as the servers can use at a time

Three servers with one thread each need three cores to show what they can; with fewer the real run shows less. So the
same is also run with the delay model: blocks that sleep a fixed time per token in place of computing. Which of the two
a target is judged by is said in the output. Every round has a prompt that no server has seen. Time is that to the first
token, with the embedded model in fp32.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from bench_concurrency import long_prompt
from common import judged, print_report
from swarms import MODEL, Clock, Loopback, answer, connect, endless, start_swarm
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped

SPANS = ("0:10", "10:20", "20:30")
TARGETS = {"pipelined_over_sequential": 1.6, "over_local": 0.85}
Measured = tuple[float, int]
"""Seconds to the first token, and the token."""


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL).path)
    prompts = [long_prompt(tokenizer, index, args.prompt_tokens) for index in range(args.rounds + 1)]
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, len(SPANS))
    with ExitStack() as stack:
        real = {name: swarm_way(stack, args, name) for name in ("pipelined", "sequential")}
        local = local_ways(sorted({1, threads}))
        compute = run_rounds(real | local, prompts)
    with ExitStack() as stack:
        model = {name: swarm_way(stack, args, name, token_s=args.token_ms / 1000) for name in real}
        delay = run_rounds(model, prompts)
    report(compute, delay, cores, threads, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="length of the prompt (default: 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; one more is not counted (default: 3)")
    parser.add_argument("--token-ms", type=float, default=0.5, help="delay model: ms per token and hop (default: 0.5)")
    return parser.parse_args()


def swarm_way(
    stack: ExitStack, args: argparse.Namespace, name: str, *, token_s: float = 0.0
) -> Callable[[list[int]], Measured]:
    """A swarm of its own, and how to ask it."""
    env, config = {"SWARM_BENCH_TOKEN_S": str(token_s)}, {}
    if name == "sequential":
        env["SWARM_BENCH_WHOLE_TOKENS"] = str(args.prompt_tokens)
        config["chunk_tokens"] = args.prompt_tokens
    processes: list[PeerProcess] = []
    stack.enter_context(all_stopped(processes))
    options = ("--quantization", "none", "--threads", "1", "--kv-cache", str(2 * args.prompt_tokens))
    swarm = start_swarm(Loopback(), SPANS, processes, *options, module="altered_server", env=env)
    model = stack.enter_context(connect(Loopback(), swarm, **config))

    def ask(prompt: list[int]) -> Measured:
        one = answer(model, prompt, 1)
        return one.first_token_s, one.tokens[-1]

    return ask


def local_ways(threads: list[int]) -> dict[str, Callable[[list[int]], Measured]]:
    """Plain transformers, with so many threads."""
    model = endless(AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32))

    def ask(prompt: list[int], num_threads: int) -> Measured:
        clock, ids = Clock(), torch.tensor([prompt])
        torch.set_num_threads(num_threads)
        started = time.perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, streamer=clock
        )
        torch.set_num_threads(1)
        return clock.times[0] - started, int(output[0, -1])

    return {f"local, threads: {count}": lambda prompt, count=count: ask(prompt, count) for count in threads}


def run_rounds(ways: dict[str, Callable[[list[int]], Measured]], prompts: list[list[int]]) -> dict[str, list[Measured]]:
    """All ways in turn, with one prompt after the other; the first is for warming up."""
    measured: dict[str, list[Measured]] = {name: [] for name in ways}
    for index, prompt in enumerate(prompts):
        for name, ask in ways.items():
            one = ask(prompt)
            if index:
                measured[name].append(one)
    return measured


def report(
    compute: dict[str, list[Measured]],
    delay: dict[str, list[Measured]],
    cores: int,
    threads: int,
    args: argparse.Namespace,
) -> None:
    """Table and JSON."""
    rows = [make_row(name, "real", part, args) for name, part in compute.items()]
    rows += [make_row(name, "delay model", part, args) for name, part in delay.items()]
    print(f"{'':20}{'blocks':13}{'first token s':>14}{'tokens/s':>10}")
    for row in rows:
        print(f"{row['name']:20}{row['blocks']:13}{row['first_token_s']:14}{row['tokens_per_s']:10}")
    real, modelled = (ratio(part["sequential"], part["pipelined"]) for part in (compute, delay))
    judged_by = "real" if cores >= len(SPANS) else "delay model"
    print(
        f"pipelined over sequential: {real:.2f} real on {cores} cores, {modelled:.2f} in the delay model, which", end=""
    )
    print(" is for information" if judged_by == "real" else " is judged: three servers need three cores")
    speedup = real if judged_by == "real" else modelled
    one, same = (ratio(compute[f"local, threads: {count}"], compute["pipelined"]) for count in (1, threads))
    targets = {
        "pipelined_over_sequential": judged(speedup, ">=", TARGETS["pipelined_over_sequential"]),
        "over_local_one_thread": judged(one, ">=", TARGETS["over_local"]),
        "over_local_threads_of_all_servers": judged(same, ">=", TARGETS["over_local"]),
    }
    ratios = {"real": round(real, 3), "delay_model": round(modelled, 3), "judged_by": judged_by}
    same_token = len({tuple(token for _, token in part) for part in compute.values()}) == 1
    print_report("prefill", targets, cores=cores, threads=threads, speedup=ratios, same_token=same_token, rows=rows)


def make_row(name: str, blocks: str, measured: list[Measured], args: argparse.Namespace) -> dict[str, Any]:
    """What is reported of one way."""
    seconds = statistics.median(seconds for seconds, _ in measured)
    return {
        "name": name,
        "blocks": blocks,
        "first_token_s": round(seconds, 3),
        "tokens_per_s": round(args.prompt_tokens / seconds, 1),
    }


def ratio(slow: list[Measured], fast: list[Measured]) -> float:
    """Median over the rounds of how many times faster."""
    return statistics.median(a / b for (a, _), (b, _) in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
