"""As many blocks as fit, with room for cache, adapters and batches, and an error that says what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError
from swarm.server.block_facts import BlockFacts
from swarm.server.config import CacheSize
from swarm.server.sizing import fit_blocks

GIB, MIB = 1 << 30, 1 << 20
FACTS = BlockFacts(weight_bytes=200 * MIB, page_bytes=64 << 10, decode_tps={1: 100.0}, prefill_tps=1000.0, num_blocks=1)


def fit(free_bytes, *, cache="16384", adapters=0, histories=0, training=0, max_blocks=80, **settings):
    return fit_blocks(
        FACTS,
        free_bytes=free_bytes,
        cache=CacheSize.parse(cache),
        adapter_bytes=adapters,
        history_bytes=histories,
        training_bytes=training,
        max_blocks=max_blocks,
        **settings,
    )


def test_weights_cache_and_reserve_share_the_memory():
    """Of 16 GiB a tenth is left; a block takes 200 MiB and 64 MiB of cache for 16384 tokens."""
    found = fit(16 * GIB)
    assert found.num_blocks == int(16 * GIB * 0.9) // (264 * MIB) == 55
    assert str(found) == "55 fit into 16.0 GiB free, 200 MiB of weights and 64 MiB of cache each"


def test_a_cache_in_bytes_is_taken_once():
    """It does not grow with the blocks."""
    assert fit(16 * GIB, cache="4GiB").num_blocks == (int(16 * GIB * 0.9) - 4 * GIB) // (200 * MIB)


def test_room_for_adapters_histories_and_training_is_kept_but_not_too_much():
    """What they may use, up to a tenth each."""
    assert fit(16 * GIB, adapters=GIB).num_blocks == (int(16 * GIB * 0.9) - GIB) // (264 * MIB)
    assert fit(4 * GIB, adapters=GIB, histories=GIB).num_blocks == int(4 * GIB * 0.7) // (264 * MIB)
    assert fit(4 * GIB, training=GIB, histories=GIB).num_blocks == int(4 * GIB * 0.7) // (264 * MIB)


def test_the_largest_block_counts():
    """A model whose other blocks are twice as large has room for fewer."""
    assert fit(16 * GIB, largest_part=2.0).num_blocks == int(16 * GIB * 0.9) // (464 * MIB)


def test_too_little_memory_is_an_error_with_all_numbers():
    """One block needs more than there is."""
    with pytest.raises(ConfigError, match=r"64 MiB of cache; 400 MiB are free, of which 144 MiB can be used"):
        fit(400 * MIB)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 36), st.integers(0, 1 << 36), st.integers(1, 200))
def test_what_is_taken_never_exceeds_what_is_free(free_bytes, adapters, histories, max_blocks):
    """Whatever the sizes: the blocks and their cache fit, and there are not more than the model has."""
    try:
        found = fit(free_bytes, adapters=adapters, histories=histories, max_blocks=max_blocks)
    except ConfigError:
        return
    assert 1 <= found.num_blocks <= max_blocks
    assert found.num_blocks * (found.block_bytes + found.cache_bytes) <= 0.9 * free_bytes
