"""Choose a chain of servers for a range of blocks: beam search over spans, cheapest expected time per token first.

Pure: offers and costs come in, hops go out. It knows nothing of records, pings or the network; the caller turns what it
has announced and measured into `Offer`s.

    offers (who serves what, how fast, how far) --find_route--> ordered hops that cover each block once
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.errors import RouteNotFound
from swarm.session import Hop
from swarm.types import BlockRange, name_ranges

BEAM_WIDTH = 16
"""Partial routes kept per block boundary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one server offers to a route."""

    peer_id: str
    blocks: BlockRange
    block_s: float
    """Seconds to run one token through one block, at present load."""
    hop_s: float
    """Seconds that a visit costs apart from the blocks: network, queue and penalties."""


@dataclass(frozen=True, slots=True)
class _Partial:
    """A route from the first block up to a boundary."""

    cost: float
    hops: tuple[Hop, ...]


def find_route(offers: Sequence[Offer], blocks: BlockRange) -> tuple[Hop, ...]:
    """The cheapest chain over `blocks` that the beam search finds.

    A hop enters its server's span at any block and leaves at its end or where another server's span begins, since no
    other exit can be part of a cheapest route while every server has one speed.

    Raises:
        RouteNotFound: when some blocks are served by nobody; `.missing` names them.
    """
    missing = [block for block in blocks if not any(block in offer.blocks for offer in offers)]
    if missing:
        raise RouteNotFound(f"no server holds blocks {name_ranges(missing)}", missing=missing)
    exits = _exits(offers, blocks)
    beams: dict[int, list[_Partial]] = {blocks.start: [_Partial(0.0, ())]}
    for boundary in sorted({blocks.start} | set(exits)):
        for partial in sorted(beams.pop(boundary, []), key=lambda route: route.cost)[:BEAM_WIDTH]:
            if boundary == blocks.end:
                return partial.hops
            _extend(partial, boundary, offers, exits, beams)
    raise RouteNotFound(f"no chain of servers covers blocks {blocks}", missing=())


def _extend(
    partial: _Partial,
    boundary: int,
    offers: Sequence[Offer],
    exits: Sequence[int],
    beams: dict[int, list[_Partial]],
) -> None:
    previous = partial.hops[-1].peer_id if partial.hops else None
    for offer in offers:
        if boundary not in offer.blocks or offer.peer_id == previous:
            continue
        for end in exits:
            if boundary < end <= offer.blocks.end:
                cost = partial.cost + offer.hop_s + (end - boundary) * offer.block_s
                hop = Hop(peer_id=offer.peer_id, blocks=BlockRange(boundary, end))
                beams.setdefault(end, []).append(_Partial(cost, (*partial.hops, hop)))


def _exits(offers: Sequence[Offer], blocks: BlockRange) -> list[int]:
    edges = {edge for offer in offers for edge in (offer.blocks.start, offer.blocks.end)} | {blocks.end}
    return sorted(edge for edge in edges if blocks.start < edge <= blocks.end)


def route_cost(route: Sequence[Hop], offers: Mapping[str, Offer]) -> float:
    """Expected seconds per token of a route."""
    return sum(offers[hop.peer_id].hop_s + len(hop.blocks) * offers[hop.peer_id].block_s for hop in route)
