"""Adapters on a device: right in every case, each linear's kernels against peers, a block's linears, and merging.

    cases --> kernels (G1) --> block (G2) --> modes (G3)          rows of tables, as tests/bench/gpu/check.py wants them

Peers are torch's: the adapters of the batch in a loop (as PEFT's `adapter_names` does; for one adapter, two plain
products), and weights gathered per row and multiplied in one batched product. The bound is reading x, y, and the ranks
of each adapter in the batch once, at the speed of a large copy.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swarm.kernels import triton_lora
from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, add_lora
from swarm.kernels.lora_self_test import self_test
from tests.bench.gpu.timing import Bench


class Linear(NamedTuple):
    """A base linear by its parts."""

    name: str
    width: int
    outs: tuple[int, ...]


LLAMA_8B = [Linear("qkv", 4096, (4096, 1024, 1024)), Linear("o", 4096, (4096,)),
            Linear("gate_up", 4096, (14336, 14336)), Linear("down", 14336, (4096,))]  # fmt: skip
TINY = [Linear("qkv", 64, (64, 32, 32)), Linear("down", 128, (64,))]


def cases(bench: Bench) -> list[dict[str, Any]]:
    """The self-test of a server's start (G0)."""
    started = time.perf_counter()
    failures = self_test(triton_lora, bench.device) if not bench.smoke else []
    rows: list[dict[str, Any]] = [{"failed": failure} for failure in failures]
    return rows or [{"self_test": "passed" if not bench.smoke else "smoke", "s": time.perf_counter() - started}]


def kernels(bench: Bench) -> list[dict[str, Any]]:
    """G1: one linear, by rank, rows, and how its rows are spread over adapters."""
    if bench.smoke:
        points = [(linear, 8, 4, spread) for linear in TINY for spread in ("identical", "distinct")]
    else:
        points = [(linear, rank, rows, spread) for rows in (32, 1, 64, 256) for rank in (16, 64, 8)
                  for spread in ("identical", "distinct", "uniform", "zipf") for linear in LLAMA_8B
                  if rows > 1 or spread == "identical"]  # fmt: skip
    rows = []
    for linear, rank, num_rows, spread in points:
        name = f"{linear.name} rank {rank} x {num_rows} {spread}"
        if not bench.time_is_up(f"lora kernels {name}"):
            rows.append(_kernel(bench, linear, rank, num_rows, spread))
    return rows


def _kernel(bench: Bench, linear: Linear, rank: int, num_rows: int, spread: str) -> dict[str, Any]:
    adapters = assign(spread, num_rows)
    distinct = max(adapters) + 1
    targets, batch = make_targets(bench, linear, [rank] * distinct), LoraBatch(adapters)
    x, y = make_rows(bench, linear, num_rows)
    us = {
        "us": bench.device_us(lambda: triton_lora.add(y, x, targets, batch)),
        "loop_us": bench.device_us(lambda: by_loop(y, x, targets, batch)),
        "bmm_us": bench.device_us(lambda: by_bmm(y, x, targets, adapters, rank)) if num_rows <= 64 else None,
    }
    size = x.element_size()
    total = sum(linear.outs)
    floor = (distinct * rank * (len(linear.outs) * linear.width + total) + num_rows * (linear.width + 2 * total)) * size
    best = min(time_us for name, time_us in us.items() if name != "us" and time_us is not None)
    return {"linear": linear.name, "rank": rank, "rows": num_rows, "adapters": distinct, "spread": spread, **us,
            "GB/s": floor / us["us"] / 1e3 if us["us"] else None, "floor_us": floor / bench.copy_gbs / 1e3,
            "over_peer": best / us["us"] if us["us"] else None}  # fmt: skip


def block(bench: Bench) -> list[dict[str, Any]]:
    """G2: all linears of a block in 16 bit, with and without adapters, launched one by one and as one graph."""
    linears = TINY if bench.smoke else LLAMA_8B
    rows = []
    for num_rows in (4,) if bench.smoke else (1, 8, 32, 64):
        base_us: dict[str, float] = {}
        for distinct in (0, 1, 8, 32):
            if distinct > num_rows or bench.time_is_up(f"lora block {num_rows} x {distinct}"):
                continue
            run = _block(bench, linears, num_rows, [16] * distinct)
            row: dict[str, Any] = {"rows": num_rows, "adapters": distinct, "rank": 16}
            for way, us in (("eager", bench.wall_us(run)), ("graph", _graph_us(bench, run))):
                base_us.setdefault(way, us)
                row |= {f"{way}_us": us, f"{way}_tax": us / base_us[way] - 1}
            rows.append(row)
    return rows


def modes(bench: Bench) -> list[dict[str, Any]]:
    """G3: what a policy chooses among: a step merged, unmerged with one adapter or several, and the switch itself."""
    linears, num_rows = (TINY, 4) if bench.smoke else (LLAMA_8B, 32)
    if bench.time_is_up("lora modes"):
        return []
    rows = []
    for name, ranks in (("merged", []), ("unmerged, 1", [16]), ("unmerged, 2", [16] * 2), ("unmerged, 5", [16] * 5)):
        us = _graph_us(bench, _block(bench, linears, num_rows, ranks[:num_rows]))
        rows.append({"mode": name, "rows": num_rows, "us": us, "rows/s": num_rows / us * 1e6})
    merges = []
    for linear in linears:
        weight = torch.zeros(sum(linear.outs), linear.width, dtype=_dtype(bench), device=bench.device)
        merges += [(it, it.of(weight.t(), "b")) for it in make_targets(bench, linear, [16])]

    def merge() -> None:
        for target, weight_IO in merges:
            weight_IO.addmm_(target.a_pool_RI.t(), target.b_pool_RO)

    return [*rows, {"mode": "merge (or unmerge)", "us": bench.device_us(merge)}]


def _block(bench: Bench, linears: Sequence[Linear], num_rows: int, ranks: Sequence[int]) -> Callable[[], None]:
    """All linears with adapters of these ranks, spread evenly over the rows."""
    add = triton_lora.add if bench.smoke else add_lora
    batch = LoraBatch([row * len(ranks) // num_rows if ranks else -1 for row in range(num_rows)])
    parts = []
    for linear in linears:
        weight = torch.randn(sum(linear.outs), linear.width, dtype=_dtype(bench), device=bench.device)
        parts.append(
            (weight, make_targets(bench, linear, ranks) if ranks else [], make_rows(bench, linear, num_rows)[0])
        )

    def run() -> None:
        for weight, targets, x in parts:
            y = torch.nn.functional.linear(x, weight)
            if targets:
                add(y, x, targets, batch)

    return run


def _graph_us(bench: Bench, run: Callable[[], None]) -> float:
    """Time on the device of a CUDA graph of `run`."""
    if bench.smoke:
        return bench.wall_us(run)
    with torch.no_grad():
        run()
        torch.cuda.synchronize(bench.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return bench.device_us(graph.replay)


def assign(spread: str, num_rows: int) -> list[int]:
    """An adapter for each row: Punica's spreads (section 7.1); zipf: each group 1.5 times the one before."""
    if spread == "identical":
        return [0] * num_rows
    if spread == "distinct":
        return list(range(num_rows))
    if spread == "uniform":
        groups = max(1, round(num_rows**0.5))
        return [row * groups // num_rows for row in range(num_rows)]
    adapters: list[int] = []
    size = 1.0
    while len(adapters) < num_rows:
        adapters += [adapters[-1] + 1 if adapters else 0] * round(size)
        size *= 1.5
    return adapters[:num_rows]


def make_targets(bench: Bench, linear: Linear, ranks: Sequence[int]) -> list[LoraTarget]:
    """Adapters of these ranks, one after the other in pools per part."""
    table, start = {}, 0
    for adapter, rank in enumerate(ranks):
        table[adapter] = AdapterRanks(a_rows=range(start, start + rank), b_rows=range(start, start + rank), scale=0.5)
        start += rank
    pools = [
        [
            torch.randn(start, width, dtype=_dtype(bench), device=bench.device) * width**-0.5
            for width in (linear.width, o)
        ]
        for o in linear.outs
    ]
    columns = [sum(linear.outs[:index]) for index in range(len(linear.outs))]
    return [
        LoraTarget(a_pool_RI=a, b_pool_RO=b, ranks=table, column=column)
        for (a, b), column in zip(pools, columns, strict=True)
    ]


def make_rows(bench: Bench, linear: Linear, num_rows: int) -> tuple[Tensor, Tensor]:
    x, y = (
        torch.randn(num_rows, width, device=bench.device).to(_dtype(bench))
        for width in (linear.width, sum(linear.outs))
    )
    return x, y


def by_loop(y: Tensor, x: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> None:
    """Each adapter's rows, which are a run here, in two products per part."""
    for adapter, rows in batch.rows_of.items():
        mine = slice(rows[0], rows[-1] + 1)
        for it in targets:
            ranks = it.ranks[adapter].a_rows
            a, b = (it.pool(side)[ranks[0] : ranks[-1] + 1] for side in ("a", "b"))
            it.of(y, "b")[mine].addmm_(x[mine] @ a.t(), b, alpha=it.ranks[adapter].scale)


def by_bmm(y: Tensor, x: Tensor, targets: Sequence[LoraTarget], adapters: Sequence[int], rank: int) -> None:
    """Weights gathered for each row."""
    index = torch.tensor(adapters, device=x.device)
    for it in targets:
        a, b = (it.pool(side).view(-1, rank, it.width(side))[index] for side in ("a", "b"))
        h = torch.bmm(a, x.unsqueeze(2)).transpose(1, 2)
        it.of(y, "b").add_(torch.bmm(h, b).squeeze(1), alpha=0.5)


def _dtype(bench: Bench) -> torch.dtype:
    return torch.float32 if bench.smoke else torch.bfloat16


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "lora cases": cases,
    "lora kernels": kernels,
    "lora block": block,
    "lora modes": modes,
}


def main(smoke: bool, seconds: float = 300) -> dict[str, list[dict[str, Any]]]:
    """All tables by name. A smoke run needs TRITON_INTERPRET=1 from before triton's import."""
    bench = Bench(smoke=smoke, until=time.monotonic() + seconds)
    with torch.no_grad():
        return {name: part(bench) for name, part in PARTS.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    print(json.dumps(main(parser.parse_args().smoke)))
