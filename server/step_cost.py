"""How long a batch takes, learnt from batches: seconds = fixed + a * decode rows + b * prompt tokens.

    observe(decode rows, prompt tokens, seconds) ─► weighted least squares ─► prompt_limit(decode rows)

A batch of decode rows that takes prompt tokens along may take (1 + STALL) times as long as without them; what it may
take along follows from the fit. Old batches fade, relative errors count, no coefficient is negative, and a weak prior
stands for what was not measured yet. Batches with and without prompt tokens fade apart, so that a long time of nothing
but decoding does not make it forget what a prompt costs. Pure; knows neither sessions nor the clock.
"""

from itertools import combinations

STALL = 0.6
"""By which part prompt tokens may prolong a batch with decode rows in it."""
MIN_PROMPT_TOKENS = 4
"""Prompt tokens that go along whatever they cost."""
FADE = 0.97
"""Weight of a batch relative to the next one of its kind."""
PRIOR = (24.0, 1.0, 1.0)
"""What (fixed, decode row, prompt token) cost relative to each other as long as nothing is known."""
PRIOR_WEIGHT = 1e-3
"""How many batches the prior is worth."""


class _Sums:
    """What least squares needs to know of batches of one kind."""

    __slots__ = ("gram", "moment", "scale", "weight")

    def __init__(self) -> None:
        self.gram = [[0.0] * 3 for _ in range(3)]
        self.moment = [0.0] * 3
        self.scale = self.weight = 0.0

    def add(self, features: tuple[float, float, float], seconds: float) -> None:
        for i, left in enumerate(features):
            self.moment[i] = FADE * self.moment[i] + left / seconds
            row = self.gram[i]
            for j, right in enumerate(features):
                row[j] = FADE * row[j] + left * right / seconds**2
        prior = sum(cost * feature for cost, feature in zip(PRIOR, features, strict=True))
        self.scale = FADE * self.scale + seconds / prior
        self.weight = FADE * self.weight + 1.0


class StepCost:
    """The model of one span on one device."""

    def __init__(self) -> None:
        self._sums = (_Sums(), _Sums())
        self._coefficients: tuple[float, float, float] | None = PRIOR

    @property
    def is_measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return any(sums.weight for sums in self._sums)

    def observe(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        """A batch of so many decode rows and prompt tokens took so long."""
        if seconds > 0:
            self._sums[num_prompt > 0].add((1.0, float(num_decode), float(num_prompt)), seconds)
            self._coefficients = None

    def seconds(self, num_decode: int, num_prompt: int) -> float:
        """Expected time of a batch; in units of its own before anything was observed."""
        fixed, per_row, per_token = self._fit()
        return fixed + per_row * num_decode + per_token * num_prompt

    def prompt_limit(self, num_decode: int, budget: int) -> int:
        """Prompt tokens, of at most `budget`, that may run next to so many decode rows."""
        if not num_decode:
            return budget
        per_token = self._fit()[2]
        allowed = STALL * self.seconds(num_decode, 0)
        if allowed >= per_token * budget:
            return budget
        return min(budget, max(MIN_PROMPT_TOKENS, int(allowed / per_token)))

    def _fit(self) -> tuple[float, float, float]:
        if self._coefficients is None:
            self._coefficients = self._solve()
        return self._coefficients

    def _solve(self) -> tuple[float, float, float]:
        """The non-negative least squares, drawn a little towards the prior: the best of the few supports."""
        first, second = self._sums
        scale = (first.scale + second.scale) / (first.weight + second.weight)
        gram = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(first.gram, second.gram, strict=True)]
        moment = [a + b for a, b in zip(first.moment, second.moment, strict=True)]
        for i, cost in enumerate(PRIOR):
            pull = PRIOR_WEIGHT / (cost * scale) ** 2
            gram[i][i] += pull
            moment[i] += pull * cost * scale
        best, best_gain = (0.0, 0.0, 0.0), 0.0
        for size in (3, 2, 1):
            for support in combinations(range(3), size):
                solution = _solve_linear([[gram[i][j] for j in support] for i in support], [moment[i] for i in support])
                if solution is None or min(solution) < 0:
                    continue
                gain = sum(value * moment[i] for i, value in zip(support, solution, strict=True))
                if gain > best_gain:
                    values = dict(zip(support, solution, strict=True))
                    best, best_gain = (values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)), gain
            if best_gain and size == 3:
                break
        return best


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
