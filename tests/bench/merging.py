"""Whether to keep a copy of the base with one adapter merged into it: dLoRA's switching, with measured costs.

    step(adapter that all rows have, or None, now) ─► copy to build or to drop

dLoRA (Wu et al., OSDI 2024) merges into the base itself, which stops everybody else; its thresholds move by what the
other mode would have batched. Here the base stays as it is (the golden copy), so that other batches go on and dropping
a merged copy is exact; what a copy can save are the adapter's two small products in batches that have this one adapter
only. So the question is not how to batch, but whether building a copy is paid back:

    saved per second, over the last MEMORY_S   x   HORIZON_S   >   MARGIN   x   seconds to build

One copy at a time: another adapter takes its place where it would save MARGIN times as much and is paid back besides.
Pure; simulated in bench_adapter_policy.py, and not in the server: see docs/decisions/0013.
"""

import math
from dataclasses import dataclass, field

MEMORY_S = 30.0
"""What happened so long ago counts 1/e."""
HORIZON_S = 60.0
"""How long a copy is expected to be of use."""
MARGIN = 2.0
"""By which factor a change must pay: what keeps two adapters from taking turns."""


@dataclass(slots=True)
class Merging:
    """The policy.

    Args:
        build_s: what building a copy costs.
    """

    build_s: float
    merged: int | None = None
    """The adapter of which there is a copy."""
    num_builds: int = 0
    _saved: dict[int, float] = field(default_factory=dict)
    _now: float = 0.0

    def step(self, alone: int | None, saves_s: float, now: float) -> bool:
        """A batch is about to run; whether a copy of its adapter is to be built before.

        Args:
            alone: the adapter that all its rows have, if there is one.
            saves_s: what a copy of it would save this batch.
            now: the time.
        """
        factor = math.exp((self._now - now) / MEMORY_S)
        self._now = now
        self._saved = {adapter: saved * factor for adapter, saved in self._saved.items() if saved * factor > 1e-9}
        if alone is None:
            return False
        self._saved[alone] = self._saved.get(alone, 0.0) + saves_s / MEMORY_S
        if alone == self.merged or not self._pays(alone):
            return False
        self.merged = alone
        self.num_builds += 1
        return True

    def _pays(self, adapter: int) -> bool:
        present = 0.0 if self.merged is None else self._saved.get(self.merged, 0.0)
        gain = self._saved[adapter] - present
        return gain * HORIZON_S > MARGIN * self.build_s and self._saved[adapter] > MARGIN * present
