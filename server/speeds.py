"""Whether a machine is as fast as was measured, judged by the batches that it runs.

    BatchMeter.plain ──► SpeedCheck.corrected ──► the facts that are known, or others, size by size of a batch

What was measured while the machine was busy, or what has changed since, is set right by use: over ten minutes, what
batches of nothing but decoding took is compared with what they should have taken. Each size that was measured answers
for itself, as far as batches near it were seen; for the rest it follows what all sizes have in common, of which each
is one part. So a server that decodes for one client alone learns little about large batches. Small differences are left
alone, so that nobody's place in the swarm depends on noise.

A server that says that it is slow is used by nobody, and would never learn that it is not: while it runs next to
nothing, what it has taken off what was measured comes back bit by bit. Pure.
"""

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from swarm.server.block_facts import BlockFacts

WINDOW_S = 600.0
"""Batches are judged over so long ..."""
MIN_BATCHES = 100
"""... or longer, until there were so many; and where a size has seen so many, they count for half of what it learns."""
TOLERANCE = 1.3
"""A speed that is off by less than this factor is left as it is."""
MAX_FACTOR = 4.0
"""By how much a speed is changed at once."""
RECOVERY = 1.1
"""By how much it comes back, at most to what was measured, in a window without enough batches."""

Plain = Mapping[tuple[int, int], tuple[int, float]]
"""By rows and blocks of a batch: how many there were, and the seconds that they took."""


class SpeedCheck:
    """Watches one machine; `now` is monotonic."""

    def __init__(self) -> None:
        self._since = self._idle_since = float("-inf")
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
            self._begin(plain, now)
            return facts
        if now - self._since < WINDOW_S:
            return facts
        num_batches, factors = speed_factors(facts, _since(plain, self._before))
        if num_batches >= MIN_BATCHES:
            self._begin(plain, now)
            return _changed(facts, {size: _notable(factor) for size, factor in factors.items()})
        if now - self._idle_since >= WINDOW_S:
            self._idle_since = now
            return _changed(facts, _recovery(facts))
        return facts

    def _begin(self, plain: Plain, now: float) -> None:
        """A new window."""
        self._since = self._idle_since = now
        self._before = dict(plain)


def speed_factors(facts: BlockFacts, plain: Plain) -> tuple[int, dict[int, float]]:
    """How many of these batches can be judged, and by what factor each size is faster than the facts say.

    A batch between two sizes counts for both, for the nearer one more. The logarithm of a size's factor is a mean of
    what it has seen and of what is common to all, where sizes that have seen nothing say that nothing is wrong.
    """
    sizes = sorted(facts.decode_tps)
    per_block_s = [size / facts.decode_tps[size] for size in sizes]
    num_seen, expected_s, took_s = np.zeros((3, len(sizes)))
    num_batches = 0
    for (num_rows, num_blocks), (count, seconds) in plain.items():
        if num_rows <= sizes[-1]:
            near = np.maximum(0.0, 1.0 - np.abs(np.interp(num_rows, sizes, range(len(sizes))) - np.arange(len(sizes))))
            num_batches += count
            num_seen += count * near
            expected_s += count * num_blocks * float(np.interp(num_rows, sizes, per_block_s)) * near
            took_s += seconds * near
    is_seen = (expected_s > 0) & (took_s > 0)
    seen = np.log(np.divide(expected_s, took_s, out=np.ones(len(sizes)), where=is_seen))
    trust = num_seen / (num_seen + MIN_BATCHES)
    logarithms = trust * seen + (1.0 - trust) * float((trust * seen).mean())
    return num_batches, dict(zip(sizes, np.exp(logarithms).tolist(), strict=True))


def _notable(factor: float) -> float:
    """This, within bounds, if it is no trifle."""
    return 1.0 if 1 / TOLERANCE < factor < TOLERANCE else min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)


def _recovery(facts: BlockFacts) -> dict[int, float]:
    """By what factor each size comes back towards what was measured; what is faster than that stays."""
    measured_tps = facts.measured_tps
    return {size: min(RECOVERY, max(1.0, measured_tps.get(size, tps) / tps)) for size, tps in facts.decode_tps.items()}


def _changed(facts: BlockFacts, factors: Mapping[int, float]) -> BlockFacts:
    """Facts whose speeds are by these factors higher; prompts are like the largest batches."""
    if all(math.isclose(factor, 1.0) for factor in factors.values()):
        return facts
    return msgspec.structs.replace(
        facts,
        decode_tps={size: factors[size] * tps for size, tps in facts.decode_tps.items()},
        prefill_tps=factors[max(factors)] * facts.prefill_tps,
        measured_tps=facts.measured_tps or facts.decode_tps,
    )


def _since(plain: Plain, before: Plain) -> dict[tuple[int, int], tuple[int, float]]:
    """The batches that came after."""
    found = {}
    for key, (count, seconds) in plain.items():
        count_before, seconds_before = before.get(key, (0, 0.0))
        if count > count_before:
            found[key] = count - count_before, seconds - seconds_before
    return found
