"""Tables for people, and the report for docs/benchmarks/."""

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_TEXTS = {
    "cases": "Every form, shape and dtype against the reference, outputs poisoned with NaN: the largest error.",
    "decode": "One new row per sequence, 32 query heads, 8 key/value heads of 128, pages scattered. `of_copy`: bytes "
    "of keys and values per second over those of a large copy; `over_sdpa`: time of torch's attention over contiguous "
    "keys, over ours.",
    "prefill": "A chunk of one sequence, the same heads; `over_sdpa` as above (with the keys repeated beforehand).",
    "tiles": "Other tiles for the two launches, best first; `chosen` is what the kernel uses.",
    "blocks": "One block of an 8B Llama (hidden 4096, MLP 14336) over 1024 cached tokens a sequence, from call to "
    "result. `floor_ms`: reading weights and keys at the speed of a copy.",
    "tests": "tests/kernels under pytest.",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; rows may have different ones."""
    if not rows:
        return "(left out: no time)"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def markdown(summary: dict[str, Any], parts: list[str]) -> str:
    """The report."""
    lines = [f"# GPU, {summary['date']}", "", f"`make gpu-check`, commit {summary['commit']}. {summary['device']}, "
             f"capability {summary['capability']}; Python {summary['python']}, torch {summary['torch']}, triton "
             f"{summary['triton']}, transformers {summary['transformers']}.", ""]  # fmt: skip
    if summary["failed"]:
        lines += [f"**Failed: {', '.join(summary['failed'])}.**", ""]
    if summary["left_out"]:
        lines += [f"Left out for want of time: {', '.join(summary['left_out'])}.", ""]
    for part in parts:
        rows = summary[part]
        shown = [row for row in rows if row.get("failed")] + _summed_up(rows) if part == "cases" else rows
        lines += [f"## {part.capitalize()}", "", _TEXTS[part], "", "```", table(shown), "```", ""]
    whole = json.dumps({name: value for name, value in summary.items() if name != "cases"})
    lines += ["<details><summary>JSON</summary>", "", "```json", whole, "```", "", "</details>", ""]
    return "\n".join(lines)


def machine(smoke: bool) -> dict[str, Any]:
    """Where and with what this ran."""
    import transformers
    import triton

    device = "CPU (smoke: figures mean nothing)" if smoke else torch.cuda.get_device_name(0)
    capability = "-" if smoke else ".".join(map(str, torch.cuda.get_device_capability(0)))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": device,
        "capability": capability,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def _summed_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    good = [row for row in rows if "error" in row]
    dtypes = sorted({row["case"].rpartition(" ")[2] for row in good})
    return [
        {"dtype": dtype, "cases": len(errors), "largest error": max(errors)}
        for dtype in dtypes
        if (errors := [row["error"] for row in good if row["case"].endswith(f" {dtype}")])
    ]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
