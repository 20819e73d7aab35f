"""The servers of one model as one peer knows them: records read shard by shard, so that it stays cheap at any size.

    refresh ─due shards─► Registry.lookup_shards ─► records

A small swarm is read whole each time. In a large one each refresh reads as many shards as a budget of bytes allows, the
oldest first. `records` leaves out what has expired meanwhile: that is a fresh sample of the swarm. `seen` has all, as
they were when their shard was read: the whole swarm, to judge it by, and `online` to find routes through. A newcomer
learns from two shards how large the swarm is, and reads as many more at once as give it a choice of servers. Everybody
begins with other shards, so that no servers are known to all and others to few.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import PeerTimeout
from swarm.registry import NUM_SHARDS, Registry, ServerRecord
from swarm.types import ServerState

logger = logging.getLogger(__name__)

READ_BYTES_PER_S = 64 << 10
"""What a peer reads of the DHT's records in the long run; as much again where it has to be sure of what it sees."""
COPY_BYTES = 260
"""One record in an answer, with its signature and its subkey."""
NUM_COPIES = 5
"""Nodes that answer a search, each with all records of the shard that it keeps."""
FIRST_SHARDS = 2
"""A newcomer reads so many to learn how large the swarm is ..."""
ENOUGH_RECORDS = 1000
"""... and goes on at once until it knows so many servers, or all."""

REMEMBERED_S = 300.0
"""A server that had renewed its record when it was read is expected to be there for so long."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A record, and the unix time at which the search for it began."""

    record: ServerRecord
    at: float

    @property
    def is_late(self) -> bool:
        """Whether the server should have renewed it by then."""
        return self.record.is_late(self.at)

    def is_expected(self, now: float) -> bool:
        """Whether the server was there when it was read, not too long before this unix time."""
        return not self.is_late and 0.0 <= now - self.at <= REMEMBERED_S


class Directory:
    """The records of one model.

    Args:
        registry: where they are looked up.
        model: content digest of the checkpoint.
        num_blocks: of the model.
    """

    def __init__(self, registry: Registry, *, model: str, num_blocks: int):
        self.version = 0
        """Grows with everything that was read."""
        self._registry, self._model, self._num_blocks = registry, model, num_blocks
        self._shards: list[list[Seen]] = [[] for _ in range(NUM_SHARDS)]
        self._read_at = [-math.inf] * NUM_SHARDS
        self._order = random.sample(range(NUM_SHARDS), NUM_SHARDS)
        self._refreshed_at = self._confirmed_at = -math.inf
        self._reading = asyncio.Lock()

    @property
    def refreshed_at(self) -> float:
        """When something was read last, by the monotonic clock."""
        return self._refreshed_at

    @property
    def records(self) -> list[ServerRecord]:
        """All servers known that have not expired."""
        return [seen.record for seen in self.fresh]

    @property
    def fresh(self) -> list[Seen]:
        """The same, with when they were read."""
        now = time.time()
        return [seen for seen in self.seen if seen.record.is_valid(now)]

    @property
    def seen(self) -> list[Seen]:
        """All servers that were there when their shard was read."""
        return [seen for shard in self._shards for seen in shard]

    @property
    def online(self) -> list[ServerRecord]:
        """Those that take sessions, as far as is known; whoever uses one asks it first.

        That its record has expired since it was read says nothing in a large swarm, where it is not read again for
        minutes: who had renewed it by then has done so since, unless it is gone. The more servers are known, the better
        are the routes.
        """
        now = time.time()
        return [
            seen.record
            for seen in self.seen
            if seen.record.state is ServerState.ONLINE and (seen.record.is_valid(now) or seen.is_expected(now))
        ]

    async def refresh(self, *, max_age_s: float, everything: bool = False) -> None:
        """Read the shards that are due, unless something was read within `max_age_s`.

        Args:
            max_age_s: how old what is known may be, in a small swarm.
            everything: read all shards that are older than that, whatever it costs, some at a time.

        Raises:
            PeerTimeout: when some shards could not be read; what was read of others is kept.
        """
        async with self._reading:
            now = time.monotonic()
            if everything:
                await self._read_all([shard for shard in self._order if now - self._read_at[shard] >= max_age_s], now)
            elif now - self._refreshed_at < max_age_s:
                return
            elif first := shards_to_begin(self._read_at, self._num_records, self._order):
                await self._read(first, now)
                await self._read(shards_to_begin(self._read_at, self._num_records, self._order), now)
            else:
                await self._read(shards_due(self._read_at, now, max_age_s, self._num_estimated), now)

    async def confirm(self, *, max_age_s: float) -> bool:
        """Read all anew, or in a large swarm what is older than that; False where the budget does not allow it.

        Raises:
            PeerTimeout: as `refresh`.
        """
        now, takes_s = time.monotonic(), round_s(0.0, self._num_estimated)
        max_age_s = min(max_age_s, takes_s)
        if now - min(self._read_at) < max_age_s:
            return True
        if now - self._confirmed_at < takes_s:
            return False
        self._confirmed_at = now
        await self.refresh(max_age_s=max_age_s, everything=True)
        return True

    @property
    def _num_records(self) -> int:
        return sum(map(len, self._shards))

    @property
    def _num_estimated(self) -> int:
        """Of the whole swarm; 0 before anything was read."""
        return self._num_records * NUM_SHARDS // max(1, sum(at > -math.inf for at in self._read_at))

    async def _read_all(self, shards: Sequence[int], now: float) -> None:
        """Read these, in searches that bring about ENOUGH_RECORDS each."""
        while shards:
            if max(self._read_at) == -math.inf:
                count = FIRST_SHARDS
            else:
                count = max(1, ENOUGH_RECORDS * NUM_SHARDS // max(1, self._num_estimated))
            await self._read(sorted(shards[:count]), now)
            shards = shards[count:]

    async def _read(self, shards: Sequence[int], now: float) -> None:
        if not shards:
            return
        at = time.time()
        found = await self._registry.lookup_shards(self._model, shards, num_blocks=self._num_blocks)
        for shard, records in zip(shards, found, strict=True):
            if records is not None:
                self._shards[shard], self._read_at[shard] = [Seen(record, at) for record in records], now
        self.version += 1
        if (num_missing := sum(records is None for records in found)) > 0:
            raise PeerTimeout(f"{num_missing} of {len(shards)} shards of the records could not be read")
        self._refreshed_at = time.monotonic()


def shards_to_begin(read_at: Sequence[float], num_records: int, order: Sequence[int]) -> list[int]:
    """Which shards a newcomer reads at once; none when it has enough. Pure.

    Args:
        read_at: when each shard was read; -inf if never.
        num_records: how many records were in those that were.
        order: in which shards are read.
    """
    unread = [shard for shard in order if read_at[shard] == -math.inf]
    num_read = len(order) - len(unread)
    if not num_read:
        return sorted(unread[:FIRST_SHARDS])
    wanted = max(0, ENOUGH_RECORDS - num_records)
    return sorted(unread[: math.ceil(min(len(unread), wanted * num_read / max(num_records, 1)))])


def shards_due(read_at: Sequence[float], now: float, max_age_s: float, num_records: int) -> list[int]:
    """Which shards to read now, oldest first: all that the budget of bytes allows since the last time. Pure.

    Args:
        read_at: when each shard was read; -inf if never.
        now: the time.
        max_age_s: how old a shard may be at least.
        num_records: how many records there are, about.
    """
    takes_s = round_s(max_age_s, num_records)
    since_s = max(now - max(read_at), max_age_s)
    count = len(read_at) if since_s >= takes_s else math.ceil(len(read_at) * since_s / takes_s)
    oldest_first = sorted(range(len(read_at)), key=lambda shard: read_at[shard])
    return sorted(oldest_first[:count])


def round_s(max_age_s: float, num_records: int) -> float:
    """In how many seconds the budget allows to read all shards once. Pure."""
    return max(max_age_s, num_records * COPY_BYTES * NUM_COPIES / READ_BYTES_PER_S)
