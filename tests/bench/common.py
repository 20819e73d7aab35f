"""What benchmarks share: the repository on the path, statistics, swarms of servers on the hosts of a network, reports.

    start_swarm(network, spans) ─► bootstrap on host 0, a server on each of hosts 1, 2, ... ─► Swarm.connect ─► a model

Importing this first lets `from tests...` work in a script.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by at least this share of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def judged(value: float, relation: str, target: float) -> dict[str, Any]:
    """A value next to its target, for the JSON report."""
    good = {"<=": value <= target, ">=": value >= target, "==": value == target}[relation]
    return {"value": value, "target": f"{relation} {target}", "pass": good}


def print_json(report: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(report))
