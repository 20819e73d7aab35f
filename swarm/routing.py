"""Choose a chain of servers for a range of blocks.

    fastest  for decoding: the least expected seconds per token    ways, queues, blocks at present load, soft costs
    spread   for training: at random, so that all routes together load servers as far as their free capacity goes
    replacements  for a live session: the chain that it has, with another server in the place of one

    Offers (what each server says, and what was measured of it) ─► Router ─► Route: hops that cover each block once

Nobody is excluded: failures, missing room, adapters that have to be brought and relays cost time, so that a bad server
is still used where it is the only one. Pure: it knows nothing of records, pings or the clock; the caller turns what was
announced and measured into `Offer`s. The search itself is `swarm.route_search`; `swarm.flow` spreads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from swarm.coordinates import Place
from swarm.errors import RouteNotFound
from swarm.flow import Flow
from swarm.route_map import ChainWays, Location, PeerMap
from swarm.route_search import Costs, Floats, Ints, Spans, cheapest
from swarm.shares import MAX_MEDIANS
from swarm.types import BlockRange, Hop, name_ranges

VISIT_S = 0.001
"""What a server does with a step besides its blocks: reading, queueing and sending, on an idle one."""
RELAY_S = 0.02
"""What a relay adds to every visit, besides its way."""
NO_ROOM_S = 1.0
"""What waiting for room in a full cache costs each token, about."""
MIN_FREE = 0.05
"""The part of its capacity that a busy server still has for others: it shares."""
MIN_FREE_TPS = 1e-3
"""Capacity that any server is taken to have: nobody is excluded."""
MAX_BATCH_S = 3.0
"""What a batch is taken to need at a server at most, so that failures count in slow swarms, too."""


_NOWHERE = Location()


class Draws(Protocol):
    """A source of numbers."""

    def random(self) -> float:
        """The next one, from 0 to below 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one server offers to a route.

    Attributes:
        peer_id: who it is.
        blocks: what it serves.
        block_s: seconds to run one token through one block, at present load.
        visit_s: seconds that a visit costs apart from blocks, ways and the soft costs below.
        free_tps: block tokens per second that it could do beside what it does now.
        location: where it is in the network.
        kv_free_tokens: room in its cache; None if unknown.
        is_relayed: whether it is reached through a relay.
    """

    peer_id: str
    blocks: BlockRange
    block_s: float
    visit_s: float = VISIT_S
    free_tps: float = 0.0
    location: Location = _NOWHERE
    kv_free_tokens: int | None = None
    is_relayed: bool = False


def free_tps(capacity_tps: float, load: float) -> float:
    """What a server can do for somebody new: what is free, or the share that a busy one gives to whoever comes.

    Args:
        capacity_tps: block tokens per second.
        load: part of it that is in use.
    """
    return capacity_tps * max(1.0 - load, MIN_FREE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a session needs of its servers."""

    kv_tokens: int = 0
    """Room in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A chain of servers."""

    hops: tuple[Hop, ...]
    cost_s: float
    """Expected seconds per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """Another server in the place of one hop of a chain."""

    hop: Hop
    cost_s: float
    """Expected seconds per token of the whole chain then ..."""
    blocks_s: float
    """... and what of that the other server's blocks take."""


class Router:
    """Finds routes among fixed offers; making one takes longer than asking it.

    Args:
        offers: all servers.
        home: where the client is; None if unknown.
        parts: of their free capacity that servers were seen to have, 0 to 1, where that is not all.
    """

    def __init__(self, offers: Sequence[Offer], home: Place | None = None, *, parts: Mapping[str, float] | None = None):
        self._offers = tuple(offers)
        self._index = {offer.peer_id: index for index, offer in enumerate(offers)}
        self._spans = Spans(_ints(it.blocks.start for it in offers), _ints(it.blocks.end for it in offers))
        visit_s = _floats(it.visit_s + RELAY_S * it.is_relayed for it in offers)
        self._costs = Costs(block_s=_floats(it.block_s for it in offers), visit_s=visit_s)
        self._believed_tps = _believable(np.maximum(_floats(it.free_tps for it in offers), MIN_FREE_TPS))
        self._free_tps = self._believed_tps.copy()
        for peer_id, part in (parts or {}).items():
            if (index := self._index.get(peer_id)) is not None:
                self._free_tps[index] *= part
        self._room = _floats(np.inf if it.kv_free_tokens is None else it.kv_free_tokens for it in offers)
        self._map = PeerMap([it.location for it in offers], home)
        self._entries = self._spans.shortlists(self._costs, self._map.position)
        self._flows: dict[tuple[BlockRange, int], tuple[Ints, float, Flow]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def fastest(
        self,
        blocks: BlockRange,
        *,
        need: Need | None = None,
        penalties: Mapping[str, float] | None = None,
        after: str | None = None,
        before: str | None = None,
    ) -> Route:
        """The chain of the least expected time per token, as far as the beam search finds it.

        Args:
            blocks: to be covered.
            need: of the session.
            penalties: seconds that visits of some peers cost in addition, for failures or adapters to be brought.
            after: the server that has the inputs, where it is not the client.
            before: the server that wants the outputs, where it is not the client.

        Raises:
            RouteNotFound: when some blocks are served by nobody; `.missing` names them.
        """
        self._refuse_gaps(blocks)
        costs = Costs(block_s=self._costs.block_s, visit_s=self._visits(need, penalties))
        ways = ChainWays(self._map, self._index.get(after or ""), self._index.get(before or ""))
        cost_s, hops = cheapest(self._spans, costs, ways, self._entries, blocks)
        return Route(hops=self._hops(hops, blocks), cost_s=cost_s)

    def spread(
        self,
        blocks: BlockRange,
        draws: Draws,
        *,
        num_tokens: int,
        need: Need | None = None,
        penalties: Mapping[str, float] | None = None,
    ) -> Route:
        """A random chain for training; many of them together load servers by the capacity that they have free.

        A far server counts with what a batch gets of it if the detour over the nearest one is added to its work: small
        batches stay near, large ones go everywhere. Chains have as few hops as that takes. The first one takes much
        longer than others over the same blocks, for which servers are balanced once.

        Args:
            blocks: to be covered.
            draws: the source of randomness.
            num_tokens: in the batch.
            need: of the session.
            penalties: seconds that visits of some peers cost in addition.

        Raises:
            RouteNotFound: when some blocks are served by nobody; `.missing` names them.
        """
        self.balance(blocks, num_tokens=num_tokens)
        servers, batch_s, flow = self._flows[blocks, num_tokens]
        soft_s = self._visits(need, penalties)[servers] - self._costs.visit_s[servers]
        if soft_s.any():
            flow = flow.avoiding(soft_s / batch_s)
        hops = self._hops([(int(servers[it]), blocks.start + at) for it, at in flow.chain(draws.random())], blocks)
        return Route(hops=hops, cost_s=self.cost_s(hops, need=need, penalties=penalties))

    def balance(self, blocks: BlockRange, *, num_tokens: int) -> None:
        """Do what makes the first chain of `spread` take long; in a thread, if wanted, while others look for routes.

        Raises:
            RouteNotFound: as `spread`.
        """
        self._refuse_gaps(blocks)
        if (blocks, num_tokens) not in self._flows:
            self._flows[blocks, num_tokens] = self._flow(blocks, num_tokens)

    def _flow(self, blocks: BlockRange, num_tokens: int) -> tuple[Ints, float, Flow]:
        """Those who hold any of the blocks, how long a batch takes at them, about, and chains over them."""
        servers = np.flatnonzero((self._spans.first < blocks.end) & (self._spans.last > blocks.start))
        servers = servers[self._map.neighbourly(servers)]
        first = np.maximum(self._spans.first[servers], blocks.start) - blocks.start
        last = np.minimum(self._spans.last[servers], blocks.end) - blocks.start
        work_s = (last - first) * num_tokens / self._free_tps[servers]
        visit_s = self._costs.visit_s[servers] + self._map.client_rtt_s[servers]
        batch_tps = self._free_tps[servers] * work_s / (work_s + visit_s - visit_s.min())
        return servers, min(float(np.median(work_s)), MAX_BATCH_S), Flow.balanced(first, last, batch_tps, len(blocks))

    def cost_s(
        self, hops: Sequence[Hop], *, need: Need | None = None, penalties: Mapping[str, float] | None = None
    ) -> float:
        """Expected seconds per token of a chain over these offers, from the client and back."""
        servers = _ints(self._index[hop.peer_id] for hop in hops)
        lengths = _ints(len(hop.blocks) for hop in hops)
        work_s = self._visits(need, penalties)[servers] + self._costs.block_s[servers] * lengths
        return self.ways_s(hops) + float(work_s.sum())

    def replacements(
        self,
        hops: Sequence[Hop],
        index: int,
        *,
        need: Need | None = None,
        penalties: Mapping[str, float] | None = None,
        limit: int = 8,
    ) -> list[Replacement]:
        """The best servers that could take the place of one in a chain over these offers, the cheapest first.

        Args:
            hops: the chain, from the client and back to it.
            index: which hop's blocks another server is to run; the rest of the chain stays.
            need: of the session; who has less room is left out.
            penalties: as in `fastest`.
            limit: at most so many.
        """
        chain, blocks = _ints(self._index[hop.peer_id] for hop in hops), hops[index].blocks
        fits = (self._spans.first <= blocks.start) & (self._spans.last >= blocks.end)
        if need is not None:
            fits &= self._room >= need.kv_tokens
        fits[chain] = False
        servers = np.flatnonzero(fits)
        sender = self._index[hops[index - 1].peer_id] if index else None
        receiver = self._index[hops[index + 1].peer_id] if index + 1 < len(hops) else None
        ways = ChainWays(self._map, sender, receiver)
        own_s = self._visits(None, penalties)[servers] + self._costs.block_s[servers] * len(blocks)
        own_s += ways.from_start(servers) + ways.to_end(servers)
        rest_s = self.cost_s(hops) - self._share_s(hops, index, ways)
        best = np.argsort(own_s, kind="stable")[:limit]
        return [
            Replacement(
                hop=Hop(peer_id=self._offers[server].peer_id, blocks=blocks),
                cost_s=rest_s + float(cost_s),
                blocks_s=self._offers[server].block_s * len(blocks),
            )
            for server, cost_s in zip(servers[best], own_s[best], strict=True)
        ]

    def _share_s(self, hops: Sequence[Hop], index: int, ways: ChainWays) -> float:
        """What one hop contributes to its chain's cost: its visit, its blocks, the ways to and from it."""
        server = _ints([self._index[hops[index].peer_id]])
        work_s = self._costs.visit_s[server] + self._costs.block_s[server] * len(hops[index].blocks)
        return float((work_s + ways.from_start(server) + ways.to_end(server))[0])

    def ways_s(self, hops: Sequence[Hop]) -> float:
        """Seconds that a token is under way from the client through these servers and back."""
        servers = _ints(self._index[hop.peer_id] for hop in hops)
        ways = ChainWays(self._map, None, None)
        inner_s = [ways.between(servers[i : i + 1], servers[i + 1 : i + 2])[0, 0] for i in range(len(hops) - 1)]
        return float(sum(inner_s) + ways.from_start(servers[:1])[0] + ways.to_end(servers[-1:])[0])

    def knows(self, peer_id: str) -> bool:
        """Whether this server made an offer."""
        return peer_id in self._index

    def believed_tps(self, peer_id: str) -> float:
        """The free capacity of a server by what it announces, as far as that is believed, whatever was seen of it."""
        return float(self._believed_tps[self._index[peer_id]])

    @cached_property
    def usual_tps(self) -> float:
        """The same of half of the servers at least."""
        return float(np.median(self._believed_tps))

    def throughput_tps(self, hops: Sequence[Hop]) -> float:
        """Tokens per second of many batches through a chain: what its slowest server can do, by all that is known."""
        return min(float(self._free_tps[self._index[hop.peer_id]]) / len(hop.blocks) for hop in hops)

    def _visits(self, need: Need | None, penalties: Mapping[str, float] | None) -> Floats:
        """The cost of visiting each server, soft costs included."""
        visit_s = self._costs.visit_s.copy()
        if need is not None:
            visit_s += NO_ROOM_S * (self._room < need.kv_tokens)
        for peer_id, seconds in (penalties or {}).items():
            if (index := self._index.get(peer_id)) is not None:
                visit_s[index] += seconds
        return visit_s

    def _hops(self, hops: Sequence[tuple[int, int]], blocks: BlockRange) -> tuple[Hop, ...]:
        ends = [entry for _, entry in hops[1:]] + [blocks.end]
        return tuple(
            Hop(peer_id=self._offers[server].peer_id, blocks=BlockRange(entry, end))
            for (server, entry), end in zip(hops, ends, strict=True)
        )

    def _refuse_gaps(self, blocks: BlockRange) -> None:
        if missing := self._spans.missing(blocks):
            raise RouteNotFound(f"no server holds blocks {name_ranges(missing)}", missing=missing)


def _believable(capacities: Floats) -> Floats:
    """Capacities as announced, cut to a multiple of their median: who boasts draws no more than a good server does."""
    return np.minimum(capacities, MAX_MEDIANS * np.median(capacities)) if len(capacities) else capacities


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
