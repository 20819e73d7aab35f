"""Adapters on the linears of the embedded model's 30 blocks: time of base + LoRA over that of the base linears alone.

    python tests/bench/bench_lora_kernels.py [--rounds 9] [--rows 32]

One thread, fp32, the shapes of SmolLM2-135M (hidden 576, key/value 192, intermediate 1536; q, k, v, o, gate, up, down;
fused qkv and gate_up as a server has them, in oneDNN's layout), random weights, and so many of them that no cache holds
a step's. A batch is decode rows, adapters spread evenly. Cases are interleaved round by round, so that a drift of the
machine's speed hits all alike; figures are medians over rounds of the ratio to the same round's base, and the ratio of
the least times, which a busy machine troubles less. Attention, norms and sampling are not in it: a whole step's ratio
is smaller.

    mine      add_lora, the batch object kept from step to step, as while sessions just decode
    new       the same with a batch object per step
    by group  a loop over the adapters of the batch with two products each, as PEFT's `adapter_names` does
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, add_lora
from swarm.server.packing import PackedLinear

LAYERS, HIDDEN, KEY_VALUE, INTERMEDIATE = 30, 576, 192, 1536
LINEARS = {
    "qkv": (HIDDEN, (HIDDEN, KEY_VALUE, KEY_VALUE)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
CASES = {
    "1 x rank 16": [16],
    "4 x rank 16": [16] * 4,
    "8 x rank 16": [16] * 8,
    "32 x rank 16": [16] * 32,
    "4 of ranks 8/16/32/64": [8, 16, 32, 64],
    "32 of ranks 8/16/32/64": [8, 16, 32, 64] * 8,
}

WAYS = ("mine", "new", "by group")

Model = list[list[tuple[PackedLinear, list[LoraTarget]]]]


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds; one more is run first and not counted")
    parser.add_argument("--rows", type=int, default=32, help="decode rows of the batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs: dict[str, Callable[[], None]] = {}
    base = [[PackedLinear(torch.randn(sum(outs), i), None) for i, outs in LINEARS.values()] for _ in range(LAYERS)]
    inputs = {width: torch.randn(args.rows, width) for width in (HIDDEN, INTERMEDIATE)}
    bare = with_adapters(base, [])
    runs["base"] = lambda: run(bare, inputs, None)
    for name, ranks in CASES.items():
        model = with_adapters(base, ranks)
        adapters = [row * len(ranks) // args.rows for row in range(args.rows)]
        kept = LoraBatch(adapters)
        runs[f"{name}, mine"] = lambda model=model, kept=kept: run(model, inputs, kept)
        runs[f"{name}, new"] = lambda model=model, adapters=adapters: run(model, inputs, LoraBatch(adapters))
        runs[f"{name}, by group"] = lambda model=model, kept=kept: run(model, inputs, kept, by_group)
    with torch.inference_mode():
        seconds = measure(runs, args.rounds)
    report(seconds, args.rows)


def report(seconds: dict[str, list[float]], rows: int) -> None:
    base = seconds["base"]
    medians = {name: statistics.median(s / b for s, b in zip(of, base, strict=True)) for name, of in seconds.items()}
    least = {name: min(of) / min(base) for name, of in seconds.items()}
    milliseconds = f"median {statistics.median(base) * 1e3:.1f} ms, least {min(base) * 1e3:.1f} ms"
    print(f"base linears of a step of {rows} rows: {milliseconds}\n")
    print(f"{'(base + LoRA) / base: median (least)':<36}" + "".join(f"{way:>16}" for way in WAYS))
    for name in CASES:
        cells = [f"{medians[f'{name}, {way}']:.2f} ({least[f'{name}, {way}']:.2f})" for way in WAYS]
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    figures = {name: [round(medians[name], 3), round(least[name], 3)] for name in seconds}
    print(json.dumps({"bench": "lora_kernels", "rows": rows, "base_ms": min(base) * 1e3, "ratios": figures}))


def with_adapters(base: list[list[PackedLinear]], ranks: Sequence[int]) -> Model:
    """The base linears with adapters of these ranks in pools of their layer, one pool per part of a linear."""
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    spans = [range(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
    table = {index: AdapterRanks(a_rows=rows, b_rows=rows, scale=0.5) for index, rows in enumerate(spans)}
    model: Model = []
    for layer in base:
        parts = []
        for linear, (i, outs) in zip(layer, LINEARS.values(), strict=True):
            columns = [sum(outs[:index]) for index in range(len(outs))]
            parts.append((linear, [target(sum(ranks), i, o, table, c) for o, c in zip(outs, columns, strict=True)]))
        model.append(parts)
    return model


def target(num_ranks: int, i: int, o: int, table: dict[int, AdapterRanks], column: int) -> LoraTarget:
    return LoraTarget(
        a_pool_RI=torch.randn(num_ranks, i), b_pool_RO=torch.randn(num_ranks, o), ranks=table, column=column
    )


def by_group(y: Tensor, x: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> Tensor:
    """Each adapter's rows gathered, multiplied, scattered back."""
    for adapter, rows in batch.rows_of.items():
        index = torch.tensor(rows)
        for it in targets:
            mine = it.ranks[adapter]
            a, b = (it.pool(side)[mine.rows(side)[0] : mine.rows(side)[-1] + 1] for side in ("a", "b"))
            it.of(y, "b").index_add_(0, index, (x[index] @ a.t()) @ b * mine.scale)
    return y


def run(
    model: Model, inputs: dict[int, Tensor], batch: LoraBatch | None, add: Callable[..., Tensor] = add_lora
) -> None:
    """One step through all linears."""
    for layer in model:
        for linear, targets in layer:
            x = inputs[linear.in_features]
            y = linear(x)
            if batch is not None:
                add(y, x, targets, batch)


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
