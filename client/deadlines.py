"""When a step is late, when it is stuck, and when to give up: pure, the time comes in as `now`.

    seconds of steps done ─► Pace ─expected─► Watch ─► is_late: ask every server how far it is
                                                └────► is_stuck: replace one that lives (`swarm.client.progress`)
    failures, no route ────► Patience ─► pause, or the error for the caller

Knows nothing of servers and streams.
"""

from swarm.errors import RequestError, RouteNotFound, SwarmError

LATE_FACTOR = 4.0
"""A step is late after so many times what steps like it took."""
STUCK_FACTOR = 30.0
"""A server that lives but gets nowhere is replaced after so many times what the step should take."""
MIN_STUCK_S = 10.0
MAX_PROBE_PERIOD_S = 2.0
"""While nothing comes, servers are asked at least this often."""
MAX_BACKOFF_S = 2.0
MAX_REFUSALS = 3
"""Refusals that blame the request are taken for stale records so often."""


class Pace:
    """What steps take, by their number of tokens: a moving average per power of two."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def measured(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens, without failures, took so long."""
        size = num_tokens.bit_length()
        known = self._seconds.get(size)
        self._seconds[size] = seconds if known is None else 0.8 * known + 0.2 * seconds

    def expected_s(self, num_tokens: int) -> float | None:
        """What a step of so many tokens should take; None before the first step.

        Sizes that were never seen are derived from the nearest smaller one as if every token cost the same, which is
        too much rather than too little; with none smaller, the nearest larger one is it.
        """
        size = num_tokens.bit_length()
        smaller = max((known for known in self._seconds if known <= size), default=None)
        if smaller is not None:
            return self._seconds[smaller] * float(1 << (size - smaller))
        return self._seconds[min(self._seconds)] if self._seconds else None


class Watch:
    """Watches over one step.

    Args:
        now: the time in seconds, as in all methods.
        expected_s: what the step should take; None if unknown.
        late_s: it is not late before.
        stuck_s: longest wait for a server that lives, and how long it is when nothing is expected.
    """

    def __init__(self, now: float, *, expected_s: float | None, late_s: float, stuck_s: float):
        known = expected_s is not None
        self._late_s = max(late_s, LATE_FACTOR * expected_s) if expected_s is not None else 4 * late_s
        self._stuck_s = min(stuck_s, max(MIN_STUCK_S, STUCK_FACTOR * expected_s)) if expected_s is not None else stuck_s
        self._period_s = min(self._late_s, max(late_s, MAX_PROBE_PERIOD_S)) if known else self._late_s
        self._quiet_until = now + self._late_s
        self._stuck_at = now + self._stuck_s

    @property
    def next_check(self) -> float:
        """When to look again."""
        return min(self._quiet_until, self._stuck_at)

    def heard(self, now: float) -> None:
        """Outputs came, or a server said why it waits."""
        self._quiet_until = now + self._late_s
        self._stuck_at = now + self._stuck_s

    def asked(self, now: float) -> None:
        """All servers were asked how far they are."""
        self._quiet_until = now + self._period_s

    def advanced(self, now: float) -> None:
        """A server has got further since it was asked last, or says that it waits."""
        self._stuck_at = now + self._stuck_s

    def is_late(self, now: float) -> bool:
        return now >= self._quiet_until

    def is_stuck(self, now: float) -> bool:
        return now >= self._stuck_at


class Patience:
    """How long to go on without progress: `max_wait_s` from the first trouble on.

    Work that takes long is no trouble; failures, missing blocks and waiting for room are. While a server catches up
    with what another had, the time stands still.
    """

    def __init__(self, max_wait_s: float):
        self._max_wait_s = max_wait_s
        self.progressed()

    def progressed(self) -> None:
        """New outputs came."""
        self._since: float | None = None
        self._advanced_at: float | None = None
        self._attempts = self._refusals = 0

    def waits(self, now: float) -> None:
        """A server waits for room: trouble, but nobody's failure."""
        self._since = now if self._since is None else self._since
        self._advanced_at = None

    def advanced(self, now: float) -> None:
        """A server got further, if only with what is known already: the time since the last such word doesn't count.

        The failures do, and what lies between one and the next such word: a server that fails at the same place again
        and again is given up.
        """
        if self._since is not None and self._advanced_at is not None:
            self._since += now - self._advanced_at
        self._advanced_at = now

    def nears(self) -> None:
        """What is waited for comes nearer: the time begins anew. Failures still count."""
        self._since = self._advanced_at = None

    def failed(self, now: float, error: SwarmError) -> SwarmError | None:
        """Another attempt failed; returns the error when it was the last that may."""
        self.waits(now)
        self._attempts += 1
        self._refusals += isinstance(error, RequestError)
        is_over = self._refusals > MAX_REFUSALS or self.is_over(now + self.pause_s(error))
        return error if is_over else None

    def pause_s(self, error: SwarmError | None) -> float:
        """How long to wait before the next attempt. One failed server is no reason: another may be ready."""
        if not self._attempts or (self._attempts == 1 and not isinstance(error, RouteNotFound)):
            return 0.0
        return min(MAX_BACKOFF_S, 0.05 * 2.0 ** min(self._attempts - 1, 10))

    def is_over(self, now: float) -> bool:
        """Whether the caller's limit has passed."""
        return self._since is not None and now > self._since + self._max_wait_s
