"""What benchmarks share: a way to the tests' packages, statistics, and the JSON report.

Importing this first lets `from tests...` work in a script.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
# Not through sys.path, which must not have our root in it (see swarm/__init__.py).
if "tests" not in sys.modules:
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by at least this share of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def judged(value: float, relation: str, target: float) -> dict[str, Any]:
    """A value next to its target, for the JSON report."""
    good = {"<=": value <= target, ">=": value >= target, "==": value == target}[relation]
    return {"value": round(value, 4), "target": f"{relation} {target:g}", "pass": good}


def print_report(bench: str, targets: dict[str, dict[str, Any]], **details: Any) -> None:
    """A line per target, then the last line of every benchmark: one JSON object."""
    for name, verdict in targets.items():
        print(f"{'ok  ' if verdict['pass'] else 'MISS'} {name}: {verdict['value']} (target {verdict['target']})")
    print(json.dumps({"bench": bench, **details, "targets": targets}))
