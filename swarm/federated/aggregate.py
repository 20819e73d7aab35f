"""Several clients' adapters as one: what each rule makes of them. Pure, and the same bits everywhere.

    updates, weights ─┬─ stacked    A = [A_1; ...], B = [w_1 s_1 B_1, ...]: the exact mean of all B_i A_i, rank sum r_i
                      ├─ truncated  the best approximation of that mean of a rank that stays
                      └─ averaged   means of A and of B apart: not the mean of the products, for comparison

The mean of products is what federated averaging means (McMahan et al., 2017). FedIT (Zhang et al., arXiv 2305.05644)
averages A and B apart, which differs from it by all cross terms w_i w_j B_i A_j. FLoRA (Wang et al., arXiv 2409.05976)
stacks, which is exact and takes clients of different ranks. FFA-LoRA (Sun et al., arXiv 2403.12313) keeps one common A
fixed, and then means apart are exact as well: `with_common_a`, which the warm-up in the manner of SLoRA (Babakniya et
al., arXiv 2308.06522) uses, whose second stage begins with `truncated`.

Updates come in an order that all agree about; sums are taken in that order, in float64, and rounded to fp32 once. It
knows nothing of peers; what may be wrong with an update was checked before (`updates`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.errors import InvalidRequest
from swarm.federated.low_rank import Floats, squared_norm, truncate

Update = Mapping[int, BlockDelta]
"""A LoRA adapter, by block: linears with A, B and a scale, and nothing else."""

A_NORM = 3.0**-0.5
"""Of a row of A, as PEFT draws it: uniform within +-1 / sqrt(I)."""

MAX_NUMBERS = 1 << 24
"""Of tall factors that are worked on together, 128 MiB; a few times as much is needed beside them."""

_Site = tuple[int, str]


def weights_of(num_examples: Sequence[int]) -> list[float]:
    """Each client's part of the mean, by how many examples (or tokens) it has learnt from.

    Raises:
        InvalidRequest: somebody has learnt from none.
    """
    if not num_examples or min(num_examples) < 1:
        raise InvalidRequest(f"numbers of examples are {list(num_examples)}, need at least 1 each")
    total = sum(num_examples)
    return [number / total for number in num_examples]


def stacked(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """The exact weighted sum of the updates' products, of the sum of their ranks; the weight goes into B."""
    found = {}
    for site, linears in _together(updates).items():
        a = torch.cat([_given(linear.a_rI).float() for linear in linears])
        columns = [
            _rounded(weight * linear.scale * _numbers(linear.b_Or))
            for weight, linear in zip(weights, linears, strict=True)
        ]
        found[site] = LinearDelta(a_rI=a, b_Or=torch.cat(columns, 1))
    return _by_block(found)


def truncated(updates: Sequence[Update], weights: Sequence[float], *, rank: int, scale: float = 1.0) -> Update:
    """The weighted sum of the updates' products, as near as a rank allows.

    The singular values go into B, and rows of A have the norm that they had when training began. SLoRA gives both
    factors their roots; in a short run that made no difference (docs/log.md, 2026-11-27).

    Args:
        updates: of any ranks.
        weights: their factors; they need not sum up to 1.
        rank: of the result, padded with zeros where the sum has less.
        scale: that the result is to have.
    """
    found: dict[_Site, LinearDelta] = {}
    sites = _together(updates)
    for alike in _alike(sites):
        b_ROL = np.stack([_tall_b(sites[site], weights) for site in alike], -1)
        a_RIL = np.stack([_tall_a(sites[site]) for site in alike], -1)
        result = truncate(b_ROL, a_RIL, rank)
        for index, site in enumerate(alike):
            found[site] = LinearDelta(
                a_rI=_rounded(result.a_KIL[:, :, index] * A_NORM),
                b_Or=_rounded(result.b_KOL[:, :, index].T / (scale * A_NORM)),
                scale=scale,
            )
    return _by_block(found)


def averaged(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Weighted sums of A and of B apart; exact only where all have the same A.

    Raises:
        InvalidRequest: ranks or scales differ.
    """
    found = {}
    for site, linears in _together(updates).items():
        kinds = {(linear.rank, linear.scale) for linear in linears}
        if len(kinds) > 1:
            raise InvalidRequest(f"block {site[0]}, {site[1]}: (rank, scale) {sorted(kinds)} can't be averaged apart")
        a = _weighted([_numbers(linear.a_rI) for linear in linears], weights)
        b = _weighted([_numbers(linear.b_Or) for linear in linears], weights)
        found[site] = LinearDelta(a_rI=_rounded(a), b_Or=_rounded(b), scale=linears[0].scale)
    return _by_block(found)


def with_common_a(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """`averaged`, where A is the same everywhere and is kept as it is."""
    mean = averaged(updates, weights)
    return {
        block: BlockDelta(
            linears={
                path: LinearDelta(a_rI=updates[0][block].linears[path].a_rI, b_Or=linear.b_Or, scale=linear.scale)
                for path, linear in delta.linears.items()
            }
        )
        for block, delta in mean.items()
    }


def padded(update: Update, rank: int) -> Update:
    """The same update with rows and columns of zeros, so that each linear has this rank."""
    found = {}
    for site, (linear,) in _together([update]).items():
        a, b = _given(linear.a_rI), _given(linear.b_Or)
        more = rank - linear.rank
        found[site] = LinearDelta(
            a_rI=torch.cat([a, a.new_zeros(more, a.shape[1])]),
            b_Or=torch.cat([b, b.new_zeros(b.shape[0], more)], 1),
            scale=linear.scale,
        )
    return _by_block(found)


def distance(update: Update, base: Update | None) -> float:
    """The Frobenius norm of what an update has changed in all weights together, beginning at `base` (None: at zero)."""
    parts, weights = ([update], [1.0]) if base is None else ([update, base], [1.0, -1.0])
    sites = _together(parts)
    squares = []
    for alike in _alike(sites):
        b_ROL = np.stack([_tall_b(sites[site], weights) for site in alike], -1)
        squares += squared_norm(b_ROL, np.stack([_tall_a(sites[site]) for site in alike], -1)).tolist()
    return math.sqrt(math.fsum(squares))


def clipped(weights: Sequence[float], distances: Sequence[float], max_ratio: float) -> list[float]:
    """Smaller weights for updates that have gone further than `max_ratio` times the median, so that they count as if
    they had gone just so far; what is missing to 1 belongs to what all began with (norm clipping, Sun et al., 2019)."""
    ordered = sorted(distances)
    limit = max_ratio * ordered[(len(ordered) - 1) // 2]
    return [
        weight * limit / distance if distance > limit > 0 else weight
        for weight, distance in zip(weights, distances, strict=True)
    ]


def _together(updates: Sequence[Update]) -> dict[_Site, list[LinearDelta]]:
    """Of each linear, what all the updates do to it; all of them change the same ones."""
    sites = [(block, path) for block, delta in sorted(updates[0].items()) for path in sorted(delta.linears)]
    return {(block, path): [update[block].linears[path] for update in updates] for block, path in sites}


def _alike(sites: Mapping[_Site, Sequence[LinearDelta]]) -> Iterable[list[_Site]]:
    """Linears whose factors have the same shapes, which are worked on together, as many as there is room for."""
    groups: dict[object, list[_Site]] = {}
    for site, linears in sites.items():
        shapes = tuple((_given(linear.a_rI).shape, _given(linear.b_Or).shape) for linear in linears)
        groups.setdefault(shapes, []).append(site)
    for alike in groups.values():
        num_numbers = sum(it.numel() for linear in sites[alike[0]] for it in (_given(linear.a_rI), _given(linear.b_Or)))
        size = max(1, MAX_NUMBERS // num_numbers)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _tall_b(linears: Sequence[LinearDelta], weights: Sequence[float]) -> Floats:
    """Columns of all B, [R, O], weights and scales in them."""
    parts = [weight * it.scale * _numbers(it.b_Or) for weight, it in zip(weights, linears, strict=True)]
    return np.concatenate([part.T for part in parts])


def _tall_a(linears: Sequence[LinearDelta]) -> Floats:
    return np.concatenate([_numbers(linear.a_rI) for linear in linears])


def _weighted(values: Sequence[Floats], weights: Sequence[float]) -> Floats:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _by_block(linears: Mapping[_Site, LinearDelta]) -> Update:
    found: dict[int, dict[str, LinearDelta]] = {}
    for (block, path), linear in linears.items():
        found.setdefault(block, {})[path] = linear
    return {block: BlockDelta(linears=found[block]) for block in sorted(found)}


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise InvalidRequest("a linear of an update has no A or no B")
    return tensor.detach().cpu()


def _numbers(tensor: torch.Tensor | None) -> Floats:
    found: Floats = _given(tensor).double().numpy()
    return found


def _rounded(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()
