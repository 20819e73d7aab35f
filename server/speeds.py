"""Whether a machine is as fast as was measured, judged by the batches that it runs.

    BatchMeter.plain ──► SpeedCheck.corrected ──► the facts that are known, or others that are as much slower or faster

What was measured while the machine was busy, or what has changed since, is set right by use: over ten minutes, what
batches of nothing but decoding took is compared with what they should have taken. Small differences are left alone,
so that nobody's place in the swarm depends on noise. Pure.
"""

from collections.abc import Mapping

import msgspec
import numpy as np

from swarm.server.block_facts import BlockFacts

WINDOW_S = 600.0
"""Batches are judged over so long ..."""
MIN_BATCHES = 100
"""... or longer, until there were so many."""
TOLERANCE = 1.3
"""A speed that is off by less than this factor is left as it is."""
MAX_FACTOR = 4.0
"""By how much a speed is changed at once."""

Plain = Mapping[tuple[int, int], tuple[int, float]]
"""By rows and blocks of a batch: how many there were, and the seconds that they took."""


class SpeedCheck:
    """Watches one machine; `now` is monotonic."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._before: dict[tuple[int, int], tuple[int, float]] = {}

    def corrected(self, facts: BlockFacts, plain: Plain, now: float) -> BlockFacts:
        """The facts; when batches took otherwise than these say, others.

        Args:
            facts: what is known.
            plain: all batches of nothing but decoding so far, by one executor.
            now: the time.
        """
        plain = dict(plain)  # at once: another thread writes it
        is_new = any(plain.get(key, (0, 0.0))[0] < count for key, (count, _) in self._before.items())
        if self._since == float("-inf") or is_new:
            self._since, self._before = now, dict(plain)
            return facts
        num_batches, factor = speed_factor(facts, _since(plain, self._before))
        if now - self._since < WINDOW_S or num_batches < MIN_BATCHES:
            return facts
        self._since, self._before = now, dict(plain)
        if 1 / TOLERANCE < factor < TOLERANCE:
            return facts
        factor = min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)
        return msgspec.structs.replace(
            facts,
            decode_tps={size: factor * tps for size, tps in facts.decode_tps.items()},
            prefill_tps=factor * facts.prefill_tps,
        )


def speed_factor(facts: BlockFacts, plain: Plain) -> tuple[int, float]:
    """How many of these batches can be judged, and how many times as fast as the facts say they ran."""
    sizes = sorted(facts.decode_tps)
    per_block_s = [size / facts.decode_tps[size] for size in sizes]
    num_batches, expected_s, took_s = 0, 0.0, 0.0
    for (num_rows, num_blocks), (count, seconds) in plain.items():
        if num_rows <= sizes[-1]:
            num_batches += count
            expected_s += count * num_blocks * float(np.interp(num_rows, sizes, per_block_s))
            took_s += seconds
    return num_batches, expected_s / took_s if took_s > 0 else 1.0


def _since(plain: Plain, before: Plain) -> dict[tuple[int, int], tuple[int, float]]:
    """The batches that came after."""
    found = {}
    for key, (count, seconds) in plain.items():
        count_before, seconds_before = before.get(key, (0, 0.0))
        if count > count_before:
            found[key] = count - count_before, seconds - seconds_before
    return found
