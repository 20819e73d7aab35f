"""Peers that did not answer, which no search waits for until they do.

    a call fails ─► register_failure ─► `in`: left out of searches ─ due ─► asked aside ─┬─ silent: twice as long again
                                  a sign of life ─► heard: due sooner ──────┘            └─ register_success: back

A peer that hangs, or whose machine is gone, costs who asks it a whole timeout. It costs that once: from then on it is
asked aside (`swarm.network.node`), after longer and longer pauses, and forgotten when it stays silent. The names of the
first methods are those of hivemind's blacklist, in whose place it stands. It knows time, and nothing of the network.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHECK_S = 5.0
"""A silent peer is asked again after so long, then after twice as long, and so on; never sooner ..."""
NUM_CHECKS = 6
"""... and is forgotten when it was silent so many times more: by then nobody names it any longer."""
MAX_SILENT = 4096
"""Others are forgotten, those first that fell silent first: answers of strangers may name any number of peers."""


@dataclass(slots=True)
class _Silence:
    """Of one peer: how often it was silent, when it was asked last, and when it is next."""

    count: int
    asked_at: float
    due_at: float


class Silent:
    """The peers that do not answer.

    Args:
        now: a monotonic clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: dict[Any, _Silence] = {}

    def __contains__(self, peer: Any) -> bool:
        return peer in self._known

    def __len__(self) -> int:
        return len(self._known)

    def register_failure(self, peer: Any) -> None:
        """A call got no answer; those that were made at the same time count as one."""
        known, now = self._known.get(peer), self._now()
        if known is None:
            if len(self._known) >= MAX_SILENT:
                del self._known[next(iter(self._known))]
            self._known[peer] = _Silence(1, now, now + CHECK_S)

    def is_gone(self, peer: Any) -> None:
        """It did not keep us waiting: nobody is there, or nobody that takes part in the DHT."""
        if (known := self._known.get(peer)) is not None:
            known.count = max(2, known.count)

    def register_success(self, peer: Any) -> None:
        """It has answered."""
        self._known.pop(peer, None)

    def clear(self) -> None:
        """It was not the peers' fault."""
        self._known.clear()

    @property
    def doubtful(self) -> list[Any]:
        """Those that were silent once only: they may be slow, and hold what nobody else does."""
        return [peer for peer, silence in self._known.items() if silence.count == 1]

    def heard(self, peer: Any) -> None:
        """A peer has shown a sign of life, which does not say that it can be asked: that is tried soon."""
        known = self._known.get(peer)
        if known is not None:
            known.due_at = min(known.due_at, max(known.asked_at + CHECK_S, self._now()))

    def due(self, limit: int) -> list[Any]:
        """Those to ask again now, at most `limit`; they count as asked."""
        now = self._now()
        chosen = [peer for peer, silence in self._known.items() if silence.due_at <= now][:limit]
        for peer in chosen:
            silence = self._known[peer]
            if silence.count > NUM_CHECKS:
                del self._known[peer]
                continue
            silence.count += 1
            silence.asked_at, silence.due_at = now, now + CHECK_S * 2 ** (silence.count - 1)
        return [peer for peer in chosen if peer in self._known]
