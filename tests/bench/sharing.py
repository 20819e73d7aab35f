"""Clients with a route each, who share servers fairly: what they get together.

crowd: waves of clients ─► spread, over what is free by the announcements of before ─► fair_rates
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.routing import Offer, Route, free_tps
from swarm.types import BlockRange

Floats = NDArray[np.float64]


class Spreads(Protocol):
    """Who draws routes for training."""

    def spread(self, blocks: BlockRange, draws: np.random.Generator, *, num_tokens: int) -> Route:
        """A random one."""


def crowd(
    make_router: Callable[[Sequence[Offer]], Spreads],
    offers: Sequence[Offer],
    num_blocks: int,
    num_clients: int,
    generator: np.random.Generator,
    *,
    num_waves: int,
    num_tokens: int,
) -> Floats:
    """Tokens per second of each client, when all are there.

    Args:
        make_router: who draws the routes, by what servers offer.
        offers: whose `free_tps` is what servers can do when nobody else is there.
        num_blocks: of the model.
        num_clients: who open one route each, and train without a pause.
        generator: of their routes.
        num_waves: in which they come: each sees what servers announced after the one before.
        num_tokens: of a batch.
    """
    capacities = np.array([offer.free_tps for offer in offers])
    index = {offer.peer_id: number for number, offer in enumerate(offers)}
    work, used, rates = np.zeros((num_clients, len(offers))), np.zeros(len(offers)), np.zeros(0)
    for wave in np.array_split(np.arange(num_clients), min(num_waves, num_clients)):
        load = used / capacities
        free = [free_tps(offer.free_tps, float(part)) for offer, part in zip(offers, load, strict=True)]
        router = make_router([replace(offer, free_tps=tps) for offer, tps in zip(offers, free, strict=True)])
        for client in wave:
            for hop in router.spread(BlockRange(0, num_blocks), generator, num_tokens=num_tokens).hops:
                work[client, index[hop.peer_id]] += len(hop.blocks)
        rates = fair_rates(work[: wave[-1] + 1], capacities)
        used = rates @ work[: wave[-1] + 1]
    return rates


def fair_rates(work: Floats, capacities: Floats) -> Floats:
    """Tokens per second of each client: the slowest is as fast as can be, then the next, and so on.

    Args:
        work: [clients, servers] blocks that a token of each client takes at each server.
        capacities: block tokens per second of the servers.
    """
    rates, is_open, left = np.zeros(len(work)), np.ones(len(work), dtype=bool), capacities.copy()
    while is_open.any():
        wanted = work[is_open].sum(axis=0)
        step = (left[wanted > 0] / wanted[wanted > 0]).min()
        rates[is_open] += step
        left = left - step * wanted
        is_full = left <= 1e-9 * capacities
        is_open &= ~work[:, is_full].any(axis=1)
    return rates
