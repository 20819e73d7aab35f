"""Seconds for one token's logits: the head as transformers has it, and as the client lays it out.

    python tests/bench/bench_head.py [--vocabulary 49152] [--hidden 576] [--rounds 15]

One thread, random weights, the layouts and formats in turn round by round; medians. The floor is one pass over the
float32 matrix (a sum). Errors are relative to the largest logit.
"""

import argparse
import copy
import json
import statistics
import time

import torch
from torch import nn

from swarm.client.head import CastHead, Int8Head, pack


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the matrix (default: 49152, SmolLM2)")
    parser.add_argument("--hidden", type=int, default=576, help="its columns (default: 576)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = make_heads(args.hidden, args.vocabulary)
    report = {}
    for rows in (1, 3, 8, 16):
        hidden = torch.randn(rows, 1, args.hidden)
        times = measure(heads, hidden, args.rounds)
        print(f"\n{rows} rows: {'ms':>22}{'x float32 rows':>17}{'error':>10}")
        for name, head in heads.items():
            error = relative_error(head(hidden), heads["float32 rows"](hidden)) if name != "floor" else 0.0
            ratio = times["float32 rows"] / times[name]
            print(f"  {name:20}{times[name] * 1e3:9.2f}{ratio:17.2f}{error:10.1e}")
            report[f"{name}, {rows} rows"] = {
                "ms": round(times[name] * 1e3, 3),
                "speedup": round(ratio, 3),
                "error": error,
            }
    print(json.dumps({"bench": "head", "hidden": args.hidden, "vocabulary": args.vocabulary, "results": report}))


def make_heads(hidden: int, vocabulary: int) -> dict[str, nn.Module]:
    """The same matrix in all layouts and formats."""
    linear = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    columns = copy.deepcopy(linear)
    columns.weight.data = columns.weight.t().contiguous().t()
    packed = {
        f"{str(dtype).removeprefix('torch.')} packed": head
        for dtype in (torch.float32, torch.bfloat16)
        if (head := pack(linear, dtype, is_tied=True)) is not None
    }
    return {
        "floor": Floor(linear.weight),
        "float32 rows": linear,
        "float32 columns": columns,
        **packed,
        "float16": CastHead(linear, torch.float16),
        "bfloat16": CastHead(linear, torch.bfloat16),
        "int8": Int8Head(linear),
    }


class Floor(nn.Module):
    """Reads the matrix once."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight.sum()


@torch.no_grad()
def measure(heads: dict[str, nn.Module], hidden: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each head."""
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(rounds + 1):
        for name, head in heads.items():
            started = time.perf_counter()
            head(hidden)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
