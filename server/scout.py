"""Where a server is among the others of its model: measured while it serves, and told with its record.

    now and then: Directory.refresh ─► neighbours ─ping─► round trips, place ─► `pings` and `place` of our record

Clients route by what servers tell of the ways between them, see `swarm.routing`. A server measures a handful of others,
whatever the size of the swarm.
"""

import asyncio
import logging

import numpy as np

from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.errors import SwarmError
from swarm.pings import Pinger, neighbours
from swarm.registry import MAX_PINGS, Ping, ServerRecord, peer_tag
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

REFRESH_S = 15.0
"""Age at which records are read again; in large swarms the Directory reads a part of them only."""
LOOK_TIMEOUT_S = 5.0


class Scout:
    """One server's view of the others.

    Args:
        pinger: measures them.
        directory: their records.
        own_id: our identity.
        blocks: what we hold.
        generator: chooses among equals.
    """

    def __init__(
        self, pinger: Pinger, directory: Directory, *, own_id: str, blocks: BlockRange, generator: np.random.Generator
    ):
        self._pinger, self._directory, self._generator = pinger, directory, generator
        self._own_id, self._blocks = own_id, blocks

    @property
    def place(self) -> Place:
        """Where we are; its error is 1 before anything was measured."""
        return self._pinger.place

    @property
    def pings(self) -> tuple[Ping, ...]:
        """The nearest of those that were measured, for our own record."""
        measured = [(rtt_s, it.peer_id) for it in self._others if (rtt_s := self._pinger.rtt_s(it.peer_id)) is not None]
        return tuple(Ping(tag=peer_tag(peer_id), rtt_s=rtt_s) for rtt_s, peer_id in sorted(measured)[:MAX_PINGS])

    @property
    def replicas(self) -> tuple[ServerRecord, ...]:
        """Servers that take sessions of all our blocks."""
        online = (record for record in self._others if record.state is ServerState.ONLINE)
        return tuple(record for record in online if record.blocks.covers(self._blocks))

    async def look(self) -> None:
        """Read the records if they are old, and measure the neighbours, for LOOK_TIMEOUT_S at most."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._directory.refresh(max_age_s=REFRESH_S)
                await self._pinger.ping(neighbours(self._blocks, self._others, self.place, self._generator))
        except (SwarmError, TimeoutError) as error:
            logger.info("could not look at the other servers: %s", error or type(error).__name__)
        self._pinger.round_trips.keep_only({record.peer_id for record in self._directory.records})

    @property
    def _others(self) -> list[ServerRecord]:
        """All other servers that are there, or will be soon."""
        return [
            record
            for record in self._directory.records
            if record.peer_id != self._own_id and record.state in (ServerState.ONLINE, ServerState.JOINING)
        ]
