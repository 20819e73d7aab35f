"""What one client saw of all servers: failures, and what steps and training took.

    failures ────────────────────┐
    HopTimings of a step ────────┼──► Behaviour of each server ──► penalties, excesses, parts ──► routes
    Legs of training ────────────┘

The Router says what was to be expected. Knows neither network nor clock: time comes in as `now`.
"""

from collections import defaultdict
from collections.abc import Sequence

from swarm.client.behaviour import Behaviour
from swarm.client.pace import parts
from swarm.client.timings import HopTiming
from swarm.client.way_back import Leg
from swarm.routing import VISIT_S, Router
from swarm.types import Hop

BACK_WORK = 3.0
"""What a token costs on its way back, by what it costs forth: that again, and gradients of inputs and parameters."""
MUCH_QUICKER = 2.0
"""A run leaves who holds it up with less than 1 / so much of what it announces, for a chain that is so much quicker."""


class Observed(defaultdict[str, Behaviour]):
    """By peer id."""

    def __init__(self) -> None:
        super().__init__(Behaviour)

    def measured(self, timings: Sequence[HopTiming], router: Router, now: float) -> None:
        """A step of one token per row took so long on its hops.

        What it took beyond all that was expected is shared by them all, what it took less as well, so that over several
        routes it is found with whom the time goes: least mean squares, normalised (Widrow and Hoff's rule). Ways that
        nobody has measured count as long ones.
        """
        hops = [Hop(peer_id=timing.peer_id, blocks=timing.blocks) for timing in timings]
        if not hops or not all(router.knows(hop.peer_id) for hop in hops):
            return
        seen = [self[timing.peer_id] for timing in timings]
        expected_s = router.ways_s(hops) + sum(VISIT_S + known.excess_s(now) for known in seen)
        surprise_s = (sum(timing.overhead_s for timing in timings) - expected_s) / len(hops)
        for timing, known in zip(timings, seen, strict=True):
            known.measured(now, block_s=timing.compute_s / len(timing.blocks), surprise_s=surprise_s)

    def trained(self, leg: Leg, num_tokens: int, router: Router, now: float, *, way_s: float) -> None:
        """Some servers have brought so many tokens back.

        What they took together is put down to each by what it should have taken. That is long for a server which is
        busy by what it announces, so that its queue isn't held against it twice.

        Args:
            leg: who did it, and since when.
            num_tokens: of the micro-batch.
            router: which knows what they announce.
            now: the time.
            way_s: to the server that has told it, and back.
        """
        if not all(router.knows(hop.peer_id) for hop in leg.hops):
            return
        took_s = self[leg.hops[0].peer_id].pace.took(now, since=leg.since, way_s=way_s)
        believed_tps = [router.believed_tps(hop.peer_id) for hop in leg.hops]
        due_s = [
            BACK_WORK * num_tokens * len(hop.blocks) / tps for hop, tps in zip(leg.hops, believed_tps, strict=True)
        ]
        for hop, tps, own_s in zip(leg.hops, believed_tps, due_s, strict=True):
            weight = min(1.0, router.usual_tps / tps)
            self[hop.peer_id].pace.worked(now, due_s=own_s, took_s=took_s * own_s / sum(due_s), weight=weight)

    def is_held_up(self, chain: Sequence[Hop], router: Router, now: float) -> bool:
        """Whether the slowest server of a training chain was seen to be much slower than it announces."""
        if not all(router.knows(hop.peer_id) for hop in chain):
            return False
        parts = self.parts(now)

        def tokens_per_s(hop: Hop) -> float:
            return parts.get(hop.peer_id, 1.0) * router.believed_tps(hop.peer_id) / len(hop.blocks)

        return parts.get(min(chain, key=tokens_per_s).peer_id, 1.0) <= 1 / MUCH_QUICKER

    def parts(self, now: float) -> dict[str, float]:
        """How much of their free capacity servers are taken to have for training; all of it if they are missing."""
        return parts({peer_id: known.pace for peer_id, known in self.items()}, now)

    def penalties(self, now: float) -> dict[str, float]:
        """What their failures add to visits, in seconds."""
        return {peer_id: known.penalty_s(now) for peer_id, known in self.items()}

    def forget_faded(self, now: float) -> None:
        """Forget those of whom nothing counts any more."""
        for peer_id in [peer_id for peer_id, known in self.items() if known.has_faded(now)]:
            del self[peer_id]
