"""Remembers which peers could not be reached directly, and when to try again. Pure: the time comes in as `now`."""

from dataclasses import dataclass

FIRST_PAUSE_S = 15.0
MAX_PAUSE_S = 600.0
MAX_PEERS = 4096


@dataclass(slots=True)
class _Failures:
    count: int
    retry_at: float


class Reachability:
    """Failures double the pause before the next attempt, up to ten minutes; a success forgets them."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failures] = {}

    def should_try(self, peer_id: str, now: float) -> bool:
        """Whether a direct connection to the peer is worth an attempt."""
        failures = self._failures.get(peer_id)
        return failures is None or now >= failures.retry_at

    def failed(self, peer_id: str, now: float) -> None:
        """An attempt failed."""
        failures = self._failures.pop(peer_id, None) or _Failures(0, 0.0)
        failures.count += 1
        failures.retry_at = now + min(FIRST_PAUSE_S * 2 ** min(failures.count - 1, 16), MAX_PAUSE_S)
        self._failures[peer_id] = failures
        if len(self._failures) > MAX_PEERS:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, peer_id: str) -> None:
        """An attempt succeeded."""
        self._failures.pop(peer_id, None)
