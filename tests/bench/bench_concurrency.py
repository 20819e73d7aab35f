"""Aggregate decode rate of two servers by number of client sessions, and what a long prompt does to those who decode.

    python tests/bench/bench_concurrency.py [--new-tokens 32] [--sessions 1 2 4 8 16 32] [--rounds 3] [--arrivals 3]

Two servers of 15 blocks each, fp32, one thread each; each session is a thread that generates greedily from a prompt of
its own, all in one client process with one thread. Each answer is compared with the one that its prompt got alone. The
floor is transformers' own generate with a batch of 16, one thread. No answer ends before its length, here and there.
Everything is measured once a round, and ratios are those of one round, so that a machine whose speed changes from
minute to minute does not decide them; medians over the rounds are reported.

Then a prompt of 2,048 tokens arrives while 8 sessions decode: the 99th percentile of their time between tokens, from
its arrival to its first token, against that before it came. Every arrival has a prompt that no server has seen.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from bench_decode import MODEL, Clock, start_swarm
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped

SPANS = ("0:15", "15:30")
KV_TOKENS = 8192
TOPICS = ("rain", "bread", "ships", "moons", "chess", "bees", "glass", "salt")
TEXT = (
    "The harbour of the old town was built where the river widens before it meets the sea. For three hundred years "
    "ships brought timber, salt and grain, and took cloth and iron away. Merchants kept their books in narrow houses "
    "along the quay, and the tide, which rises by four metres here, decided when a captain could leave. A clock in the "
    "church tower told the hours of high water as well as those of the day. When the railway came, the trade moved "
    "to a deeper port, and the warehouses stood empty until painters found the light in them. "
)
TARGETS = {
    "16_over_1": (">=", 5.0),
    "16_over_local_batch_16": (">=", 0.75),
    "16_p99_over_single_median": ("<=", 5.0),
    "p99_with_arrival_over_without": ("<=", 2.0),
    "identical": ("==", 1.0),
}


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    checkpoint = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    prompts = [prompt(tokenizer, index) for index in range(max(*args.sessions, args.decoding))]
    local = endless(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32))
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        model = endless(start_swarm(SPANS, "none", processes, kv_tokens=KV_TOKENS))
        alone = {tuple(tokens): answer(model, tokens, args.new_tokens)[0] for tokens in prompts}
        rounds = []
        for _ in range(args.rounds):
            local_rate = batch_rate(local, prompts[:16], args.new_tokens)
            runs = [measure(model, prompts[:count], args.new_tokens, alone) for count in args.sessions]
            rounds.append(compared(runs, local_rate))
        rows = [combined(runs) for runs in zip(*rounds, strict=True)]
        del local
        arrivals = [
            arrival(model, prompts[: args.decoding], long_prompt(tokenizer, index, args.prompt_tokens), args, alone)
            for index in range(args.arrivals)
        ]
        model.close()
    report(rows, arrivals, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer (default: 32)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of sessions")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each number of sessions (default: 3)")
    parser.add_argument("--arrivals", type=int, default=3, help="runs with a long prompt; 0 for none (default: 3)")
    parser.add_argument("--decoding", type=int, default=8, help="sessions that decode meanwhile (default: 8)")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="length of the long prompt (default: 2048)")
    return parser.parse_args()


def endless(model: Any) -> Any:
    """Let no answer end by itself, without a processor per token that would forbid it."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(tokenizer: Any, index: int) -> list[int]:
    """A chat question of its own for each session."""
    question = f"Tell me {index + 2} facts about {TOPICS[index % len(TOPICS)]}."
    chat = [{"role": "user", "content": question}]
    tokens: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokens


def long_prompt(tokenizer: Any, index: int, num_tokens: int) -> list[int]:
    """A text of so many tokens, another one from its first word on for each index."""
    copies = 1 + num_tokens // 80
    tokens: list[int] = tokenizer(f"Chapter {index + 1}, in {index + 3} parts. " + TEXT * copies)["input_ids"]
    return tokens[:num_tokens]


def answer(model: Any, tokens: list[int], new_tokens: int, **options: Any) -> tuple[list[int], list[float]]:
    """The greedy answer and when each of its tokens came."""
    clock = options.setdefault("streamer", Clock())
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
    return output[0].tolist(), clock.times[1:]


def measure(model: Any, prompts: list[list[int]], new_tokens: int, alone: dict) -> dict:
    """All prompts at once: aggregate rate while all of them decode, gaps between tokens, and whether all were right."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(lambda tokens: answer(model, tokens, new_tokens), prompts))
    start = max(times[0] for _, times in results)
    end = min(times[-1] for _, times in results)
    gaps = [b - a for _, times in results for a, b in pairwise(times)]
    return {
        "sessions": len(prompts),
        "tokens_per_s": sum(start < moment <= end for _, times in results for moment in times) / (end - start),
        "median_gap_ms": statistics.median(gaps) * 1000,
        "p99_gap_ms": p99(gaps) * 1000,
        "answers": len(prompts),
        "identical": sum(out == alone[tuple(tokens)] for (out, _), tokens in zip(results, prompts, strict=True)),
    }


def compared(runs: list[dict], local_rate: float) -> list[dict]:
    """The runs of one round with their ratios to its first run and to the local batch."""
    for run in runs:
        run["local_batch_16_tokens_per_s"] = local_rate
        run["over_one"] = run["tokens_per_s"] / runs[0]["tokens_per_s"]
        run["over_local_batch_16"] = run["tokens_per_s"] / local_rate
        run["p99_over_single_median"] = run["p99_gap_ms"] / runs[0]["median_gap_ms"]
    return runs


def combined(runs: Sequence[dict]) -> dict:
    """The runs of all rounds with one number of sessions: medians, and sums of what is counted."""
    counted = {name: sum(run[name] for run in runs) for name in ("answers", "identical")}
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    return {**medians, **counted, "sessions": runs[0]["sessions"]}


class Until(StoppingCriteria):
    """Ends an answer when an event is set."""

    def __init__(self, over: threading.Event):
        self._over = over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._over.is_set())


class Countdown(Clock):
    """Notes when tokens came, and sets an event when so many have."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.reached = count, threading.Event()

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) > self.count:
            self.reached.set()


def arrival(model: Any, prompts: list[list[int]], prompt: list[int], args: argparse.Namespace, alone: dict) -> dict:
    """Gaps of sessions that decode, before a long prompt comes and until its first token."""
    over = threading.Event()
    clocks = [Countdown(args.new_tokens + 1) for _ in prompts]
    longest = KV_TOKENS // (2 * len(prompts)) - max(map(len, prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        sessions: list[Future[Any]] = [
            pool.submit(answer, model, tokens, longest, streamer=clock, stopping_criteria=[Until(over)])
            for tokens, clock in zip(prompts, clocks, strict=True)
        ]
        try:
            for clock in clocks:
                clock.reached.wait()
            came = time.perf_counter()
            _, [done] = answer(model, prompt, 1)
        finally:
            over.set()
        results = [session.result() for session in sessions]
    start = max(times[0] for _, times in results)
    before = [b - a for _, times in results for a, b in pairwise(times) if start <= a and b <= came]
    during = [b - a for _, times in results for a, b in pairwise(times) if b > came and a < done]
    outputs = [
        (out[: len(tokens) + args.new_tokens], tokens) for (out, _), tokens in zip(results, prompts, strict=True)
    ]
    return {
        "prompt_tokens": len(prompt),
        "first_token_s": round(done - came, 2),
        "p99_without_ms": milliseconds(p99(before)),
        "p99_with_ms": milliseconds(p99(during)),
        "p99_ratio": round(p99(during) / p99(before), 2),
        "median_without_ms": milliseconds(statistics.median(before)),
        "median_with_ms": milliseconds(statistics.median(during)),
        "gaps_with": len(during),
        "answers": len(outputs),
        "identical": sum(out == alone[tuple(tokens)] for out, tokens in outputs),
    }


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def batch_rate(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Decode tokens/s of one padded batch in plain transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    times = []
    for count in (1, new_tokens + 1):
        started = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        times.append(time.perf_counter() - started)
    return new_tokens * len(prompts) / (times[1] - times[0])


def report(rows: list[dict], arrivals: list[dict], args: argparse.Namespace) -> None:
    """Tables and JSON."""
    local_rate = rows[0]["local_batch_16_tokens_per_s"]
    print(f"transformers, batch of 16, one process: {local_rate:.1f} tokens/s")
    print(
        f"{'sessions':>8} {'tokens/s':>9} {'x one':>7} {'x local 16':>11}"
        f" {'median ms':>10} {'p99 ms':>8} {'x median of one':>16} {'identical':>11}"
    )
    for row in rows:
        print(
            f"{row['sessions']:8} {row['tokens_per_s']:9.1f} {row['over_one']:7} {row['over_local_batch_16']:11}"
            f" {row['median_gap_ms']:10.1f} {row['p99_gap_ms']:8.1f} {row['p99_over_single_median']:16}"
            f" {row['identical']:7}/{row['answers']}"
        )
    for row in arrivals:
        print(
            f"{args.decoding} decode, {row['prompt_tokens']} tokens arrive: first token after {row['first_token_s']} s,"
            f" p99 {row['p99_without_ms']} -> {row['p99_with_ms']} ms ({row['p99_ratio']} x),"
            f" median {row['median_without_ms']} -> {row['median_with_ms']} ms,"
            f" identical {row['identical']}/{row['answers']}"
        )
    results = judged(rows, arrivals)
    for name, result in results.items():
        print(f"{name}: {result['value']} (target {result['target']}), {'met' if result['met'] else 'NOT met'}")
    print(
        json.dumps(
            {
                "bench": "concurrency",
                "model": MODEL,
                "new_tokens": args.new_tokens,
                "rounds": args.rounds,
                "rows": rows,
                "arrivals": arrivals,
                "targets": results,
            }
        )
    )


def judged(rows: list[dict], arrivals: list[dict]) -> dict[str, dict]:
    """Each target with what was measured for it; targets that nothing was measured for are left out."""
    found: dict[str, float] = {}
    by_sessions = {row["sessions"]: row for row in rows}
    if 16 in by_sessions:
        found["16_over_local_batch_16"] = by_sessions[16]["over_local_batch_16"]
        if rows[0]["sessions"] == 1:
            found["16_over_1"] = by_sessions[16]["over_one"]
            found["16_p99_over_single_median"] = by_sessions[16]["p99_over_single_median"]
    if arrivals:
        found["p99_with_arrival_over_without"] = statistics.median(row["p99_ratio"] for row in arrivals)
    runs = rows + arrivals
    found["identical"] = sum(row["identical"] for row in runs) / sum(row["answers"] for row in runs)
    holds = {">=": float.__ge__, "<=": float.__le__, "==": float.__eq__}
    return {
        name: {"value": found[name], "target": f"{sign} {bound}", "met": holds[sign](float(found[name]), bound)}
        for name, (sign, bound) in TARGETS.items()
        if name in found
    }


if __name__ == "__main__":
    main()
