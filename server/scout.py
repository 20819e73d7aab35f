"""One server's view of the others of its model: where they are, how far, and whether they are still there.

    now and then: Directory.refresh ─► neighbours, and whoever is in doubt ─ping─► round trips, place ─► our record
                                                                              └──► suspects ─► holdings of the living

Clients route by what servers tell of the ways between them, see `swarm.routing`. A server measures a handful of others,
whatever the size of the swarm. When one of them does not answer, or a record was not renewed in time, and few others
hold its blocks, these are asked as well: so a gap is noticed long before records expire, and nobody is taken for dead
on the word of another.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.errors import SwarmError
from swarm.pings import Pinger, neighbours
from swarm.placement import Holding
from swarm.registry import MAX_PINGS, Ping, ServerRecord, peer_tag
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

REFRESH_S = 10.0
"""Age at which records are read again; in large swarms the Directory reads a part of them only."""
LOOK_TIMEOUT_S = 8.0
"""How long one look may take: two rounds of questions that nobody answers."""
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
        self._pinger, self._directory, self._generator = pinger, directory, generator
        self._own_id, self._own_blocks = own_id, own_blocks
        self._suspects: dict[str, float] = {}
        """Servers that did not answer, and when the record expires that they had then."""

    @property
    def place(self) -> Place:
        """Where we are; its error is 1 before anything was measured."""
        return self._pinger.place

    @property
    def pings(self) -> tuple[Ping, ...]:
        """The nearest of those that were measured, for our own record."""
        measured = [(rtt_s, it.peer_id) for it in self.others if (rtt_s := self._pinger.rtt_s(it.peer_id)) is not None]
        return tuple(Ping(tag=peer_tag(peer_id), rtt_s=rtt_s) for rtt_s, peer_id in sorted(measured)[:MAX_PINGS])

    @property
    def replicas(self) -> tuple[ServerRecord, ...]:
        """Servers that take sessions of all our blocks."""
        online = (record for record in self.others if record.state is ServerState.ONLINE)
        return tuple(record for record in online if record.blocks.covers(self._own_blocks()))

    @property
    def others(self) -> list[ServerRecord]:
        """All other servers that are there, or will be soon, as far as is known."""
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
    def share_in_doubt(self) -> float:
        """The part of the others of whom it is not sure whether they are there: late, or silent."""
        now, silent = time.time(), self._silent
        num_late = sum(record.is_late(now) for record in self.others)
        return (num_late + len(silent)) / max(1, len(self.others) + len(silent))

    @property
    def loading(self) -> set[str]:
        """Those that load their blocks still."""
        return {record.peer_id for record in self.others if record.state is ServerState.JOINING}

    async def look(self, *, max_age_s: float | None = None, everything: bool = False) -> None:
        """Read the records if they are old, measure the neighbours, and ask whoever is in doubt.

        Args:
            max_age_s: how old records may be; REFRESH_S by default.
            everything: read all records, however many there are, and ask the silent once more.
        """
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._directory.refresh(
                    max_age_s=REFRESH_S if max_age_s is None else max_age_s, everything=everything
                )
                await self._ask_around(again=everything)
        except (SwarmError, TimeoutError) as error:
            logger.info("could not look at the other servers: %s", error or type(error).__name__)
        present = {record.peer_id for record in self._directory.records}
        self._suspects = {peer_id: at for peer_id, at in self._suspects.items() if peer_id in present}
        self._pinger.round_trips.keep_only(present)

    async def _ask_around(self, *, again: bool) -> None:
        """Measure the neighbours; ask others as long as somebody is in doubt who was not asked."""
        asked: set[str] = set()
        asking = neighbours(self._own_blocks(), self.others, self.place, self._generator)
        if again:
            asking += self._silent[:MAX_DOUBTS]
        while asking:
            silent = await self._pinger.ping(asking)
            for record in asking:
                if record.peer_id in silent:
                    logger.info("server %s of blocks %s does not answer", record.peer_id, record.blocks)
                    self._suspects[record.peer_id] = record.expires_at
                else:
                    self._suspects.pop(record.peer_id, None)
            asked |= {record.peer_id for record in asking}
            asking = doubtful(self.others, self._silent, time.time(), asked)

    @property
    def _silent(self) -> list[ServerRecord]:
        """Those that did not answer, and say that they are there."""
        return [record for record in self._directory.records if self._is_suspect(record)]

    def _is_suspect(self, record: ServerRecord) -> bool:
        """Whether it did not answer, and has not renewed its record since."""
        return record.expires_at <= self._suspects.get(record.peer_id, float("-inf"))


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
    for record in records if shaken else ():
        fewest = min((holders[block] for block in record.blocks if block in shaken), default=FEW_HOLDERS + 1)
        if fewest <= FEW_HOLDERS and record.peer_id not in asked:
            found.append((fewest, record.peer_id, record))
    return [record for _, _, record in sorted(found, key=lambda it: it[:2])[:MAX_DOUBTS]]
