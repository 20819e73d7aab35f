"""How long a batch takes, learnt from batches: seconds = fixed + a * decode rows + b * prompt tokens + adapters.

    observe(decode rows, prompt tokens, seconds, adapters) ─► weighted least squares ─► prompt_limit(decode rows)
                                                                                    └─► adapter_seconds(adapters)

A batch of decode rows that takes prompt tokens along may take (1 + STALL) times as long as without them; what it may
take along follows from the fit. Adapters cost something for being there at all (the operators), something for each
distinct one, and something for each of their rank rows, which the step must read. Old batches fade, relative errors
count, no coefficient is negative, and a weak prior stands for what was not measured yet. Batches with and without
prompt tokens or adapters fade apart, so that a long time of nothing but decoding does not make it forget what a prompt
costs. Where no batch had adapters, the fit has three terms and takes no longer. Pure; knows neither sessions nor the
clock.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

STALL = 0.6
"""By which part prompt tokens may prolong a batch with decode rows in it."""
MIN_PROMPT_TOKENS = 4
"""Prompt tokens that go along whatever they cost."""
FADE = 0.97
"""Weight of a batch relative to the next one of its kind."""
PRIOR = (24.0, 1.0, 1.0, 4.0, 0.3, 1.2)
"""What (fixed, decode row, prompt token, adapters at all, distinct adapter, the rank rows of one) cost relative to each
other as long as nothing is known."""
PRIOR_WEIGHT = 1e-3
"""How many batches the prior is worth."""


_BASE = 3
"""Terms of a batch without adapters."""


class AdapterLoad(NamedTuple):
    """What the adapters of a batch are to it."""

    num_adapters: int = 0
    """Distinct ones."""
    num_ranks: int = 0
    """Their rank rows, in all linears of all blocks."""

    def plus(self, num_ranks: Iterable[int]) -> "AdapterLoad":
        """With more adapters, which have so many rank rows."""
        more = list(num_ranks)
        return AdapterLoad(self.num_adapters + len(more), self.num_ranks + sum(more))


NO_ADAPTERS = AdapterLoad()


class _Sums:
    """What least squares needs to know of batches of one kind."""

    __slots__ = ("gram", "moment", "scale", "weight")

    def __init__(self, size: int) -> None:
        self.gram = [[0.0] * size for _ in range(size)]
        self.moment = [0.0] * size
        self.scale = self.weight = 0.0

    def add(self, features: Sequence[float], seconds: float) -> None:
        for i, left in enumerate(features):
            self.moment[i] = FADE * self.moment[i] + left / seconds
            row = self.gram[i]
            for j, right in enumerate(features):
                row[j] = FADE * row[j] + left * right / seconds**2
        prior = sum(cost * feature for cost, feature in zip(PRIOR, features, strict=False))
        self.scale = FADE * self.scale + seconds / prior
        self.weight = FADE * self.weight + 1.0


class StepCost:
    """The model of one span on one device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[bool, bool], _Sums] = {}
        """By whether batches had prompt tokens, and adapters."""
        self._coefficients: list[float] | None = list(PRIOR)
        self._ranks_of_one = 0.0
        """Rank rows of an adapter, on average in the first batch that had any: the unit of the last term."""

    @property
    def is_measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return bool(self._sums)

    def observe(self, num_decode: int, num_prompt: int, seconds: float, adapters: AdapterLoad = NO_ADAPTERS) -> None:
        """A batch of so many decode rows and prompt tokens took so long."""
        if seconds <= 0:
            return
        features = [1.0, float(num_decode), float(num_prompt)]
        if adapters.num_adapters:
            self._ranks_of_one = self._ranks_of_one or adapters.num_ranks / adapters.num_adapters
            features += self._terms(adapters)
        kind = num_prompt > 0, adapters.num_adapters > 0
        if kind not in self._sums:
            self._sums[kind] = _Sums(len(features))
        self._sums[kind].add(features, seconds)
        self._coefficients = None

    def seconds(self, num_decode: int, num_prompt: int, adapters: AdapterLoad = NO_ADAPTERS) -> float:
        """Expected time of a batch; in units of its own before anything was observed."""
        fixed, per_row, per_token, *_ = self._fit()
        seconds = fixed + per_row * num_decode + per_token * num_prompt
        return seconds + self.adapter_seconds(adapters) if adapters.num_adapters else seconds

    def adapter_seconds(self, adapters: AdapterLoad) -> float:
        """What adapters add to a batch."""
        if not adapters.num_adapters:
            return 0.0
        return sum(map(float.__mul__, self._fit()[_BASE:], self._terms(adapters)))

    def _terms(self, adapters: AdapterLoad) -> list[float]:
        unit = self._ranks_of_one or adapters.num_ranks / adapters.num_adapters or 1.0
        return [1.0, float(adapters.num_adapters), adapters.num_ranks / unit]

    def prompt_limit(self, num_decode: int, budget: int, adapters: AdapterLoad = NO_ADAPTERS) -> int:
        """Prompt tokens, of at most `budget`, that may run next to so many decode rows with these adapters."""
        if not num_decode:
            return budget
        per_token = self._fit()[2]
        allowed = STALL * self.seconds(num_decode, 0, adapters)
        if allowed >= per_token * budget:
            return budget
        return min(budget, max(MIN_PROMPT_TOKENS, int(allowed / per_token)))

    def as_prompt_tokens(self, before: AdapterLoad, after: AdapterLoad) -> int:
        """Prompt tokens that take as long as having more adapters in a batch does, about."""
        more, per_token = self.adapter_seconds(after) - self.adapter_seconds(before), self._fit()[2]
        return round(min(more, 1e6 * per_token) / per_token) if per_token else 0

    def _fit(self) -> list[float]:
        if self._coefficients is None:
            known = self._solve()
            unit = known[0] / PRIOR[0] if known[0] else max(a / b for a, b in zip(known, PRIOR, strict=False))
            self._coefficients = known + [cost * unit for cost in PRIOR[len(known) :]]
        return self._coefficients

    def _solve(self) -> list[float]:
        """The non-negative least squares, drawn a little towards the prior; no adapters' terms if none were seen."""
        size = max(len(sums.moment) for sums in self._sums.values())
        gram = [[0.0] * size for _ in range(size)]
        moment = [0.0] * size
        for sums in self._sums.values():
            for i, value in enumerate(sums.moment):
                moment[i] += value
                for j, product in enumerate(sums.gram[i]):
                    gram[i][j] += product
        scale = sum(sums.scale for sums in self._sums.values()) / sum(sums.weight for sums in self._sums.values())
        for i, cost in enumerate(PRIOR[:size]):
            pull = PRIOR_WEIGHT / (cost * scale) ** 2
            gram[i][i] += pull
            moment[i] += pull * cost * scale
        return _solve_non_negative(gram, moment)


def _solve_non_negative(gram: list[list[float]], moment: list[float]) -> list[float]:
    """x >= 0 with the least x.Gx/2 - m.x (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23)."""
    size = len(moment)
    everything = _solve_linear(gram, moment)
    if everything is not None and min(everything) >= 0:
        return everything
    scales = [gram[i][i] ** 0.5 or 1.0 for i in range(size)]
    x, support = [0.0] * size, []
    for _ in range(3 * size):
        slopes = {
            i: (moment[i] - sum(map(float.__mul__, gram[i], x))) / scales[i] for i in range(size) if i not in support
        }
        best = max(slopes, key=slopes.__getitem__, default=None)
        if best is None or slopes[best] <= 1e-9 * max(1e-300, abs(moment[best]) / scales[best]):
            break
        support.append(best)
        while True:
            y = _solve_linear([[gram[i][j] for j in support] for i in support], [moment[i] for i in support])
            if y is None:
                support.pop()
                return x
            blocked = [x[i] / (x[i] - new) for i, new in zip(support, y, strict=True) if new <= 0 and x[i] > new]
            step = min(blocked, default=1.0)
            for i, new in zip(support, y, strict=True):
                x[i] += step * (new - x[i])
            if not blocked:
                break
            x = [value if value > 1e-12 * max(x) else 0.0 for value in x]
            support = [i for i in support if x[i] > 0]
            if not support:
                return x
    return x


def _solve_linear(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with pivoting; None for a singular matrix."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(rows[k][i]))
        if abs(rows[pivot][i]) < 1e-300:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
