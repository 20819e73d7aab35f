"""Routes over servers that are there: records outlive their servers, so whoever is not heard is asked first.

find ─► route ─ ask ─► all answer: the route          gone: RouteNotFound, where nobody else has the blocks
  ▲                └─► silent: not over these ─┐
  └────────────────────────────────────────────┘

Knows nothing of records, of costs, and of how servers are asked.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping

from swarm.errors import PeerDisconnected, PeerError, PeerUnreachable, RouteNotFound
from swarm.routing import Route
from swarm.session import Hop
from swarm.types import name_ranges

SLOW_S = 1e6
"""Cost of a server that has not answered in time: more than any chain without it ..."""
GONE_S = 1e9
"""... and of one that is not there."""

Find = Callable[[Mapping[str, float]], Route]
"""Finds the best route, with what visits of some servers cost besides, in seconds."""
Ask = Callable[[Collection[str]], Awaitable[dict[str, PeerError]]]
"""Asks servers whether they are there; those that don't answer, and why."""


async def over_present(find: Find, ask: Ask) -> tuple[Hop, ...]:
    """The best route whose servers are there; none is asked twice.

    One that is only slow to answer is handed out where it is the only one: a session gives it longer to open.

    Raises:
        RouteNotFound: blocks are missing, or all who say that they have them are gone.
    """
    asked: set[str] = set()
    silent: dict[str, float] = {}
    while True:
        hops = find(silent).hops
        unasked = {hop.peer_id for hop in hops} - asked
        errors = await ask(unasked)
        if not errors:
            break
        asked |= unasked
        silent |= {peer_id: GONE_S if _is_gone(error) else SLOW_S for peer_id, error in errors.items()}
    missing = [block for hop in hops if silent.get(hop.peer_id) == GONE_S for block in hop.blocks]
    if missing:
        raise RouteNotFound(f"all servers of blocks {name_ranges(missing)} are gone", missing=missing)
    return hops


def _is_gone(error: PeerError) -> bool:
    return isinstance(error, PeerUnreachable | PeerDisconnected)
