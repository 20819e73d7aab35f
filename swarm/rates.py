"""How often somebody may do something: a token bucket per key, for as many keys as may be remembered. Pure.

    charge(key, now) ──► True: go on        False: refuse; `retry_after_s(key, now)` says for how long

Keys are whoever can be told apart: peers, members of a private swarm, hosts. Forgetting the least recent key is no gain
for it, unless somebody owns more keys than are remembered.
"""

from dataclasses import dataclass

MAX_KEYS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """So many at once, and so many more each second."""

    burst: float
    per_s: float


class Rates:
    """Token buckets.

    Args:
        rate: of each key.
        max_keys: beyond, the least recently charged is forgotten.
    """

    def __init__(self, rate: Rate, *, max_keys: int = MAX_KEYS) -> None:
        self.rate = rate
        self._max_keys = max_keys
        self._used: dict[str, tuple[float, float]] = {}
        """Of each key, the least recently charged first: how much of its burst is used up, and as of when."""

    def charge(self, key: str, now: float, cost: float = 1.0) -> bool:
        """Count something that a key does; False, and not counted, where it has done too much lately."""
        used = self._used_at(key, now) + cost
        if used > self.rate.burst:
            return False
        self._used.pop(key, None)
        self._used[key] = used, now
        if len(self._used) > self._max_keys:
            del self._used[next(iter(self._used))]
        return True

    def retry_after_s(self, key: str, now: float, cost: float = 1.0) -> float:
        """How long until a key may do that; 0 when it may now."""
        return max(0.0, (self._used_at(key, now) + cost - self.rate.burst) / self.rate.per_s)

    def __len__(self) -> int:
        return len(self._used)

    def _used_at(self, key: str, now: float) -> float:
        used, at = self._used.get(key, (0.0, now))
        return max(0.0, used - max(0.0, now - at) * self.rate.per_s)
