"""The GPU benchmark of adapters runs on a bare host: all its tables in miniature, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_table_has_rows():
    """Nothing fails or is left out."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.bench.gpu.lora", "--smoke"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables = json.loads(done.stdout.splitlines()[-1])
    assert set(tables) == {"lora cases", "lora kernels", "lora block", "lora modes"}
    assert all(rows and not any("failed" in row for row in rows) for rows in tables.values())
