"""What a server says of its machine: nothing at first, then what was measured, then what use has shown."""

from types import SimpleNamespace

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.errors import ConfigError
from swarm.server import latest_facts as latest_facts_module
from swarm.server.block_facts import BlockFacts
from swarm.server.latest_facts import LatestFacts
from swarm.server.speeds import WINDOW_S
from swarm.types import BlockRange
from tests.integration.conftest import save_tiny_llama

FACTS = BlockFacts(
    weight_bytes=10_000_000, page_bytes=1, decode_tps={1: 50.0, 32: 400.0}, prefill_tps=1.0, num_blocks=4
)


@pytest.fixture
def plan(tmp_path):
    """For a tiny model, as far as facts are concerned."""
    return SimpleNamespace(
        checkpoint=resolve(str(save_tiny_llama(tmp_path / "tiny"))),
        quantization="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_a_speed_that_batches_do_not_bear_out_is_set_right_and_remembered(plan, tmp_path, monkeypatch):
    """Measured while the machine was busy: ten minutes of use say that it is twice as fast."""
    now = 1000.0
    monkeypatch.setattr(latest_facts_module.time, "monotonic", lambda: now)
    facts = LatestFacts(plan, tmp_path)
    facts.ran({})
    facts.latest = FACTS
    facts.ran({})
    now += WINDOW_S
    facts.ran({(1, 4): (100_000, 100_000 * 4 / 100.0)})
    assert facts.latest.single_tps == pytest.approx(100.0, rel=1e-3)
    assert LatestFacts(plan, tmp_path)._store.known() == facts.latest


async def test_a_block_is_measured_before_any_is_held(plan, tmp_path):
    """Nothing is known at first; then what one block shows, which the next start finds."""
    facts = LatestFacts(plan, tmp_path)
    assert facts.latest is None and facts.batch_tps == 0.0
    measured = await facts.of_block(0)
    assert facts.latest is measured and facts.batch_tps == measured.batch_tps > 0
    assert await LatestFacts(plan, tmp_path).of_block(1) == measured


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda facts: facts.of_block(2), "block 2 can't be loaded here: out of memory$"),
        (lambda facts: facts.of_span(SimpleNamespace(blocks=BlockRange(0, 3))), "blocks 0:3 can't be run here: out of"),
    ],
)
async def test_blocks_that_do_not_run_here_are_told_in_one_line(plan, tmp_path, monkeypatch, measure, message):
    """What torch says of memory is long, and no fault of ours."""

    def fails(of):
        raise RuntimeError("out of memory\nand many lines more")

    facts = LatestFacts(plan, tmp_path)
    monkeypatch.setattr(facts._store, "of_block", fails)
    monkeypatch.setattr(facts._store, "of_span", fails)
    with pytest.raises(ConfigError, match=message):
        await measure(facts)
    assert facts.latest is None
