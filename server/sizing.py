"""How many blocks fit on a device, with room for the cache, adapters and what a batch needs meanwhile. Pure.

free memory ─ reserve ─ adapters ─ histories ─ training ─► per block: weights + its part of the KV cache ─► Fit
"""

from dataclasses import dataclass

from swarm.errors import ConfigError
from swarm.server.block_facts import BlockFacts
from swarm.server.config import CacheSize
from swarm.server.pages import PAGE_SIZE

RESERVE_PART = 0.1
"""Part of the free memory that is left for batches, fragments and others."""
RESERVE_BYTES = 256 << 20
"""And so much at least, for what a batch needs besides the cache."""
EXTRA_PART = 0.1
"""Adapters, histories and training may use what they are allowed, but no more than this part of the free memory counts
for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How many blocks fit, and why."""

    num_blocks: int
    free_bytes: int
    block_bytes: int
    """Weights of one block."""
    cache_bytes: int
    """KV cache of one block."""

    def __str__(self) -> str:
        weights, cache = _mib(self.block_bytes), _mib(self.cache_bytes)
        return (
            f"{self.num_blocks} fit into {_mib(self.free_bytes)} free, {weights} of weights and {cache} of cache each"
        )


def fit_blocks(
    facts: BlockFacts,
    *,
    free_bytes: int,
    cache: CacheSize,
    adapter_bytes: int,
    history_bytes: int,
    training_bytes: int,
    max_blocks: int,
    largest_part: float = 1.0,
) -> Fit:
    """As many blocks as fit, at most `max_blocks`.

    Args:
        facts: of one block.
        free_bytes: of the device.
        cache: size of the KV cache.
        adapter_bytes: what adapters may take on the device.
        history_bytes: what histories may take there; 0 where they lie elsewhere.
        training_bytes: what training may keep there.
        max_blocks: of the model.
        largest_part: how much larger than the measured block the largest one is.

    Raises:
        ConfigError: not even one block fits.
    """
    allowed = (adapter_bytes, history_bytes, training_bytes)
    extras = sum(min(num_bytes, int(EXTRA_PART * free_bytes)) for num_bytes in allowed)
    usable = free_bytes - max(RESERVE_BYTES, int(RESERVE_PART * free_bytes)) - extras - (cache.num_bytes or 0)
    block_bytes = int(facts.weight_bytes * largest_part)
    cache_bytes = 0 if cache.tokens is None else -(-cache.tokens // PAGE_SIZE) * facts.page_bytes
    count = min(max_blocks, max(0, usable) // max(1, block_bytes + cache_bytes))
    if count < 1:
        raise ConfigError(
            f"no block fits: one takes {_mib(block_bytes)} of weights and {_mib(cache_bytes)} of cache;"
            f" {_mib(free_bytes)} are free, of which {_mib(max(0, usable))} can be used; take a smaller --kv-cache"
        )
    return Fit(num_blocks=count, free_bytes=free_bytes, block_bytes=block_bytes, cache_bytes=cache_bytes)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
