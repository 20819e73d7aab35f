"""Which adapters should run together, and does merging one pay: step times measured, then traces simulated on them.

    python tests/bench/bench_adapter_policy.py [--rounds 6] [--seconds 120] [--steps steps.json]

Measured: whole steps of the embedded model, 30 blocks, one thread, fp32: decode rows, distinct adapters, ranks, prompts
(`adapter_steps`); building a merged copy of all linears. Simulated on these: the published traces (`adapter_traces`) at
a rate above what the server can do, under several policies (`adapter_simulation`). With --steps, times come from a file
that an earlier run wrote, or go there.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter_simulation import (
    AlwaysMerged,
    Everybody,
    Limited,
    OneAtATime,
    Policy,
    StepTimes,
    Switching,
    SwitchingFirst,
    simulate,
)
from adapter_steps import Kind, Machine
from adapter_traces import Request, dlora, punica, slora

from swarm.server.packing import PackedLinear

RANKS = [16] * 32 + [64] * 8
ROWS = (1, 4, 8, 16, 32)
RATE = 12.0
"""Requests per second that arrive: more than can be served."""


def main() -> None:
    """Measure, simulate, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of measurements (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, per trace (default: %(default)s)")
    parser.add_argument("--steps", type=Path, help="file with step times")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.steps is not None and args.steps.exists():
        measured = json.loads(args.steps.read_text())
    else:
        measured = measure(args.rounds)
        if args.steps is not None:
            args.steps.write_text(json.dumps(measured))
    times = fit(measured)
    print_steps(measured, times)
    results = run_traces(times, measured["rows_per_rank"], args.seconds)
    figures = {"times": asdict(times), "copy_mb": measured["copy_mb"], "traces": results}
    print(json.dumps({"bench": "adapter_policy", **figures}))


# -- measured ---------------------------------------------------------------------------------------------------


def kinds() -> list[Kind]:
    """Batches that are measured: decode rows by number of distinct adapters, of rank 64 too, and prompts."""
    found = []
    for rows in ROWS:
        found.append(Kind((-1,) * rows))
        counts = sorted({it for it in (1, 2, 4, 8, 16, rows) if it <= rows})
        found += [Kind(tuple(row % count for row in range(rows))) for count in counts]
        if rows > 1:
            found.append(Kind((*(0,) * (rows - 1), -1)))
            found.append(Kind((*(0,) * (rows - 1), 32)))
        if rows >= 8:
            found.append(Kind(tuple(32 + row % 8 for row in range(rows))))
    for tokens in (16, 64, 256):
        found += [Kind((), ((-1, tokens),)), Kind((), ((0, tokens),))]
        found += [Kind((-1,) * 8, ((-1, tokens),)), Kind(tuple(range(8)), ((8, tokens),))]
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Step times, and what a merged copy costs."""
    machine, wanted = Machine(RANKS), kinds()
    seconds = machine.measure(wanted, rounds)
    builds = [build_copy(machine) for _ in range(3)]
    steps = [
        {"decode": kind.decode, "prompts": kind.prompts, "s": min(of), "median_s": statistics.median(of)}
        for kind, of in zip(wanted, seconds, strict=True)
    ]
    return {
        "steps": json.loads(json.dumps(steps)),
        "build_s": min(builds),
        "copy_mb": round(sum(it.num_bytes for it in machine.linears()) / 1e6),
        "rows_per_rank": machine.num_linears,
    }


@torch.inference_mode()
def build_copy(machine: Machine) -> float:
    """Seconds that W + s * B A of all linears takes, in the layout in which they run."""
    started = time.perf_counter()
    for linear in machine.linears():
        a, b = torch.randn(16, linear.in_features), torch.randn(linear.out_features, 16)
        PackedLinear(linear.dequantize().addmm(b, a, alpha=0.5), None)
    return time.perf_counter() - started


def fit(measured: dict[str, Any]) -> StepTimes:
    """Times of batches in general."""
    base, prompts, alone, mixed = {}, [], [], []
    for step in measured["steps"]:
        if set(step["decode"]) == {-1} and not step["prompts"]:
            base[len(step["decode"])] = step["s"]
    rows = tuple(sorted(base))
    fixed = base[rows[0]]
    for step in measured["steps"]:
        decode, num_prompt = step["decode"], sum(count for _, count in step["prompts"])
        adapters = {*decode, *(adapter for adapter, _ in step["prompts"])}
        if not decode and adapters == {-1}:
            prompts.append((num_prompt, step["s"] - fixed))
        if num_prompt or adapters == {-1}:
            continue
        extra = step["s"] - base[len(decode)]
        ranks = sum(RANKS[adapter] for adapter in adapters - {-1}) / 16
        if len(adapters) > 1:
            mixed.append((1.0, len(decode), ranks, extra))
        elif RANKS[decode[0]] == 16:
            alone.append((1.0, len(decode), extra))
    per_token = statistics.median(seconds / tokens for tokens, seconds in prompts)
    return StepTimes(
        rows=rows,
        base=tuple(base[it] for it in rows),
        per_prompt_token=per_token,
        alone=_least_squares(alone),  # type: ignore[arg-type]
        mixed=_least_squares(mixed),  # type: ignore[arg-type]
        build_s=measured["build_s"],
    )


def _least_squares(lines: list[tuple[float, ...]]) -> tuple[float, ...]:
    table = np.array(lines)
    found, *_ = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)
    return tuple(float(max(0.0, it)) for it in found)


def print_steps(measured: dict[str, Any], times: StepTimes) -> None:
    print(f"{'rows':>5} {'prompt':>7} {'adapters':>9} {'ms':>8} {'x none':>7}")
    base: dict[tuple[int, int], float] = {}
    for step in measured["steps"]:
        rows, prompt = len(step["decode"]), sum(count for _, count in step["prompts"])
        adapters = {*step["decode"], *(adapter for adapter, _ in step["prompts"])} - {-1}
        of_64 = sum(RANKS[adapter] == 64 for adapter in adapters)
        base.setdefault((rows, prompt), step["s"] if not adapters else math.nan)
        words = f"{len(adapters)}" + (f" ({of_64} r64)" if of_64 else "")
        words += " + none" if -1 in step["decode"] and adapters else ""
        print(f"{rows:>5} {prompt:>7} {words:>9} {1e3 * step['s']:>8.1f} {step['s'] / base[rows, prompt]:>7.2f}")
    print(f"\nmerged copy: {times.build_s:.2f} s to build, {measured['copy_mb']} MB")
    for rows, base_s in zip(times.rows, times.base, strict=True):
        saved = times.seconds(rows, 0, [16], True) - base_s
        print(f"  {rows:>2} rows of one adapter: saves {1e3 * saved:.1f} ms of {1e3 * (base_s + saved):.1f} "
              f"({saved / (base_s + saved):.1%}); paid back after {times.build_s / saved:.0f} steps")  # fmt: skip


# -- simulated --------------------------------------------------------------------------------------------------


def traces(duration: float) -> dict[str, tuple[list[Request], list[int]]]:
    """Requests, and the rank of each adapter."""
    at: dict[str, float] = {"rate": RATE, "duration": duration}
    found = {
        f"S-LoRA n={n} alpha={alpha:g} cv={cv:g}": (slora(n, alpha, cv, **at), [16] * n)
        for n, alpha, cv in ((1, 1, 1), (2, 1, 1), (2, 0.1, 1), (5, 0.1, 1), (5, 1, 1), (32, 1, 1), (100, 1, 1))
    }
    mixed = [(64, 32, 16, 8)[index % 4] for index in range(100)]
    found["S-LoRA n=100 alpha=0.3, ranks 8-64"] = slora(100, 0.3, 1, **at), mixed
    found["S-LoRA n=100 alpha=0.1, ranks 64, hot 8"] = slora(100, 0.1, 1, **at), [8] + [64] * 99
    found["S-LoRA n=32 alpha=0.1, ranks 128, hot 8"] = slora(32, 0.1, 1, **at), [8] + [128] * 31
    found |= {f"dLoRA n={n}": (dlora(n, **at), [16] * n) for n in (2, 8, 32)}
    found |= {f"Punica {kind} n=32": (punica(kind, 32, **at), [16] * 32) for kind in ("distinct", "uniform", "skewed")}
    return found


def run_traces(times: StepTimes, rows_per_rank: int, duration: float) -> dict[str, dict[str, dict[str, Any]]]:
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (trace, ranks) in traces(duration).items():
        policies: list[Policy] = [
            Everybody(),
            Limited(ranks, rows_per_rank),
            OneAtATime(times.build_s),
            AlwaysMerged(times.build_s),
            Switching(times.build_s),
            SwitchingFirst(times.build_s),
        ]
        results[name] = {it.name: simulate(trace, times, it, ranks, rows_per_rank, duration) for it in policies}
        print_trace(name, results[name])
    return results


def print_trace(name: str, results: dict[str, dict[str, Any]]) -> None:
    first = results["unmerged"]["tokens_per_s"]
    print(f"\n{name}\n  {'':<24} tokens/s  x unmerged  ttft p50  p99 s  gap p50  p99 ms  adapters  merged  building s")
    for policy, it in results.items():
        print(f"  {policy:<24} {it['tokens_per_s']:>8} {it['tokens_per_s'] / first:>11.3f} {it['ttft_p50_s']:>9.2f} "
              f"{it['ttft_p99_s']:>6.2f} {it['gap_p50_ms']:>8.0f} {it['gap_p99_ms']:>7.0f} "
              f"{it['adapters_per_step']:>9} {it['merged_steps']:>7.1%} {it['build_s']:>11}")  # fmt: skip


if __name__ == "__main__":
    main()
