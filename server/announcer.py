"""What a server says of itself in the DHT, from joining to leaving.

    every period ─► renew: the server looks around ─┐
    something has changed ──────────────────────────┴─► tell ─► the record of now ─► Registry.announce
    the end ─► tell_last                                  └─ every NAMES_S ────────► catalog: names, for people

Announcements go out one at a time, each made when its turn has come, so that none overtakes a newer one. It does not
know what the server does, nor when that changes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from swarm.catalog import CATALOG_TTL_S, ModelEntry, announce_model
from swarm.errors import SwarmError
from swarm.network.node import Node
from swarm.network.tasks import TaskSet
from swarm.registry import TTL_PERIODS, Registry, ServerRecord
from swarm.types import ServerState

logger = logging.getLogger(__name__)

NAMES_S = CATALOG_TTL_S / 3
"""How often the name of the model is told again, which changes never."""
LAST_TIMEOUT_S = 2.0
"""How long the last announcement may take; the record expires anyway."""


class Announcer:
    """Tells the swarm of one server.

    Args:
        node: stores what is told.
        registry: where records are.
        entry: the model.
        period_s: how often a record is renewed; it is void TTL_PERIODS of them later.
        describe: the server as it is now, for a record that expires at the time given.
        renew: called every period from the first announcement on; it is to end in `tell`.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        entry: ModelEntry,
        *,
        period_s: float,
        describe: Callable[[float], ServerRecord],
        renew: Callable[[], Coroutine[Any, Any, None]],
    ):
        self._node, self._registry, self._entry = node, registry, entry
        self._describe, self._renew = describe, renew
        self._period_s, self._ttl_s = period_s, TTL_PERIODS * period_s
        self._turn = asyncio.Lock()
        self._named_at = float("-inf")
        self._is_refused = self._has_changed = self._is_over = False
        self._tasks = TaskSet()
        self._renewing: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def tell(self) -> None:
        """Announce the server as it is now. What can't be announced is logged: it will be tried again."""
        await self._tell()
        if self._renewing is None and not self._is_over:
            self._renewing = self._tasks.spawn(self._keep_renewed(), name="announce")

    def renew_beside(self) -> asyncio.Task[None]:
        """Begin to renew the record before its time; if that fails it is logged, and another one comes."""
        return self._tasks.spawn(self._renew(), name="renewal")

    def tell_beside(self) -> None:
        """Begin to announce what has just changed, again and again until what was announced is so."""
        self._has_changed = True
        if not self._is_over and (self._telling is None or self._telling.done()):
            self._telling = self._tasks.spawn(self._tell_changes(), name="announce a change")

    async def tell_last(self) -> None:
        """Announce the server as it is now, and nothing after that; waits at most LAST_TIMEOUT_S for it."""
        self._is_over = True
        try:
            async with asyncio.timeout(LAST_TIMEOUT_S):
                await self._tasks.close()
                await self._tell()
        except TimeoutError:
            logger.info("could not announce OFFLINE within %.0f s; the record will expire", LAST_TIMEOUT_S)

    async def close(self) -> None:
        """Announce nothing more."""
        self._is_over = True
        await self._tasks.close()

    async def _keep_renewed(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            next_at = max(next_at + self._period_s, loop.time())
            await asyncio.sleep(next_at - loop.time())
            await asyncio.wait([self.renew_beside()])

    async def _tell_changes(self) -> None:
        while self._has_changed:
            self._has_changed = False
            await self.tell()

    async def _tell(self) -> None:
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
