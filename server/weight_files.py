"""The weight files of a checkpoint, and how fast those come that are not on this machine.

    Checkpoint.ensure ─► MeasuredFiles.fetch ─► the checkpoint's own store
                              ├─► seconds          so that loading blocks can be told from fetching them
                              └─► bytes_per_s ─► placing: what loading other blocks would take

It does not know which blocks the files hold. One thread at a time fetches.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from swarm.checkpoint.source import ShardStore

DOWNLOAD_BYTES_PER_S = 20e6
"""At which rate files come, for all that is known before the first one came."""
MEMORY_S = 10.0
"""After so many seconds of downloading, what was known of the rate before counts 1/e."""
MIN_S = 1e-3
"""Nothing comes in less time than this."""


class MeasuredFiles:
    """A `ShardStore` that measures another one.

    Args:
        store: has the files.
        clock: monotonic seconds.
    """

    def __init__(self, store: ShardStore, clock: Callable[[], float] = time.monotonic):
        self.bytes_per_s = DOWNLOAD_BYTES_PER_S
        """Of late, of files that were not here."""
        self.seconds = 0.0
        """Spent in `fetch` so far."""
        self._store, self._clock = store, clock

    def fetch(self, shards: Iterable[str], /) -> dict[str, Path]:
        """Path of each shard, after downloading what is missing; raises what the store raises."""
        paths = {}
        for shard in shards:
            is_new, started = not self.is_here(shard), self._clock()
            paths.update(self._store.fetch([shard]))
            seconds = self._clock() - started
            self.seconds += seconds
            if is_new:
                self.bytes_per_s = later_rate(self.bytes_per_s, paths[shard].stat().st_size, seconds)
        return paths

    def is_here(self, shard: str, /) -> bool:
        """Whether a shard is on disk already."""
        return self._store.is_here(shard)


def later_rate(bytes_per_s: float, num_bytes: int, seconds: float) -> float:
    """What to expect after so many bytes came in so many seconds, more of it the longer that was. Pure.

    Args:
        bytes_per_s: what was expected before.
    """
    if num_bytes <= 0:
        return bytes_per_s
    seconds = max(seconds, MIN_S)
    part = math.exp(-seconds / MEMORY_S)
    return part * bytes_per_s + (1 - part) * num_bytes / seconds
