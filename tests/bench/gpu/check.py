"""`make gpu-check`: every test of the kernels and every GPU benchmark, in one command of at most 8 minutes.

    python3 tests/bench/gpu/check.py [--smoke] [--seconds 450] [--report build/gpu/report.md]

Needs torch, triton and transformers, and nothing else: no network, no installation of swarm. pytest and hypothesis run
the rest of tests/kernels where they are there. Exit status: 0 all well, 1 a kernel is wrong or a part failed, 3 no CUDA
device. `--smoke` runs all of it in miniature on the CPU (kernels in Triton's interpreter), to test this program.

    cases of tests/kernels --> decode --> prefill --> tiles --> blocks --> pytest      each until the time is up
                          tables, a Markdown report, and one JSON object as the last line
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
NO_DEVICE = 3


def main() -> int:
    """Run, print, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, to test this program")
    parser.add_argument("--seconds", type=float, default=450, help="after so many, what has not begun is left out")
    parser.add_argument("--report", type=Path, default=ROOT / "build/gpu/report.md", help="Markdown file to write")
    args = parser.parse_args()
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    make_importable(args.report.parent / "links")
    import torch

    if not args.smoke and not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device was found by torch {torch.__version__}; nothing was run", file=sys.stderr)
        return NO_DEVICE
    return run(args)


def make_importable(links: Path) -> None:
    """Let this process and its children import this checkout, which need not be installed, as `swarm` and `tests`."""
    package = links / "swarm"
    package.mkdir(parents=True, exist_ok=True)
    sources = [*(path for path in (ROOT / "swarm").iterdir() if path.name != "__pycache__"),
               ROOT / "client", ROOT / "server", ROOT / "kernels"]  # fmt: skip
    for link, target in ((links / "tests", ROOT / "tests"), *((package / path.name, path) for path in sources)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(links), *(entry for entry in sys.path if entry != here)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(links), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(args: argparse.Namespace) -> int:
    """All parts in order; a part that fails is reported and doesn't keep the others from running."""
    from tests.bench.gpu import attention, block, report
    from tests.bench.gpu.timing import Bench
    from tests.kernels.interpreter import mend_interpreter

    if args.smoke:
        mend_interpreter()
    bench = Bench(smoke=args.smoke, until=time.monotonic() + args.seconds)
    parts: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
        "cases": attention.cases,
        "decode": attention.decode,
        "prefill": attention.prefill,
        "tiles": attention.tiles,
        "blocks": block.steps,
        "tests": run_tests,
    }
    results: dict[str, Any] = {}
    failed = []
    for name, part in parts.items():
        started = time.monotonic()
        try:
            results[name] = rows = part(bench)
            if any(row.get("failed") for row in rows):
                failed.append(name)
        except Exception as error:  # noqa: BLE001 - one run on a borrowed device should tell as much as it can
            results[name] = rows = [{"failed": f"{type(error).__name__}: {error}"[:500]}]
            failed.append(name)
        print(f"== {name} ({time.monotonic() - started:.0f} s)\n{report.table(rows)}\n", flush=True)
    summary = {"bench": "gpu", **report.machine(args.smoke), "failed": failed, "left_out": bench.left_out, **results}
    args.report.write_text(report.markdown(summary, list(parts)))
    print(f"report: {args.report}\nfailed: {', '.join(failed) or 'nothing'}")
    print(json.dumps(summary))
    return 1 if failed else 0


def run_tests(bench: Any) -> list[dict[str, Any]]:
    """tests/kernels under pytest, where it is there; the cases for a device have run before, without it."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or bench.smoke:
        return [{"skipped": f"no {' and '.join(missing)} here" if missing else "smoke"}]
    if bench.time_is_up("pytest tests/kernels"):
        return []
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", str(ROOT / "tests/gpu.ini"), "--rootdir", str(ROOT),
               "-m", "not gpu", "-k", "not gpu_check", str(ROOT / "tests/kernels")]  # fmt: skip
    limit_s = bench.seconds_left + 30
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of whatever else the host has
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s,
                              check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return [{"skipped": "time was up before it ended"}]
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    return [{"tests": last, **({"failed": done.stdout[-2000:]} if done.returncode else {})}]


if __name__ == "__main__":
    sys.exit(main())
