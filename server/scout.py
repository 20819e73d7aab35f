"""One server's view of the others of its model: where they are, how far, and whether they are still there.

    now and then: Directory.refresh ─► neighbours, and whoever is in doubt ─ping─► round trips, place ─► our record
                          │                                                   └──► Attendance ─┐
                          └─► records, as they were when they were read ───────────────────────┴─► holdings, doubt

Clients route by what servers tell of the ways between them, see `swarm.routing`. A server measures a handful of others,
whatever the size of the swarm. When one of them does not answer, or a record was not renewed in time, and few others
hold its blocks, these are asked as well: so a gap is noticed long before records expire, and nobody is taken for dead
on the word of another. They are asked as soon as an answer is slow; nobody is taken for dead for that, but after the
whole time that it has. Who is there is said by `swarm.server.attendance`.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from swarm.coordinates import Place
from swarm.directory import Directory, Seen
from swarm.errors import PeerTimeout, SwarmError
from swarm.pings import Pinger, neighbours
from swarm.placement import Holding
from swarm.registry import MAX_PINGS, Ping, ServerRecord, peer_tag
from swarm.server.attendance import Attendance, Standing
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

REFRESH_S = 10.0
"""Age at which records are read again; in large swarms the Directory reads a part of them only."""
LOOK_TIMEOUT_S = 8.0
"""How long one look may ask others: some rounds of questions that nobody answers, which overlap."""
NUM_READS = 3
"""How often a close look tries to read all records, each time those that it has not got yet."""
SAMPLE_S = 20.0
"""How many are late is told by the records that were read within so long of the newest: all, in a small swarm."""
CONFIRM_S = 20.0
"""Before anything is done about a gap, all records must be younger; in a small swarm they are read anew."""
AGAIN_S = 30.0
"""The silent are asked again after so long: one that was only slow, or has come back, is there again ..."""
MAX_AGAIN = 4
"""... so many each time, those first that were asked longest ago."""
FEW_HOLDERS = 2
"""Blocks with at most so many servers besides a suspect are looked at closely."""
MAX_DOUBTS = 16
"""Servers that are asked beyond the neighbours, each time."""
PRESENT = (ServerState.ONLINE, ServerState.JOINING)
"""States of servers that hold blocks, or will soon."""


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
        self._attendance = Attendance()
        self._looking = asyncio.Lock()
        self._is_blind = False
        """Whether the records could not be read at the last look."""

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
        """Other servers that are there, or will be soon, as far as is known; of a large swarm, a fresh sample."""
        return _present(self._standings(self._directory.fresh))

    @property
    def holdings(self) -> list[Holding]:
        """What all others hold, as it was when it was read."""
        return [holding_of(record) for record in _present(self._standings(self._directory.seen))]

    def holdings_after(self, moves: Mapping[str, BlockRange]) -> list[Holding]:
        """What all others would hold if these had moved, by peer; who drains for that is one of them again."""
        present = _present(self._standings(self._directory.seen, moving=moves))
        return [holding_of(record, moves.get(record.peer_id)) for record in present]

    @property
    def leaving(self) -> set[str]:
        """Those that drain: if they have claimed other blocks they are on their way."""
        records = (seen.record for seen in self._directory.seen)
        return {record.peer_id for record in records if record.state is ServerState.DRAINING}

    @property
    def loading(self) -> set[str]:
        """Those of them that load their blocks still."""
        present = _present(self._standings(self._directory.seen))
        return {record.peer_id for record in present if record.state is ServerState.JOINING}

    @property
    def share_in_doubt(self) -> float:
        """The part of the others of whom it is not sure whether they are there; all, if we can't read their records."""
        if self._is_blind:
            return 1.0
        known = [pair for pair in self._standings(self._directory.fresh) if pair[1] is not Standing.GONE]
        newest = max((seen.at for seen, _ in known), default=0.0)
        sample = [standing for seen, standing in known if seen.at >= newest - SAMPLE_S]
        late, silent = sample.count(Standing.LATE), [standing for _, standing in known].count(Standing.SILENT)
        return late / max(1, len(sample)) + silent / max(1, len(known))

    async def look(self) -> None:
        """Read the records if they are old, measure the neighbours, and ask whoever is in doubt, all at the same time.

        Reading takes as long as the DHT does, asking ends soon. A look that is under way will do for another one.
        """
        if self._looking.locked():
            async with self._looking:
                return
        async with self._looking:
            reading = asyncio.create_task(self._read_if_old(), name="read records")
            try:
                if not self._directory.seen:  # nobody to ask
                    await asyncio.wait([reading])
                await self._ask_for_a_while(again=self._silent(time.monotonic() - AGAIN_S)[:MAX_AGAIN])
                await reading
            finally:
                reading.cancel()

    async def _read_if_old(self) -> None:
        try:
            await self._read(REFRESH_S)
        except SwarmError as error:
            logger.info("could not read the records of the other servers: %s", error)

    async def look_closely(self, *, max_age_s: float = 0.0) -> None:
        """Read all records, and ask the silent once more; as `read_closely` and `ask_again`."""
        await self.read_closely(max_age_s=max_age_s)
        await self.ask_again()

    async def read_closely(self, *, max_age_s: float = 0.0) -> None:
        """Read all records, however many there are and however long that takes.

        Args:
            max_age_s: how old records may be.

        Raises:
            PeerTimeout: some could not be read; what was read is kept.
        """
        started = time.monotonic()
        for num_left in reversed(range(NUM_READS)):
            try:
                await self._read(max_age_s + time.monotonic() - started, everything=True)
                break
            except PeerTimeout as error:
                if not num_left:
                    raise
                logger.info("could not read all records, trying again: %s", error)

    async def ask_again(self) -> None:
        """Ask the silent once more before anything is done about that: each has the whole time to answer."""
        await self._ask_for_a_while(again=self._silent(time.monotonic())[:MAX_DOUBTS])

    async def confirm(self) -> bool:
        """Read all anew, or what was read long ago, and whether that is done: what is missing may be there by now."""
        try:
            return await self._directory.confirm(max_age_s=CONFIRM_S)
        except SwarmError as error:
            logger.info("could not read all records: %s", error)
            return False

    async def _read(self, max_age_s: float, *, everything: bool = False) -> None:
        """Read records; until that succeeds we know nothing for sure."""
        self._is_blind = True
        try:
            await self._directory.refresh(max_age_s=max_age_s, everything=everything)
            self._is_blind = False
        finally:  # some may have been read
            self._attendance.announced((seen.record for seen in self._directory.seen), time.monotonic())
            self._pinger.round_trips.keep_only({record.peer_id for record in self._directory.records})

    async def _ask_for_a_while(self, *, again: Sequence[ServerRecord]) -> None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._ask_around(again=again)
        except TimeoutError:
            logger.info("did not hear from all other servers within %g s", LOOK_TIMEOUT_S)

    async def _ask_around(self, *, again: Sequence[ServerRecord]) -> None:
        """Measure the neighbours, and ask some of the silent again; then others, as long as somebody is in doubt."""
        asked: set[str] = set()
        slow: set[str] = set()
        rounds: set[asyncio.Task[None]] = set()
        news = asyncio.Event()
        asking = [*neighbours(self._own_blocks(), self.others, self.place, self._generator), *again]
        async with asyncio.TaskGroup() as group:
            while asking or rounds:
                if asking:
                    asked |= {record.peer_id for record in asking}
                    rounds.add(task := group.create_task(self._ask(asking, slow, news)))
                    task.add_done_callback(lambda _: news.set())
                await news.wait()
                news.clear()
                rounds = {it for it in rounds if not it.done()}
                asking = self._doubtful(slow, asked)

    async def _ask(self, asking: Sequence[ServerRecord], slow: set[str], news: asyncio.Event) -> None:
        """One round of questions; whose answers are slow is added to `slow` as long as they are waited for."""

        def is_slow(peer_id: str) -> None:
            slow.add(peer_id)
            news.set()

        silent = await self._pinger.ping(asking, on_slow=is_slow)
        self._attendance.asked(asking, silent, time.monotonic())
        for record in asking:
            if record.peer_id in silent:
                logger.info("server %s of blocks %s does not answer", record.peer_id, record.blocks)
        slow.difference_update(record.peer_id for record in asking)

    def _doubtful(self, slow: Collection[str], asked: Collection[str]) -> list[ServerRecord]:
        """Whom to ask as well, if those that are slow were silent."""
        known = self._standings(self._directory.fresh)
        late = {seen.record.peer_id for seen, standing in known if standing is Standing.LATE}
        suspects = [it.record for it, standing in known if standing is Standing.SILENT or it.record.peer_id in slow]
        present = [record for record in _present(known) if record.peer_id not in slow]
        return doubtful(present, suspects, late, asked)

    def _silent(self, before: float) -> list[ServerRecord]:
        """Those that did not answer when they were asked last, before some time; first who was asked longest ago."""
        asked_at = self._attendance.silent
        silent = [record for record in self._directory.records if asked_at.get(record.peer_id, math.inf) <= before]
        return sorted(silent, key=lambda record: asked_at[record.peer_id])

    def _standings(self, known: Sequence[Seen], *, moving: Collection[str] = ()) -> list[tuple[Seen, Standing]]:
        """Those of others that say that they serve or load, or that drain to move, and what is known of each."""
        now = time.monotonic()
        return [
            (seen, self._attendance.of(seen, now))
            for seen in known
            if seen.record.peer_id != self._own_id and _is_of_use(seen.record, moving)
        ]


def _is_of_use(record: ServerRecord, moving: Collection[str]) -> bool:
    return record.state in PRESENT or (record.state is ServerState.DRAINING and record.peer_id in moving)


def _present(known: Sequence[tuple[Seen, Standing]]) -> list[ServerRecord]:
    return [seen.record for seen, standing in known if standing.is_there]


def holding_of(record: ServerRecord, blocks: BlockRange | None = None) -> Holding:
    """What a server holds, by its record; or would hold."""
    blocks = blocks or record.blocks
    return Holding(peer_id=record.peer_id, blocks=blocks, capacity_tps=record.batch_tps or record.decode_tps)


def doubtful(
    records: Sequence[ServerRecord], suspects: Sequence[ServerRecord], late: Collection[str], asked: Collection[str]
) -> list[ServerRecord]:
    """Whom to ask whether they are there, at most MAX_DOUBTS. Pure.

    Those that hold blocks which a suspect has left to few, the fewest first; and those that are late, where blocks have
    few holders that are not.

    Args:
        records: of all that may be there.
        suspects: of those that don't answer.
        late: those of all that did not renew their record in time.
        asked: peers that were asked already.
    """
    holders: Counter[int] = Counter()
    for record in records:
        if record.peer_id not in late:
            holders.update(record.blocks)
    shaken = {block for record in (*suspects, *(it for it in records if it.peer_id in late)) for block in record.blocks}
    found = []
    for record in records if shaken else ():
        fewest = min((holders[block] for block in record.blocks if block in shaken), default=FEW_HOLDERS + 1)
        if fewest <= FEW_HOLDERS and record.peer_id not in asked:
            found.append((fewest, record.peer_id, record))
    return [record for _, _, record in sorted(found, key=lambda it: it[:2])[:MAX_DOUBTS]]
