"""What a block takes and gives is measured once, and remembered for this machine, model and format."""

import os

import msgspec
import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.server import block_facts
from swarm.server.block_facts import BATCH_SIZES, MAX_AGE_S, BlockFacts, FactsStore, largest_part, measure
from swarm.server.blocks.span import BlockSpan
from swarm.types import BlockRange
from tests.integration.conftest import NUM_BLOCKS, save_tiny_llama


class TimedSpan:
    """Two blocks; a batch takes 10 ms, and 1 ms for each of its tokens."""

    blocks = BlockRange(3, 5)
    hidden_size, num_pages, max_positions = 4, 256, 4096
    num_parameter_bytes, page_bytes = 2000, 600

    def __init__(self):
        self.now = 0.0

    def new_state(self):
        return None

    def run(self, batch):
        assert len({page for chunk in batch for page in chunk.pages}) == sum(len(chunk.pages) for chunk in batch)
        self.now += 0.010 + 0.001 * sum(len(chunk.hidden_states) for chunk in batch)
        return [chunk.hidden_states for chunk in batch]


def test_speed_is_measured_per_block_for_batches_of_each_size():
    """Rows and blocks are counted; memory is shared out."""
    span = TimedSpan()
    facts = measure(span, clock=lambda: span.now)
    assert facts.decode_tps == pytest.approx({size: 2 * size / (0.010 + 0.001 * size) for size in BATCH_SIZES})
    assert facts.prefill_tps == pytest.approx(2 * 128 / 0.138)
    assert (facts.weight_bytes, facts.page_bytes) == (1000, 300)
    assert facts.single_tps == facts.decode_tps[1] and facts.batch_tps == facts.decode_tps[32]
    assert facts.num_blocks == 2


def test_a_span_with_a_small_cache_is_measured_as_far_as_it_goes():
    """No batch that the cache can't hold is tried."""
    span = TimedSpan()
    span.num_pages, span.max_positions = 8, 16
    facts = measure(span, clock=lambda: span.now)
    assert list(facts.decode_tps) == [1] and facts.prefill_tps > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return resolve(str(save_tiny_llama(tmp_path_factory.mktemp("facts") / "tiny")))


def store_of(checkpoint, cache_dir, **changes):
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "quantization": "none", **changes}
    return FactsStore(checkpoint, cache_dir=cache_dir, **settings)


def test_facts_are_measured_once_per_machine_model_and_format(checkpoint, tmp_path, monkeypatch):
    """The second time nothing is loaded; another format is another question; damaged notes are measured again."""
    facts = store_of(checkpoint, tmp_path).of_block(2)
    assert facts.weight_bytes > 0 and facts.page_bytes == 2 * 16 * 2 * 16 * 4  # K and V, 2 heads of 16, fp32
    assert store_of(checkpoint, tmp_path).known() == facts
    assert store_of(checkpoint, tmp_path, dtype=torch.bfloat16).known() is None
    monkeypatch.setattr(block_facts, "measure", lambda span: pytest.fail("measured again"))
    assert store_of(checkpoint, tmp_path).of_block(0) == facts
    (note,) = (tmp_path / "blocks").iterdir()
    note.write_text('{"weight_bytes": -1}')
    assert store_of(checkpoint, tmp_path).known() is None


def test_facts_of_one_block_are_replaced_by_those_of_a_longer_span(checkpoint, tmp_path, monkeypatch):
    """A block that is alone may fit into the processor's caches; what a span shows is not measured again."""
    store = store_of(checkpoint, tmp_path)
    assert store.of_block(0).num_blocks == 1
    span = BlockSpan.load(checkpoint, BlockRange(0, 3), num_pages=64)
    facts = store.of_span(span)
    assert facts.num_blocks == 3 and store.known() == facts
    monkeypatch.setattr(block_facts, "measure", lambda span: pytest.fail("measured again"))
    assert store.of_span(span) == facts


def test_what_was_measured_long_ago_is_measured_again_when_blocks_are_loaded(checkpoint, tmp_path):
    """The machine may have been busy then; where only memory is asked for, the old note will do."""
    store, span = store_of(checkpoint, tmp_path), BlockSpan.load(checkpoint, BlockRange(0, 3), num_pages=64)
    wrong = msgspec.structs.replace(store.of_span(span), prefill_tps=1e-3)
    store.remember(wrong)
    assert store.of_span(span) == store.of_block(0) == wrong
    (note,) = (tmp_path / "blocks").iterdir()
    long_ago = note.stat().st_mtime - MAX_AGE_S - 60.0
    os.utime(note, (long_ago, long_ago))
    assert store.of_block(0) == wrong
    assert store.of_span(span).prefill_tps > 1e-3 < store.known().prefill_tps


def test_a_cache_that_cannot_be_written_is_no_obstacle(checkpoint, tmp_path, caplog):
    """The facts are used all the same."""
    (tmp_path / "blocks").write_text("a file where the directory should be")
    assert isinstance(store_of(checkpoint, tmp_path).of_block(0), BlockFacts)
    assert "will measure this model again" in caplog.text


def test_equal_blocks_are_equally_large(checkpoint):
    """All blocks of a Llama have as many parameters."""
    assert largest_part(checkpoint, NUM_BLOCKS - 1) == 1.0
