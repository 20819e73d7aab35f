"""What a server says of itself in the DHT, from joining to leaving.

    every period ─► Server.renew ─┐
    something has changed ────────┴─► tell ─► the record of now ─► Registry.announce     at its shard of the model
                                          └─ every NAMES_S ──────► catalog               names, for people

Announcements go out one at a time, each made when its turn has come, so that none overtakes a newer one. It does not
know what the server does, nor when that changes.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from swarm.catalog import CATALOG_TTL_S, ModelEntry, announce_model
from swarm.errors import SwarmError
from swarm.network.node import Node
from swarm.registry import TTL_PERIODS, Registry, ServerRecord
from swarm.types import ServerState

logger = logging.getLogger(__name__)

NAMES_S = CATALOG_TTL_S / 3
"""How often the name of the model is told again, which changes never."""


class Announcer:
    """Tells the swarm of one server.

    Args:
        node: stores what is told.
        registry: where records are.
        entry: the model.
        period_s: how often a record is renewed; it is void TTL_PERIODS of them later.
        describe: the server as it is now, for a record that expires at the time given.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        entry: ModelEntry,
        *,
        period_s: float,
        describe: Callable[[float], ServerRecord],
    ):
        self._node, self._registry, self._entry, self._describe = node, registry, entry, describe
        self._ttl_s = TTL_PERIODS * period_s
        self._turn = asyncio.Lock()
        self._named_at = float("-inf")
        self._is_refused = False

    async def tell(self) -> None:
        """Announce the server as it is now. What can't be announced is logged: it will be tried again."""
        async with self._turn:
            try:
                record = self._describe(time.time() + self._ttl_s)
                self._note(record.state, is_refused=not await self._registry.announce(record, self._ttl_s))
                if record.state is not ServerState.OFFLINE and time.monotonic() - self._named_at >= NAMES_S:
                    await self._tell_name()
            except SwarmError as error:
                logger.warning("could not announce this server: %s", error)

    async def _tell_name(self) -> None:
        if await announce_model(self._node, self._entry):
            self._named_at = time.monotonic()
        else:
            logger.info("nobody has taken the name of the model, %s", self._entry.name)

    def _note(self, state: ServerState, *, is_refused: bool) -> None:
        """Say so when the swarm stops to take our records, and when it takes them again."""
        if is_refused and not self._is_refused:
            logger.warning(
                "nobody has taken our record (%s): others don't see this server, or not for long. Its shard of the"
                " table is full, the clock was set back, or no peer answers; it is tried again",
                state.name,
            )
        elif self._is_refused and not is_refused:
            logger.warning("our record is taken again (%s)", state.name)
        self._is_refused = is_refused
