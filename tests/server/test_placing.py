"""What reloading takes decides where a server would rather go, and its owner is told why it is where it is."""

from types import SimpleNamespace

import pytest
import torch

from swarm.checkpoint.partial import shards_by_block, shards_for
from swarm.checkpoint.source import resolve
from swarm.placement import Choice
from swarm.server.block_facts import BlockFacts
from swarm.server.config import ServerConfig
from swarm.server.loading import LOAD_BLOCK_S, Loader
from swarm.server.placing import Placing, explained, reload_times
from swarm.server.weight_files import DOWNLOAD_BYTES_PER_S, MeasuredFiles
from swarm.types import BlockRange
from tests.integration.conftest import NUM_BLOCKS, save_tiny_llama

FACTS = BlockFacts(
    weight_bytes=10_000_000, page_bytes=1, decode_tps={1: 50.0, 32: 400.0}, prefill_tps=1.0, num_blocks=4
)


def test_blocks_that_must_be_downloaded_take_longer():
    """Each block takes its time from disk, and each byte that is not there the time to get it."""
    far = [0, 0, 3_000_000, 0]
    assert reload_times(far, 2, block_s=0.5, bytes_per_s=3e6) == pytest.approx([1.0, 2.0, 2.0])
    assert reload_times(far, 2, block_s=0.5, bytes_per_s=6e6) == pytest.approx([1.0, 1.5, 1.5])
    assert reload_times([], 2, block_s=0.5, bytes_per_s=3e6) == []


def test_only_blocks_with_a_missing_file_are_far(tmp_path):
    """All files that hold a block's tensors must be there."""
    checkpoint = resolve(str(save_tiny_llama(tmp_path / "tiny")))
    assert [set(shards) for shards in shards_by_block(checkpoint)] == [
        set(shards_for(checkpoint, BlockRange(block, block + 1))) for block in range(NUM_BLOCKS)
    ]
    plan = SimpleNamespace(
        checkpoint=checkpoint,
        quantization="int8",
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=NUM_BLOCKS,
    )
    config = ServerConfig(model="tiny", cache_dir=tmp_path)
    placing = Placing(
        config,
        SimpleNamespace(plan=plan),
        facts=SimpleNamespace(latest=FACTS),
        loader=Loader(config, plan, MeasuredFiles(checkpoint.store)),
        transport=SimpleNamespace(node=SimpleNamespace(peer_id="own")),
        registry=None,
    )
    placing._length, placing._shards = 2, shards_by_block(checkpoint)
    assert placing._reload_s() == [2 * LOAD_BLOCK_S] * (NUM_BLOCKS - 1)
    for path in (tmp_path / "tiny").glob("*.safetensors"):
        path.unlink()
    expected_s = 2 * LOAD_BLOCK_S + 2 * 20_000_000 / DOWNLOAD_BYTES_PER_S
    assert placing._reload_s() == pytest.approx([expected_s] * (NUM_BLOCKS - 1))


def test_the_owner_is_told_in_one_line_why_the_server_is_where_it_is():
    """How many and why, how fast, and what the swarm has of it."""
    choice = Choice(blocks=BlockRange(3, 6), before_tps=0.0, after_tps=12.345, missing=())
    assert explained(choice, "3 asked", FACTS, num_servers=2) == (
        "chose blocks 3:6: 3 asked; 50 to 400 tokens/s through a block here; best place among 2 servers: full"
        " batches of the swarm 0 -> 12.3 tokens/s"
    )
    choice = Choice(blocks=BlockRange(3, 6), before_tps=0.0, after_tps=0.0, missing=(0, 1, 2, 8))
    assert explained(choice, "", FACTS, num_servers=1).endswith("; the first server: nobody serves 0:3, 8:9 yet")
