"""How busy a server has been in the last seconds. Pure: time enters as `now`."""

import math

WINDOW_S = 10.0
"""What happened so long ago counts 1/e."""


class LoadMeter:
    """Fading sums over what batches did: how long tokens waited, how long they took, and how many there were."""

    def __init__(self) -> None:
        self._now = 0.0
        self._queue_s = self._compute_s = self._tokens = self._count = 0.0

    def record(self, now: float, *, queue_s: float, compute_s: float, num_tokens: int) -> None:
        """`num_tokens` of one session waited for `queue_s` and took `compute_s`."""
        self._fade(now)
        self._queue_s += queue_s
        self._compute_s += compute_s
        self._tokens += num_tokens
        self._count += 1.0

    def waiting_share(self, now: float) -> float:
        """Part of the time that steps spend here in which they wait for others: 0 on a server with one user."""
        self._fade(now)
        total = self._queue_s + self._compute_s
        return self._queue_s / total if total > 1e-3 else 0.0

    def mean_s(self, now: float) -> tuple[float, float]:
        """How long a session's part of a batch waited for it, and how long that batch took, lately."""
        self._fade(now)
        if self._count < 1e-3:
            return 0.0, 0.0
        return self._queue_s / self._count, self._compute_s / self._count

    def tokens_per_s(self, now: float) -> float:
        """Tokens of all sessions together, lately."""
        self._fade(now)
        return self._tokens / WINDOW_S

    def _fade(self, now: float) -> None:
        if now <= self._now:
            return
        factor = math.exp((self._now - now) / WINDOW_S)
        self._now = now
        self._queue_s, self._compute_s, self._tokens, self._count = (
            self._queue_s * factor,
            self._compute_s * factor,
            self._tokens * factor,
            self._count * factor,
        )
