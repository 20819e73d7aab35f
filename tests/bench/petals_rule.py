"""The placement rule of Petals (Borzunov et al., ACL 2023), from its description, as what ours is compared with.

    join: of all windows the one whose blocks' summed throughputs, sorted, are the smallest
    stay or move, asked now and then: if all servers packed anew one after the other, would the weakest block gain a
        third? Then move; nobody is asked, and whoever asks at the same time moves too

A server announces its rate through one block, divided by the mean part of its span that a request uses. Pure.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarm.placement import Holding
from swarm.types import BlockRange

QUALITY = 0.75
EPSILON = 1e-3


def best_start(totals: NDArray[np.float64], length: int) -> int:
    """The first window of the lexicographically smallest sorted totals."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(totals, length), axis=1)
    return int(np.lexsort(windows.T[::-1])[0])


def choose(holdings: Sequence[Holding], length: int, num_blocks: int) -> BlockRange:
    """Where a newcomer goes."""
    start = best_start(_totals(holdings, num_blocks), length)
    return BlockRange(start, start + length)


def should_move(holdings: Sequence[Holding], own_id: str, num_blocks: int, generator: np.random.Generator) -> bool:
    """Whether a server leaves its blocks and chooses anew."""
    spans = {it.peer_id: (it.blocks.start, len(it.blocks), _announced(it)) for it in holdings}
    totals = _totals(holdings, num_blocks)
    before = float(totals.min())
    start, length, rate = spans[own_id]
    totals[start : start + length] -= rate * (1 + EPSILON)
    if before > EPSILON and totals.min() <= 0:
        return False
    moved = best_start(totals, length)
    if moved == start:
        return False
    totals[start : start + length] += rate * EPSILON
    totals[moved : moved + length] += rate
    spans[own_id] = moved, length, rate
    _repack(spans, totals, generator)
    after = float(totals.min())
    return not (after < before or after < EPSILON) and before / after < QUALITY - EPSILON


def _repack(spans: dict[str, tuple[int, int, float]], totals: NDArray[np.float64], generator: np.random.Generator):
    """Every server moves to its best place, in random order, until none does; at most a hundred rounds."""
    for _ in range(100):
        has_moved = False
        for peer_id in generator.permutation(sorted(spans)):
            start, length, rate = spans[peer_id]
            totals[start : start + length] -= rate * (1 + EPSILON)
            better = best_start(totals, length)
            totals[start : start + length] += rate * EPSILON
            totals[better : better + length] += rate
            has_moved |= better != start
            spans[peer_id] = better, length, rate
        if not has_moved:
            return


def _announced(holding: Holding) -> float:
    return holding.capacity_tps / ((len(holding.blocks) + 1) / 2)


def _totals(holdings: Sequence[Holding], num_blocks: int) -> NDArray[np.float64]:
    totals = np.zeros(num_blocks)
    for holding in holdings:
        totals[holding.blocks.start : holding.blocks.end] += _announced(holding)
    return totals
