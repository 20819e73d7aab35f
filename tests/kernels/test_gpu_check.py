"""`make gpu-check` works on a bare host: all its parts in miniature, without what such a host lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = Path(__file__).parents[1] / "bench/gpu/check.py"
LACKING = {"hivemind", "msgspec", "uvloop", "cryptography", "base58", "bitsandbytes", "peft", "rich", "gguf", "pytest",
           "hypothesis", "aiohttp"}  # fmt: skip
BARE = f"""
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {LACKING!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_part_runs_with_torch_triton_and_transformers_alone(tmp_path):
    """No part fails or is left out, the last line is JSON, and the report names each part."""
    pytest.importorskip("triton")
    report = tmp_path / "report.md"
    command = [sys.executable, "-c", BARE, str(CHECK), "--smoke", "--report", str(report)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failed"] == summary["left_out"] == []
    for part in ("cases", "decode", "prefill", "tiles", "blocks"):
        assert summary[part]
        assert f"## {part.capitalize()}" in report.read_text()
    assert {row["weights"] for row in summary["blocks"]} == {"none", "int8", "nf4"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    """Nothing runs, and the status is not that of a failed check."""
    command = [sys.executable, str(CHECK), "--report", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "no CUDA device" in done.stderr and done.stderr.count("\n") == 1
