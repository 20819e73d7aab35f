"""Random swarms over a world of towns, and the exact cheapest chain through them, by dynamic programming.

The optimum is found over (block, server that runs it), with every way between every pair, and without any of the
arguments that the search in `swarm.route_search` rests on.
"""

import math

import numpy as np

from swarm.coordinates import Place, round_trip_s
from swarm.route_map import UNKNOWN_RTT_S, Location
from swarm.routing import Offer
from swarm.types import BlockRange


def random_offers(
    generator: np.random.Generator, num_servers: int, num_blocks: int, *, mean_length: float, num_towns: int = 12
) -> tuple[list[Offer], Place]:
    """Servers of different speeds and spans in some towns, and the place of a client in one of them.

    Every block is served. Each server has measured up to 8 others, which it predicts with an error of about 10 %.
    """
    towns = generator.uniform(0.0, 0.08, (num_towns, 3))
    spans = [_random_span(generator, num_blocks, mean_length) for _ in range(num_servers)]
    for block in set(range(num_blocks)).difference(*map(set, spans)):
        chosen = generator.integers(num_servers)
        spans[chosen] = BlockRange(min(spans[chosen].start, block), max(spans[chosen].end, block + 1))
    places = [_place_in(generator, towns) for _ in range(num_servers)]
    offers = []
    for index in range(num_servers):
        others = {int(other) for other in generator.integers(num_servers, size=8)} - {index}
        pings = [
            (other, round_trip_s(places[index], places[other]) * generator.lognormal(0.0, 0.1)) for other in others
        ]
        offers.append(
            Offer(
                peer_id=f"p{index}",
                blocks=spans[index],
                block_s=float(np.exp(generator.uniform(math.log(0.0004), math.log(0.008)))),
                visit_s=float(0.001 + generator.exponential(0.003)),
                free_tps=float(np.exp(generator.uniform(math.log(50), math.log(2000)))),
                location=Location(place=places[index], tag=index, pings=pings),
            )
        )
    return offers, _place_in(generator, towns)


def optimum_s(offers: list[Offer], home: Place | None, blocks: BlockRange) -> float:
    """The exact cheapest cost per token."""
    client = np.array([_client_way_s(offer, home) for offer in offers])
    ways = _ways_s(offers)
    block_s = np.array([offer.block_s for offer in offers])
    visit_s = np.array([offer.visit_s for offer in offers])
    cost_s = client + visit_s
    for block in blocks:
        if block > blocks.start:
            cost_s = np.minimum(cost_s, (cost_s[:, None] + ways).min(axis=0) + visit_s)
        holds = np.array([block in offer.blocks for offer in offers])
        cost_s = np.where(holds, cost_s + block_s, math.inf)
    return float((cost_s + client).min())


def _ways_s(offers: list[Offer]) -> np.ndarray:
    ways = np.array([[_way_s(one, other) for other in offers] for one in offers])
    by_tag = {offer.location.tag: index for index, offer in enumerate(offers)}
    for index, offer in enumerate(offers):
        for tag, rtt_s in offer.location.pings:
            if tag in by_tag:
                ways[index, by_tag[tag]] = rtt_s / 2
                if offer.location.tag not in dict(offers[by_tag[tag]].location.pings):
                    ways[by_tag[tag], index] = rtt_s / 2
    np.fill_diagonal(ways, math.inf)
    return ways


def _way_s(one: Offer, other: Offer) -> float:
    if one.location.place is None or other.location.place is None:
        return UNKNOWN_RTT_S / 2
    return round_trip_s(one.location.place, other.location.place) / 2


def _client_way_s(offer: Offer, home: Place | None) -> float:
    if offer.location.client_rtt_s is not None:
        return offer.location.client_rtt_s / 2
    if home is None or offer.location.place is None:
        return UNKNOWN_RTT_S / 2
    return round_trip_s(offer.location.place, home) / 2


def _random_span(generator: np.random.Generator, num_blocks: int, mean_length: float) -> BlockRange:
    length = int(min(num_blocks, 1 + generator.poisson(mean_length - 1)))
    start = int(generator.integers(0, num_blocks - length + 1))
    return BlockRange(start, start + length)


def _place_in(generator: np.random.Generator, towns: np.ndarray) -> Place:
    position = towns[generator.integers(len(towns))] + generator.normal(0.0, 0.002, 3)
    return Place(position=tuple(map(float, position)), height_s=float(0.001 + generator.exponential(0.003)), error=0.1)
