"""Every supported model family gives plain transformers' numbers through two chained spans; the others are refused."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from swarm.errors import UnsupportedModel
from swarm.server.blocks import BlockSpan
from swarm.types import BlockRange
from tests.families.configs import FAMILIES, REFUSED
from tests.families.harness import SavedCheckpoint, compare

TOLERANCE = 1e-4
NEWER = {"olmo_hybrid": "5.23"}
"""Types whose layers an older transformers runs in a way that our self-check refuses, and a release that works."""


def skip_if_newer(name: str, model_type: str) -> None:
    """Not every transformers from 5.17 on knows every type."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} doesn't know {model_type}")
    if Version(transformers.__version__) < Version(NEWER.get(name, "0")):
        pytest.skip(f"{model_type} needs transformers {NEWER[name]}")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_chained_spans_give_the_logits_of_transformers(name, tmp_path):
    """Ragged batches of prefill chunks and decode rows, with weights loaded block by block from a saved checkpoint."""
    skip_if_newer(name, FAMILIES[name].model_type)
    assert compare(FAMILIES[name], tmp_path) < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_run_wrongly_is_refused_with_the_reason(name, tmp_path):
    """No model falls through silently to a path without a causal mask or with mixed sessions."""
    family, reason = REFUSED[name]
    skip_if_newer(name, family.model_type)
    family.model().save_pretrained(tmp_path)
    checkpoint = SavedCheckpoint(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        BlockSpan.load(checkpoint, BlockRange(0, 2), num_pages=1)


def test_at_least_sixty_model_types_are_supported():
    """The breadth that the table in the docs promises."""
    assert len({family.model_type for family in FAMILIES.values()}) >= 60


def test_the_table_in_the_docs_is_up_to_date():
    """docs/families.md is generated from the same registry."""
    from tests.families.make_table import TARGET, table

    assert TARGET.read_text() == table()
