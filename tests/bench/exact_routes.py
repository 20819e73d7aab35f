"""The exact cheapest chain in large swarms: dynamic programming over (block, server that runs it), block by block.

    Offers ─► ExactRoutes ─► optimum_s: of all chains       with every way between every two holders of adjacent blocks
                         └─► cost_s: of one chain

Independent of `swarm.route_search` and `swarm.route_map`, whose arguments and cuts (beam, shortlist, few pings per
server) it does without. At 10,000 servers over 126 blocks that is 10^8 ways for each answer.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from swarm.coordinates import Place
from swarm.routing import Offer
from swarm.types import Hop

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class ExactRoutes:
    """Chains over these offers, all of which have a place.

    Args:
        offers: all servers.
        num_blocks: of the model.
    """

    def __init__(self, offers: Sequence[Offer], num_blocks: int):
        places = [offer.location.place for offer in offers]
        self._positions = np.array([it.position for it in places if it is not None])
        self._heights_s = np.array([it.height_s for it in places if it is not None])
        assert len(self._heights_s) == len(offers), "every server needs a place"
        self._index = {offer.peer_id: index for index, offer in enumerate(offers)}
        self._measured_s = _measured(offers)
        first = np.array([offer.blocks.start for offer in offers])
        last = np.array([offer.blocks.end for offer in offers])
        self._holders = [np.flatnonzero((first <= block) & (block < last)) for block in range(num_blocks)]
        self.block_s: Floats = np.array([offer.block_s for offer in offers])
        self.visit_s: Floats = np.array([offer.visit_s for offer in offers])

    def optimum_s(self, home: Place) -> float:
        """What the cheapest chain over all blocks costs a client."""
        client_s = self._client_ways_s(home)
        cost_s = np.full(len(self.block_s), np.inf)
        cost_s[self._holders[0]] = (client_s + self.visit_s)[self._holders[0]]
        for block, holders in enumerate(self._holders):
            if block:
                before = self._holders[block - 1]
                arrival_s = (cost_s[before, None] + self._ways_s(before, holders)).min(axis=0)
                stay_s = cost_s[holders]
                cost_s = np.full(len(self.block_s), np.inf)
                cost_s[holders] = np.minimum(stay_s, arrival_s + self.visit_s[holders])
            cost_s[holders] += self.block_s[holders]
        return float((cost_s + client_s).min())

    def cost_s(self, hops: Sequence[Hop], home: Place) -> float:
        """What one chain costs a client."""
        servers = np.array([self._index[hop.peer_id] for hop in hops])
        client_s = self._client_ways_s(home)
        lengths = np.array([len(hop.blocks) for hop in hops])
        ways_s = sum(self._ways_s(servers[i : i + 1], servers[i + 1 : i + 2])[0, 0] for i in range(len(hops) - 1))
        work_s = (self.visit_s[servers] + self.block_s[servers] * lengths).sum()
        return float(client_s[servers[0]] + ways_s + work_s + client_s[servers[-1]])

    def _client_ways_s(self, home: Place) -> Floats:
        distance_s = np.linalg.norm(self._positions - np.array(home.position), axis=1)
        ways_s: Floats = (distance_s + self._heights_s + home.height_s) / 2
        return ways_s

    def _ways_s(self, senders: Ints, receivers: Ints) -> Floats:
        """[senders, receivers]: as measured, else as places predict."""
        rtt_s: Floats = cdist(self._positions[senders], self._positions[receivers])
        rtt_s += self._heights_s[senders, None] + self._heights_s[receivers]
        measured = self._measured_s[senders][:, receivers].tocoo()
        rtt_s[measured.row, measured.col] = measured.data
        return rtt_s / 2


def _measured(offers: Sequence[Offer]) -> csr_array:
    """Measured round trips; where only one of two has measured it, both know it."""
    index = {offer.location.tag: position for position, offer in enumerate(offers)}
    found = {
        (one, index[tag]): rtt_s
        for one, offer in enumerate(offers)
        for tag, rtt_s in offer.location.pings
        if tag in index
    }
    for (one, other), rtt_s in list(found.items()):
        found.setdefault((other, one), rtt_s)
    rows, columns = np.array(list(found), dtype=np.int64).reshape(-1, 2).T
    return csr_array((list(found.values()), (rows, columns)), shape=(len(offers), len(offers)))
