"""Aggregate decode rate of two servers by number of client sessions, against transformers' own batched generate.

    python tests/bench/bench_concurrency.py [--new-tokens 32] [--sessions 1 2 4 8 16 32]

Two servers of 15 blocks each, fp32, one thread each; each session is a thread that generates greedily from a prompt of
its own, all in one client process with one thread. Each answer is compared with the one that its prompt got alone.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from bench_decode import MODEL, Clock, start_swarm
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped

SPANS = ("0:15", "15:30")
TOPICS = ("rain", "bread", "ships", "moons", "chess", "bees", "glass", "salt")
TARGETS = {"16_over_1": 5.0, "16_over_local_batch_16": 0.75, "p99_over_single_median": 5.0}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of sessions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    prompts = [prompt(tokenizer, index) for index in range(max(args.sessions))]
    local = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    local_rate = batch_rate(local, prompts[:16], args.new_tokens)
    del local
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        model = start_swarm(SPANS, "none", processes)
        alone = {}
        for tokens in prompts:
            alone[tuple(tokens)], _ = answer(model, tokens, args.new_tokens)
        rows = [measure(model, prompts[:count], args.new_tokens, alone) for count in args.sessions]
        model.close()
    report(rows, local_rate, args)


def prompt(tokenizer: Any, index: int) -> list[int]:
    """A chat question of its own for each session."""
    question = f"Tell me {index + 2} facts about {TOPICS[index % len(TOPICS)]}."
    chat = [{"role": "user", "content": question}]
    tokens: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokens


def answer(model: Any, tokens: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy answer and when each of its tokens came."""
    clock = Clock()
    ids = torch.tensor([tokens])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
    )
    return output[0].tolist(), clock.times[1:]


def measure(model: Any, prompts: list[list[int]], new_tokens: int, alone: dict) -> dict:
    """All prompts at once: aggregate rate while all of them decode, gaps between tokens, and whether all were right."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(lambda tokens: answer(model, tokens, new_tokens), prompts))
    start = max(times[0] for _, times in results)
    end = min(times[-1] for _, times in results)
    decoded = sum(start < moment <= end for _, times in results for moment in times)
    gaps = sorted(b - a for _, times in results for a, b in pairwise(times))
    return {
        "sessions": len(prompts),
        "tokens_per_s": round(decoded / (end - start), 1),
        "median_gap_ms": round(statistics.median(gaps) * 1000, 1),
        "p99_gap_ms": round(gaps[int(0.99 * (len(gaps) - 1))] * 1000, 1),
        "identical": sum(out == alone[tuple(tokens)] for (out, _), tokens in zip(results, prompts, strict=True)),
    }


def batch_rate(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Decode tokens/s of one padded batch in plain transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    rates = []
    for _ in range(3):
        times = []
        for count in (1, new_tokens + 1):
            started = time.perf_counter()
            model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            times.append(time.perf_counter() - started)
        rates.append(new_tokens * len(prompts) / (times[1] - times[0]))
    return statistics.median(rates)


def report(rows: list[dict], local_rate: float, args: argparse.Namespace) -> None:
    """Table and JSON."""
    single = rows[0]
    print(f"transformers, batch of 16, one process: {local_rate:.1f} tokens/s")
    print(
        f"{'sessions':>8} {'tokens/s':>9} {'x one':>7} {'x local 16':>11}"
        f" {'median ms':>10} {'p99 ms':>8} {'identical':>10}"
    )
    for row in rows:
        row["over_one"] = round(row["tokens_per_s"] / single["tokens_per_s"], 2)
        row["over_local_batch_16"] = round(row["tokens_per_s"] / local_rate, 2)
        print(
            f"{row['sessions']:8} {row['tokens_per_s']:9} {row['over_one']:7} {row['over_local_batch_16']:11}"
            f" {row['median_gap_ms']:10} {row['p99_gap_ms']:8} {row['identical']:7}/{row['sessions']}"
        )
    print(
        json.dumps(
            {
                "bench": "concurrency",
                "model": MODEL,
                "new_tokens": args.new_tokens,
                "local_batch_16_tokens_per_s": round(local_rate, 1),
                "rows": rows,
                "targets": TARGETS,
            }
        )
    )


if __name__ == "__main__":
    main()
