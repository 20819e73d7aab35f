"""What reloading takes decides where a server would rather go."""

from types import SimpleNamespace

import pytest
import torch

from swarm.checkpoint.partial import shards_by_block, shards_for
from swarm.checkpoint.source import resolve
from swarm.server.block_facts import BlockFacts
from swarm.server.placing import DOWNLOAD_BYTES_PER_S, _bytes_not_on_disk, reload_times
from swarm.types import BlockRange
from tests.integration.conftest import NUM_BLOCKS, save_tiny_llama


def test_blocks_that_must_be_downloaded_take_longer():
    """Each block takes its time from disk, and each byte that is not there the time to get it."""
    far = [0, 0, int(DOWNLOAD_BYTES_PER_S), 0]
    assert reload_times(far, 2, 0.5) == pytest.approx([1.0, 2.0, 2.0])
    assert reload_times([], 2, 0.5) == []


def test_only_blocks_with_a_missing_file_are_far(tmp_path):
    """All files that hold a block's tensors must be there."""
    checkpoint = resolve(str(save_tiny_llama(tmp_path / "tiny")))
    assert [set(shards) for shards in shards_by_block(checkpoint)] == [
        set(shards_for(checkpoint, BlockRange(block, block + 1))) for block in range(NUM_BLOCKS)
    ]
    facts = BlockFacts(weight_bytes=1000, page_bytes=1, decode_tps={1: 1.0}, prefill_tps=1.0)
    plan = SimpleNamespace(checkpoint=checkpoint, quantization="int8", dtype=torch.float32)
    assert _bytes_not_on_disk(plan, facts) == [0] * NUM_BLOCKS
    for path in (tmp_path / "tiny").glob("*.safetensors"):
        path.unlink()
    assert _bytes_not_on_disk(plan, facts) == [2000] * NUM_BLOCKS
