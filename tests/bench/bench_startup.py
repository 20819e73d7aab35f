"""Seconds from process start to ONLINE and peak resident memory of a server's process tree, by number of blocks.

    python tests/bench/bench_startup.py [--repeats 3]

Memory is the sum over the tree of each process's own peak (VmHWM), so it is an upper bound of what was ever resident at
once.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from safetensors import safe_open

from swarm.checkpoint.source import Checkpoint, resolve
from swarm.client.processes import start_bootstrap, start_server

MODEL = "smollm2-135m-instruct"
NUM_BLOCKS = (1, 5, 10, 20, 30)
LIMITS = {"online_s_10_blocks": 6.0, "memory_mb_above_1.2x_blocks": 450.0}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="starts per size; the median is reported")
    repeats = parser.parse_args().repeats
    checkpoint = resolve(MODEL)
    bytes_per_block = block_bytes(checkpoint)
    rows = []
    with start_bootstrap() as bootstrap:
        address = bootstrap.address()
        for num_blocks in NUM_BLOCKS:
            samples = [start_once(num_blocks, address) for _ in range(repeats)]
            weights_mb = num_blocks * bytes_per_block / 1e6
            rows.append(
                {
                    "blocks": num_blocks,
                    "weights_mb": round(weights_mb, 1),
                    "online_s": round(statistics.median(sample[0] for sample in samples), 2),
                    "peak_mb": round(statistics.median(sample[1] for sample in samples), 1),
                    "processes": samples[0][2],
                }
            )
            rows[-1]["peak_above_1.2x_weights_mb"] = round(rows[-1]["peak_mb"] - 1.2 * weights_mb, 1)
    print(
        f"{'blocks':>6} {'weights MB':>11} {'ONLINE s':>9} {'peak MB':>8}"
        f" {'peak - 1.2 x weights':>21} {'processes':>10}"
    )
    for row in rows:
        print(
            f"{row['blocks']:6} {row['weights_mb']:11} {row['online_s']:9} {row['peak_mb']:8}"
            f" {row['peak_above_1.2x_weights_mb']:21} {row['processes']:10}"
        )
    print(json.dumps({"bench": "startup", "model": MODEL, "limits": LIMITS, "rows": rows}))


def block_bytes(checkpoint: Checkpoint) -> float:
    """Average size of one block in the checkpoint."""
    total, blocks = 0, set()
    for shard, path in checkpoint.ensure(sorted(set(checkpoint.weight_map.values()))).items():
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if ".layers." in key and checkpoint.weight_map[key] == shard:
                    part = file.get_slice(key)
                    size = 4 if part.get_dtype() == "F32" else 2
                    for length in part.get_shape():
                        size *= length
                    total += size
                    blocks.add(key.split(".layers.")[1].split(".")[0])
    return total / len(blocks)


def start_once(num_blocks: int, address: str) -> tuple[float, float, int]:
    """(seconds to ONLINE, peak MB of the tree, number of processes) of one start."""
    started = time.perf_counter()
    args = ("--quantization", "none", "--threads", "1")
    with start_server(f"0:{num_blocks}", [address], *args, model=MODEL) as server:
        server.wait_for(r"^ONLINE", 120)
        seconds = time.perf_counter() - started
        pids = process_tree(server.pid)
        return seconds, sum(peak_mb(pid) for pid in pids), len(pids)


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += process_tree(int(child))
    return pids


def peak_mb(pid: int) -> float:
    """Peak resident set of one process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


if __name__ == "__main__":
    main()
