"""What a server loads: it ends soon when it should, and what is wrong with it is said in one line."""

import logging

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.errors import ConfigError, UnknownModel
from swarm.server import loading as loading_module
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import CacheSize, ServerConfig
from swarm.server.loading import Loader, LoadingStopped
from swarm.server.plan import Plan
from swarm.server.weight_files import MeasuredFiles
from swarm.types import BlockRange
from tests.integration.conftest import NUM_BLOCKS, save_tiny_llama

BLOCKS = BlockRange(1, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model in one file."""
    return resolve(str(save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture
def loader(checkpoint):
    """For that model, with a cache of two pages."""
    plan = Plan(
        checkpoint=checkpoint,
        num_blocks=NUM_BLOCKS,
        blocks=BLOCKS,
        is_auto=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization="none",
    )
    config = ServerConfig(model="tiny", cache_size=CacheSize(tokens=17))
    return Loader(config, plan, MeasuredFiles(checkpoint.store))


async def test_blocks_come_with_a_cache_of_the_size_asked_and_progress(loader):
    """A part of a page is a whole one."""
    progress = []
    span = await loader.load_span(BLOCKS, lambda done, total: progress.append((done, total)))
    assert (span.blocks, span.num_pages) == (BLOCKS, 2) and progress[-1] == (3, 3)


async def test_loading_ends_at_the_next_block_when_told_to_stop(loader):
    """A large span takes minutes; the owner has typed Ctrl-C."""
    progress = []

    def stop(done, total):
        progress.append(done)
        loader.stop()

    with pytest.raises(LoadingStopped, match="stopped after loading 2 of 3 blocks"):
        await loader.load_span(BLOCKS, stop)
    assert progress == [1]


async def test_an_adapter_that_comes_too_late_is_not_taken(loader, monkeypatch):
    """It may have been on its way for minutes."""
    monkeypatch.setattr(loading_module, "load_adapter", lambda *args, **options: loader.stop())
    with pytest.raises(LoadingStopped):
        await loader.load_adapter("mine")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("out of memory\nand many lines more"), "out of memory"),
        (MemoryError(), "MemoryError"),
        (OSError("no space left"), "no space left"),
    ],
)
async def test_blocks_that_cannot_be_loaded_are_named_with_the_reason(loader, monkeypatch, error, reason):
    """In one line."""

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(BlockSpan, "load", fails)
    with pytest.raises(ConfigError, match=f"^blocks 1:4 can't be loaded here: {reason}$"):
        await loader.load_span(BLOCKS)


@pytest.mark.parametrize("error", [UnknownModel("the hub is gone"), OSError("no space left")])
async def test_files_that_cannot_be_fetched_ahead_are_no_error_yet(loader, monkeypatch, caplog, error):
    """Loading will tell."""

    def fails(*args):
        raise error

    monkeypatch.setattr(loading_module, "shards_for", fails)
    with caplog.at_level(logging.INFO):
        await loader.fetch_ahead(BLOCKS)
    assert f"can't fetch the files of blocks 1:4: {error}" in caplog.text
