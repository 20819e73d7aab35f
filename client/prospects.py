"""What a chain of servers is expected to take, and what it would take with another server in one place. Pure.

    Router: records, pings, what was measured ─► the present chain ──────────┐
               └─► replacements, hop by hop ─► as slow as others turned out ─┴─► Outlook ─► `swarm.client.betterment`

Both are priced by the same router at the same moment, for what one price has wrong the other has wrong, too. In one
thing they differ: of the servers in use is known what they take, of others what they say. So a server that was never
measured is taken to exceed its word at least as much as every other one that was. But where more goes missing than is
explained, something is wrong with a server, and which one it is a single chain can't tell: no more than that is
expected of a new one. Of the present chain counts neither room, since the session has its own, nor failures: who fails
is replaced, which is not done here. Only servers that compute in the same format come into question: nobody's answer
shall change for the sake of speed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from swarm.routing import Need, Replacement, Router
from swarm.types import Hop

NUM_COMPARED = 32
"""Servers that are looked at for each hop, the quickest by the router's price."""
USUAL_SLOWNESS = 3.0
"""So many times what they say sound servers need, at most, where other work is on the machine as well."""
MAX_SLOWNESS = 10.0
"""So many times what they say, at most, servers that were never measured are taken to need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How a server that was measured lately compares with what it says."""

    slowness: float
    """Seconds per block as measured, over those by its record."""
    excess_s: float
    """What its visits take beyond all that was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """A change of one server."""

    hop: Hop
    """In the present chain."""
    target: Hop
    """The other server, of the same blocks."""
    predicted_s: float
    """Expected seconds per token of the whole chain then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What was expected of a chain at one moment."""

    version: int
    """Of the records that this is based on."""
    predicted_s: float
    """Expected seconds per token of the chain as it is."""
    prospects: tuple[Prospect, ...]
    """The best changes of each of its hops."""


def look_ahead(
    router: Router,
    chain: Sequence[Hop],
    *,
    version: int,
    need: Need,
    penalties: Mapping[str, float],
    seen: Mapping[str, Seen],
    format_of: Callable[[str], tuple[str, str] | None],
    without_push: Collection[tuple[str, str]] = (),
) -> Outlook | None:
    """Compare a chain with those that differ from it in one server; None where not all of its servers are known.

    Args:
        router: over the latest records, and what was measured.
        chain: all hops from the client and back.
        version: of the records.
        need: of the session, where it comes to.
        penalties: seconds that visits of some servers cost in addition, if the session goes there.
        seen: the servers that were measured lately.
        format_of: dtype and quantization of a server.
        without_push: pairs of servers that can't reach each other.
    """
    if not chain or not all(router.knows(hop.peer_id) for hop in chain):
        return None
    prospects = []
    for index, hop in enumerate(chain):
        others = [it for peer_id, it in seen.items() if peer_id != hop.peer_id]
        if not others and (own := seen.get(hop.peer_id)) is not None:
            others = [_usual(own)]
        neighbours = _neighbours(chain, index)
        hidden_s = sum(seen[it.peer_id].excess_s for it in chain if it != hop and it.peer_id in seen)
        for found in router.replacements(chain, index, need=need, penalties=penalties, limit=NUM_COMPARED):
            peer_id = found.hop.peer_id
            if format_of(peer_id) != format_of(hop.peer_id):
                continue
            if any((a or peer_id, b or peer_id) in without_push for a, b in neighbours):
                continue
            explained_s = max(0.0, found.cost_s - hidden_s)
            predicted_s = found.cost_s + _doubt_s(found, seen.get(peer_id), others, explained_s)
            prospects.append(Prospect(hop=hop, target=found.hop, predicted_s=predicted_s))
    return Outlook(version=version, predicted_s=router.cost_s(chain), prospects=tuple(prospects))


def _neighbours(chain: Sequence[Hop], index: int) -> list[tuple[str, str]]:
    """Who sends to whom around a hop; "" stands for its server."""
    pairs = [(chain[index - 1].peer_id, "")] if index else []
    return pairs + ([("", chain[index + 1].peer_id)] if index + 1 < len(chain) else [])


def _usual(own: Seen) -> Seen:
    """What is expected of others where nobody but the server in use was measured: that they are like it.

    But not as slow as it may have become: beyond USUAL_SLOWNESS something is wrong with it.
    """
    return Seen(slowness=min(own.slowness, USUAL_SLOWNESS), excess_s=own.excess_s)


def _doubt_s(found: Replacement, seen: Seen | None, others: Sequence[Seen], explained_s: float) -> float:
    """What a server may take beyond its word, by what others have taken; nothing where it was measured itself.

    Args:
        found: the server, in the place of another one.
        seen: how it compares.
        others: how others compare.
        explained_s: what the whole chain takes, but for what goes missing.
    """
    if seen is not None or not others:
        return 0.0
    slowness = min(it.slowness for it in others)
    slow_s = found.blocks_s * (min(max(slowness, 1.0), MAX_SLOWNESS) - 1.0)
    return slow_s + min(explained_s, *(it.excess_s for it in others))
