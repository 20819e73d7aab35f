"""Two chained spans give the gradients of plain transformers, for inputs and for prompts at every block."""

import pytest

from tests.families.configs import FAMILIES
from tests.families.gradients import compare_gradients
from tests.families.test_blocks import skip_if_newer

TOLERANCE = 1e-4
TRAINED = (
    "llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gptj", "gpt_neox", "bloom", "mpt", "falcon-7b", "falcon-40b",
    "opt", "phi", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "cohere2", "olmo2", "granite",
    "mamba2", "qwen3_next", "bitnet",
)  # fmt: skip
"""One for every peculiarity; all of FAMILIES were compared when this was written (docs/log.md)."""


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_local_autograd(name, tmp_path):
    """Ragged sequences, with all graphs kept and with nothing kept but the inputs."""
    skip_if_newer(name, FAMILIES[name].model_type)
    assert compare_gradients(FAMILIES[name], tmp_path) < TOLERANCE
