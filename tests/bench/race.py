"""Training routes drawn each for itself, as they were at first: the cheapest chain over random times.

Every server draws an exponential time for the batch, divided by its free capacity; among servers of the same blocks the
quickest is each of them by its part of the capacity. By dynamic programming over blocks; what is compared with.
"""

from collections.abc import Sequence

import numpy as np

from swarm.route_map import UNKNOWN_RTT_S
from swarm.routing import Offer, Route
from swarm.types import BlockRange, Hop


class RaceRouter:
    """Like `swarm.routing.Router`, for offers whose places are not known.

    Args:
        offers: all servers.
    """

    def __init__(self, offers: Sequence[Offer]):
        self._offers = offers
        self._first, self._last = np.array([(it.blocks.start, it.blocks.end) for it in offers]).T
        self._visit_s = np.array([it.visit_s + UNKNOWN_RTT_S for it in offers])
        self._free_tps = np.array([it.free_tps for it in offers])

    def spread(self, blocks: BlockRange, draws: np.random.Generator, *, num_tokens: int) -> Route:
        """A random chain over blocks that are all held by somebody."""
        block_s = draws.exponential(size=len(self._offers)) * num_tokens / self._free_tps
        cost_s, enters, senders = np.full(len(block_s), np.inf), {}, {}
        best_s = 0.0
        for block in blocks:
            enters[block] = best_s + self._visit_s < cost_s
            cost_s = np.minimum(cost_s, best_s + self._visit_s) + block_s
            cost_s[(self._first > block) | (self._last <= block)] = np.inf
            best_s, senders[block + 1] = float(cost_s.min()), int(cost_s.argmin())
        hops, end = [], blocks.end
        server = senders[end]
        for block in reversed(range(blocks.start, blocks.end)):
            if enters[block][server]:
                hops.append(Hop(peer_id=self._offers[server].peer_id, blocks=BlockRange(block, end)))
                end, server = block, senders.get(block, -1)
        return Route(hops=tuple(reversed(hops)), cost_s=best_s)
