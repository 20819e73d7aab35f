"""Routes over servers that are there: records outlive their servers, so whoever is not heard is asked first.

find ─► route ─ ask ─► all answer: the route          gone: RouteNotFound, where nobody else has the blocks
  ▲                └─► silent: not over these ─┐
  └────────────────────────────────────────────┘

Knows nothing of records, of costs, and of how servers are asked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from swarm.errors import PeerDisconnected, PeerError, PeerUnreachable, RelaysBusy, RouteNotFound
from swarm.routing import Route
from swarm.types import Hop, name_ranges

SLOW_S = 1e9
"""Cost of a server that has not answered in time: more than any chain without it ..."""
GONE_S = 1e12
"""... and of one that is not there."""

Find = Callable[[Mapping[str, float]], Route]
"""Finds the best route, with what visits of some servers cost besides, in seconds."""
ASK_S = 8.0
"""For so long servers are asked; then a route is handed out over whom nobody has heard of."""
Ask = Callable[[Collection[str]], Awaitable[dict[str, PeerError]]]
"""Asks servers whether they are there; those that don't answer, and why."""


async def over_present(
    find: Find, ask: Ask, silent: dict[str, float] | None = None, *, ask_s: float = ASK_S
) -> tuple[Hop, ...]:
    """The best route whose servers are there; none is asked twice.

    One that is only slow to answer is handed out where it is the only one: a session gives it longer to open.

    Args:
        find: finds routes.
        ask: asks servers.
        silent: what those cost that were asked before, in vain; others are added.
        ask_s: for how long to go on asking.

    Raises:
        RouteNotFound: blocks are missing, or all who say that they have them are gone.
    """
    silent = {} if silent is None else silent
    loop = asyncio.get_running_loop()
    asked, until = set(silent), loop.time() + ask_s
    while True:
        hops = find(silent).hops
        unasked = {hop.peer_id for hop in hops} - asked
        errors = await ask(unasked) if unasked and loop.time() < until else {}
        if not errors:
            break
        asked |= unasked
        silent |= {peer_id: GONE_S if _is_gone(error) else SLOW_S for peer_id, error in errors.items()}
    missing = [block for hop in hops if silent.get(hop.peer_id) == GONE_S for block in hop.blocks]
    if missing:
        raise RouteNotFound(f"all servers of blocks {name_ranges(missing)} are gone", missing=missing)
    return hops


def _is_gone(error: PeerError) -> bool:
    return isinstance(error, PeerUnreachable | PeerDisconnected) and not isinstance(error, RelaysBusy)
