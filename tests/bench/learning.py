"""Clients who train for a while over servers of which some lie: what they get together, as they learn.

    runs: chains drawn by claims ─► fair_rates, of what servers really are ─► times on the way back ─► Observed
              ▲                                                                                           │
              └───────────── a new run, or a chain that is much quicker ◄─────────────────────────────────┘

The rules are those of the client (`client.observed`, `client.pace`, `swarm.routing`); what is simulated is time, and
servers that share theirs between those who use them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from swarm.client.observed import BACK_WORK, MUCH_QUICKER, Observed
from swarm.client.way_back import Leg
from swarm.flow import EvenDraws
from swarm.routing import Offer, Router
from swarm.types import BlockRange, Hop
from tests.bench.sharing import Floats, fair_rates

STEP_S = 30.0
"""Between two looks at what clients have learnt; they may leave their chains then."""


@dataclass(kw_only=True)
class Client:
    """One that trains all the time, one run after the other."""

    draws: EvenDraws
    observed: Observed = field(default_factory=Observed)
    chain: tuple[Hop, ...] = ()
    router: Router | None = None
    """By which its chain was drawn."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What became of it."""

    rates: Floats
    """Tokens per second of all clients together, step by step."""
    liars: Floats
    """Part of all hops that lead over liars, step by step."""
    num_moves: int
    """Chains that were left for quicker ones."""
    num_wronged: float
    """Honest servers that a client takes for slow, on average at the end."""


def learn(
    offers: Sequence[Offer],
    boasts: Floats,
    num_blocks: int,
    *,
    num_clients: int,
    seconds: float,
    run_s: float,
    num_tokens: int,
    generator: np.random.Generator,
    learns: bool,
) -> Learnt:
    """Let clients train.

    Args:
        offers: what servers really are.
        boasts: by what factor they announce more.
        num_blocks: of the model.
        num_clients: who train.
        seconds: for so long.
        run_s: mean length of a run; then the next begins, on another chain.
        num_tokens: of a batch.
        generator: of randomness.
        learns: whether clients make anything of the times that they measure.
    """
    claims = [replace(it, free_tps=it.free_tps * boast) for it, boast in zip(offers, boasts, strict=True)]
    index = {offer.peer_id: number for number, offer in enumerate(offers)}
    capacities, blocks = np.array([offer.free_tps for offer in offers]), BlockRange(0, num_blocks)
    clients = [Client(draws=EvenDraws(generator)) for _ in range(num_clients)]
    rates_then, liars_then, num_moves, now = [], [], 0, 0.0

    def draw(client: Client) -> tuple[Router, tuple[Hop, ...]]:
        router = Router(claims, parts=client.observed.parts(now))
        return router, router.spread(blocks, client.draws, num_tokens=num_tokens).hops

    while now < seconds:
        for client in clients:
            if not client.chain or generator.random() < STEP_S / run_s:
                client.router, client.chain = draw(client)
            elif client.router is not None and client.observed.is_held_up(client.chain, client.router, now):
                router, chain = draw(client)
                if router.throughput_tps(chain) >= MUCH_QUICKER * router.throughput_tps(client.chain):
                    client.router, client.chain = router, chain
                    num_moves += 1
        work = np.zeros((num_clients, len(offers)))
        for number, client in enumerate(clients):
            for hop in client.chain:
                work[number, index[hop.peer_id]] += len(hop.blocks)
        rates = fair_rates(work, capacities)
        now += STEP_S
        if learns:
            _observe(clients, index, capacities, rates[:, None] * work, now)
        rates_then.append(rates.sum())
        hops = [hop.peer_id for client in clients for hop in client.chain]
        liars_then.append(np.mean([boasts[index[peer_id]] > 1.0 for peer_id in hops]))
    wronged = [sum(boasts[index[it]] == 1.0 for it in client.observed.parts(now)) for client in clients]
    return Learnt(
        rates=np.array(rates_then), liars=np.array(liars_then), num_moves=num_moves,
        num_wronged=float(np.mean(wronged)),
    )  # fmt: skip


def _observe(clients: Sequence[Client], index: dict[str, int], capacities: Floats, used: Floats, now: float) -> None:
    """Each client sees how long each server has worked for it: with what others left it, or its fair share."""
    others = used.sum(axis=0) - used
    for number, client in enumerate(clients):
        assert client.router is not None
        for hop in client.chain:
            server = index[hop.peer_id]
            speed = max(capacities[server] - others[number, server], used[number, server])
            num_tokens = used[number, server] / len(hop.blocks) * STEP_S / BACK_WORK
            leg = Leg(hops=(hop,), since=now - STEP_S * used[number, server] / speed)
            client.observed.trained(leg, round(num_tokens), client.router, now, way_s=0.0)
