"""When each server of a training chain had gradients to work on, by the client's own clock. Pure.

    sent: gradients to the last server ─► answered ─► answered ... ─► answered by the first      of each micro-batch
                                             └─ Leg: who worked, and since when ─► client.observed

The way back is most of the work, and its answers can't come before it is done: they carry gradients. Where servers send
to each other, a server begins when the one behind it has answered. An answer that carries nothing is a mere word, which
could put one's own time down to the next: such servers share a leg with the next that shows what it did. What linked
servers tell of the way forth are mere words, so nothing is measured there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.types import Hop

MAX_UNDER_WAY = 4096
"""Micro-batches that are remembered: of those that begin again under another number nothing more is heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A part of a micro-batch's way back, done now."""

    hops: tuple[Hop, ...]
    """Who did it, in the order of the chain: the first has shown it."""
    since: float
    """When the last of them got its gradients."""


class WayBack:
    """The micro-batches that are on their way back through one chain; `now` is a monotonic time in seconds.

    Args:
        hops: of the chain.
    """

    def __init__(self, hops: Sequence[Hop]):
        self._hops = tuple(hops)
        self._under_way: dict[int, tuple[int, float]] = {}
        """By number: at which hop, and since when, as far as that was shown."""

    def sent(self, number: int, hop: int, now: float) -> None:
        """Gradients have gone out to a hop."""
        self._under_way[number] = (hop, now)
        if len(self._under_way) > MAX_UNDER_WAY:
            del self._under_way[next(iter(self._under_way))]

    def answered(self, number: int, hop: int, now: float) -> Leg | None:
        """A hop has shown its work on a micro-batch; None where nothing follows from that."""
        last, since = self._under_way.get(number, (-1, now))
        if hop > last:  # overtaken by one in front of it, with which it shared a leg
            return None
        if hop:
            self._under_way[number] = (hop - 1, now)
        else:
            del self._under_way[number]
        return Leg(hops=self._hops[hop : last + 1], since=since)
