"""The servers of one model as one peer knows them: records read shard by shard, so that it stays cheap at any size.

    refresh ─due shards─► Registry.lookup_shards ─► records

A small swarm is read whole each time. In a large one each refresh reads as many shards as a budget of bytes allows, the
oldest first; records that have expired meanwhile are not used, so that what is left is a fresh sample of the swarm. A
newcomer learns from two shards how large the swarm is, and reads as many more at once as give it a choice of servers.
Everybody begins with other shards, so that no servers are known to all and others to few.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence

from swarm.registry import NUM_SHARDS, Registry, ServerRecord
from swarm.types import ServerState

logger = logging.getLogger(__name__)

READ_BYTES_PER_S = 64 << 10
"""What a peer reads of the DHT's records in the long run."""
COPY_BYTES = 260
"""One record in an answer, with its signature and its subkey."""
NUM_COPIES = 5
"""Nodes that answer a search, each with all records of the shard that it keeps."""
FIRST_SHARDS = 2
"""A newcomer reads so many to learn how large the swarm is ..."""
ENOUGH_RECORDS = 1000
"""... and goes on at once until it knows so many servers, or all."""


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
        self._shards: list[list[ServerRecord]] = [[] for _ in range(NUM_SHARDS)]
        self._read_at = [-math.inf] * NUM_SHARDS
        self._order = random.sample(range(NUM_SHARDS), NUM_SHARDS)
        self._refreshed_at = -math.inf
        self._reading = asyncio.Lock()

    @property
    def refreshed_at(self) -> float:
        """When something was read last, by the monotonic clock."""
        return self._refreshed_at

    @property
    def records(self) -> list[ServerRecord]:
        """All servers known that have not expired."""
        now = time.time()
        return [record for shard in self._shards for record in shard if record.is_valid(now)]

    @property
    def online(self) -> list[ServerRecord]:
        """Those that take sessions."""
        return [record for record in self.records if record.state is ServerState.ONLINE]

    async def refresh(self, *, max_age_s: float, everything: bool = False) -> None:
        """Read the shards that are due, unless something was read within `max_age_s`.

        Args:
            max_age_s: how old what is known may be, in a small swarm.
            everything: read all shards, whatever that costs.

        Raises:
            PeerTimeout: when the search does not end in time.
        """
        async with self._reading:
            now = time.monotonic()
            read_at = min(self._read_at) if everything else self._refreshed_at
            if now - read_at < max_age_s:
                return
            if everything:
                await self._read(range(NUM_SHARDS), now)
            elif first := shards_to_begin(self._read_at, self._num_records, self._order):
                await self._read(first, now)
                await self._read(shards_to_begin(self._read_at, self._num_records, self._order), now)
            else:
                num_read = sum(at > -math.inf for at in self._read_at)
                num_records = self._num_records * NUM_SHARDS // num_read
                await self._read(shards_due(self._read_at, now, max_age_s, num_records), now)
            self._refreshed_at = time.monotonic()
            self.version += 1

    @property
    def _num_records(self) -> int:
        return sum(map(len, self._shards))

    async def _read(self, shards: Sequence[int], now: float) -> None:
        if not shards:
            return
        found = await self._registry.lookup_shards(self._model, shards, num_blocks=self._num_blocks)
        for shard, records in zip(shards, found, strict=True):
            self._shards[shard], self._read_at[shard] = records, now


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
    round_s = max(max_age_s, num_records * COPY_BYTES * NUM_COPIES / READ_BYTES_PER_S)
    since_s = max(now - max(read_at), max_age_s)
    count = len(read_at) if since_s >= round_s else math.ceil(len(read_at) * since_s / round_s)
    oldest_first = sorted(range(len(read_at)), key=lambda shard: read_at[shard])
    return sorted(oldest_first[:count])
