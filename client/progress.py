"""Who holds a step up that doesn't advance though all its servers live: pure.

ProbeResult of each hop ─progress_of─► Progress ─find_stuck─► a hop, or the way from one to the next
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import PeerMisbehaved
from swarm.protocol import ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step does to the rows; the fields mean what they mean in `swarm.protocol.Step`."""

    step_id: int
    order: tuple[int, ...] | None
    base: tuple[int, ...]
    num_tokens: tuple[int, ...]
    """New tokens of each row."""

    @property
    def expected(self) -> int:
        """Tokens in the rows that have new ones, when the step is done; the other rows don't matter for its end."""
        return sum(base + count for base, count in zip(self.base, self.num_tokens, strict=True) if count)

    def count(self, lengths: Sequence[int]) -> int:
        """Tokens in the rows that have new ones, of rows of these lengths."""
        return sum(length for length, count in zip(lengths, self.num_tokens, strict=True) if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a server says it is: tokens that came in and went out of its blocks, in rows with new tokens."""

    received: int = 0
    produced: int = 0

    def is_beyond(self, other: "Progress") -> bool:
        """Whether something was done since `other`."""
        return self.received + self.produced > other.received + other.produced


def progress_of(result: ProbeResult, step: StepShape) -> Progress:
    """What a server's answer says of a step; what it can't have done yet is not believed.

    Raises:
        PeerMisbehaved: it speaks of another number of rows.
    """
    rows = len(step.base)
    if len(result.received) != rows or len(result.produced) != rows:
        raise PeerMisbehaved(f"progress of {len(result.received)} rows, the session has {rows}")

    def count(tokens: tuple[int, ...]) -> int:
        total = 0
        for row, (base, new) in enumerate(zip(step.base, step.num_tokens, strict=True)):
            if not new:
                continue
            if result.step_id >= step.step_id:
                total += min(tokens[row], base + new)
            else:
                total += min(tokens[step.order[row] if step.order is not None else row], base)
        return total

    return Progress(received=count(result.received), produced=count(result.produced))


def find_stuck(hops: Sequence[Progress], expected: int, fed: Sequence[int | None]) -> tuple[int, bool]:
    """Who holds the step up.

    Args:
        hops: along the route.
        expected: tokens that each should have received.
        fed: for each hop that the client feeds, the tokens that it has for it; None where the hop before does.

    Returns:
        Index of a hop, and whether it is the hop itself, or what comes from it does not reach us; if not, it is the way
        to the next one.
    """
    for index, hop in enumerate(hops):
        if hop.received > hop.produced:
            return index, True
    for index, (hop, here) in enumerate(zip(hops, fed, strict=True)):
        if hop.received < expected:
            if here is None:
                return index - 1, False
            return (index if here > hop.received else index - 1), True
    return len(hops) - 1, True
