"""What each hop of a step cost, from what the servers say of it and what the client measured: pure.

sent ~~► hop ~~► hop ~~► result with one HopTrace per hop ─attribute─► HopTiming per hop
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.protocol import HopTrace
from swarm.types import BlockRange, Hop


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTiming:
    """One hop's part of one step."""

    peer_id: str
    blocks: BlockRange
    num_tokens: int
    round_trip_s: float
    """Its share of the time from the client's sending to the result."""
    compute_s: float
    queue_s: float

    @property
    def overhead_s(self) -> float:
        """What the hop cost besides the blocks and the server's queue."""
        return self.round_trip_s - self.compute_s - self.queue_s


def attribute(
    hops: Sequence[Hop], trace: Sequence[HopTrace], *, total_s: float, num_tokens: int
) -> tuple[HopTiming, ...]:
    """Share out the time between sending to the first of these hops and the result of the last.

    What the servers did not spend in queue and blocks went into the ways between them: half a round trip to the next
    where a server knows it, the rest in equal parts. What servers say beyond the time that has passed is not believed.
    """
    if len(hops) != len(trace):
        return ()
    claimed_s = sum(hop.queue_us + hop.compute_us for hop in trace) / 1e6
    scale = min(1.0, total_s / claimed_s) if claimed_s else 1.0
    ways_s = max(0.0, total_s - claimed_s)
    links_s = sum(hop.link_us for hop in trace) / 1e6
    link_scale = min(1.0, ways_s / links_s) if links_s else 0.0
    rest_s = (ways_s - links_s * link_scale) / len(hops)
    timings = []
    for hop, spent in zip(hops, trace, strict=True):
        compute_s, queue_s = spent.compute_us * scale / 1e6, spent.queue_us * scale / 1e6
        overhead_s = rest_s + spent.link_us * link_scale / 1e6
        timings.append(
            HopTiming(
                peer_id=hop.peer_id,
                blocks=hop.blocks,
                num_tokens=num_tokens,
                round_trip_s=compute_s + queue_s + overhead_s,
                compute_s=compute_s,
                queue_s=queue_s,
            )
        )
    return tuple(timings)
