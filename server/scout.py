"""Keeps an eye on the other servers of a model: where they are, how far, and whether they are still there.

    every few seconds: Directory.refresh ─► neighbours, and whoever is in doubt ─ping─► round trips, suspects
                                                                                  └─► holdings of the living

A server measures a handful of others, whatever the size of the swarm. When one of them does not answer, or a record was
not renewed in time, and few others hold its blocks, these are asked as well: so a gap is noticed long before records
expire, and nobody is taken for dead on the word of another.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from swarm.directory import Directory
from swarm.errors import SwarmError
from swarm.pings import Pinger, neighbours
from swarm.placement import Holding
from swarm.registry import MAX_PINGS, Ping, ServerRecord, peer_tag
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Time between two looks at the neighbours."""
REFRESH_S = 10.0
"""Age at which records are read again; in large swarms the Directory reads a part of them only."""
FEW_HOLDERS = 2
"""Blocks with at most so many servers besides a suspect are looked at closely."""
MAX_DOUBTS = 16
"""Servers that are asked beyond the neighbours, each time."""


class Scout:
    """One server's view of the others.

    Args:
        pinger: measures them.
        directory: their records.
        own_id: our identity.
        own_blocks: what we hold now.
        generator: chooses among equals.
    """

    def __init__(
        self,
        pinger: Pinger,
        directory: Directory,
        *,
        own_id: str,
        own_blocks: Callable[[], BlockRange],
        generator: np.random.Generator,
    ):
        self.pinger = pinger
        self._directory, self._own_id, self._own_blocks, self._generator = directory, own_id, own_blocks, generator
        self._suspects: dict[str, float] = {}
        """Servers that did not answer, and when the record expires that they had then."""

    @property
    def pings(self) -> tuple[Ping, ...]:
        """The nearest of those that were measured, for our own record."""
        measured = [(rtt_s, it.peer_id) for it in self.others if (rtt_s := self.pinger.rtt_s(it.peer_id)) is not None]
        return tuple(Ping(tag=peer_tag(peer_id), rtt_s=rtt_s) for rtt_s, peer_id in sorted(measured)[:MAX_PINGS])

    @property
    def others(self) -> list[ServerRecord]:
        """All other servers that may be there, those that load included."""
        return [
            record
            for record in self._directory.records
            if record.peer_id != self._own_id
            and record.state in (ServerState.ONLINE, ServerState.JOINING)
            and not self._is_suspect(record)
        ]

    @property
    def holdings(self) -> list[Holding]:
        """What they hold."""
        return [holding_of(record) for record in self.others]

    @property
    def loading(self) -> set[str]:
        """Those that load their blocks still."""
        return {record.peer_id for record in self.others if record.state is ServerState.JOINING}

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self, *, max_age_s: float = REFRESH_S, everything: bool = False) -> None:
        """Read the records if they are old, measure the neighbours, and ask whoever is in doubt.

        Args:
            max_age_s: how old records may be.
            everything: read all records, however many there are.
        """
        try:
            await self._directory.refresh(max_age_s=max_age_s, everything=everything)
        except SwarmError as error:
            logger.info("can't read who serves the model: %s", error)
        asked: set[str] = set()
        asking = neighbours(self._own_blocks(), self.others, self.pinger.place, self._generator)
        while asking:
            await self._ask(asking)
            asked |= {record.peer_id for record in asking}
            suspects = [record for record in self._directory.records if self._is_suspect(record)]
            asking = doubtful(self.others, suspects, time.time(), asked)
        self._forget_absent()

    async def _ask(self, records: Sequence[ServerRecord]) -> None:
        silent = await self.pinger.ping(records)
        for record in records:
            if record.peer_id in silent:
                logger.info("server %s of blocks %s does not answer", record.peer_id, record.blocks)
                self._suspects[record.peer_id] = record.expires_at
            else:
                self._suspects.pop(record.peer_id, None)

    def _is_suspect(self, record: ServerRecord) -> bool:
        """Whether it did not answer, and has not renewed its record since."""
        return record.expires_at <= self._suspects.get(record.peer_id, float("-inf"))

    def _forget_absent(self) -> None:
        """Forget those whose records are gone."""
        present = {record.peer_id for record in self._directory.records}
        self._suspects = {peer_id: at for peer_id, at in self._suspects.items() if peer_id in present}
        self.pinger.round_trips.keep_only(present)


def holding_of(record: ServerRecord) -> Holding:
    """What a server holds, by its record."""
    return Holding(peer_id=record.peer_id, blocks=record.blocks, capacity_tps=record.batch_tps or record.decode_tps)


def doubtful(
    records: Sequence[ServerRecord], suspects: Sequence[ServerRecord], now: float, asked: Collection[str]
) -> list[ServerRecord]:
    """Whom to ask whether they are there, at most MAX_DOUBTS. Pure.

    Those that hold blocks which a suspect has left to few, the fewest first; and those that are late, where blocks have
    few holders that are not.

    Args:
        records: of all that may be there.
        suspects: of those that don't answer.
        now: unix time.
        asked: peers that were asked already.
    """
    holders: Counter[int] = Counter()
    for record in records:
        if not record.is_late(now):
            holders.update(record.blocks)
    shaken = {block for record in (*suspects, *(it for it in records if it.is_late(now))) for block in record.blocks}
    found = []
    for record in records:
        fewest = min((holders[block] for block in record.blocks if block in shaken), default=FEW_HOLDERS + 1)
        if fewest <= FEW_HOLDERS and record.peer_id not in asked:
            found.append((fewest, record.peer_id, record))
    return [record for _, _, record in sorted(found, key=lambda it: it[:2])[:MAX_DOUBTS]]
