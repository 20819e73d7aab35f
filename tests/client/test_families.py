"""Through remote blocks, `generate` gives the tokens and logits of plain transformers, for many kinds of models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.client.conftest import Pair

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "deepseek_v3",
    "cohere2",
    "olmo2",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "bloom",
    "falcon-7b",
    "mpt",
    "opt",
    "lfm2",
    "qwen3_next",
)
STATEFUL = {"lfm2", "qwen3_next"}
"""Their states can't be rolled back, so transformers refuses to guess tokens ahead with them."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beams with several answers": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.3},
}


def prompts(rows: int) -> dict[str, torch.Tensor]:
    """Nine columns of tokens; in a batch, the first and last rows are padded on the left."""
    torch.manual_seed(7)
    ids = torch.randint(3, 96, (rows, 9))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :4] = 0
        mask[-1, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]) -> Pair:
    """A tiny model of each family."""
    return make_pair(request.param)


def same_tokens(pair: Pair, inputs: dict[str, torch.Tensor], **options: Any) -> bool:
    """Whether both models generate the same, and no session stays open."""
    found = []
    for model in (pair.local, pair.distributed):
        torch.manual_seed(5)
        found.append(model.generate(**inputs, max_new_tokens=8, **options))
    return torch.equal(*found) and pair.service.num_open == 0


@pytest.mark.parametrize("rows", [1, 3], ids=["one prompt", "left-padded batch"])
def test_generates_the_tokens_of_transformers(family: Pair, rows: int) -> None:
    """Greedy, sampled, beams, several answers, penalties: token for token, for one prompt and a padded batch."""
    different = [name for name, options in MODES.items() if not same_tokens(family, prompts(rows), **options)]
    assert different == []


def test_chunked_prompts_and_guessed_tokens_change_nothing(family: Pair) -> None:
    """Prefill in chunks and prompt lookup, which rolls back what it guessed wrongly."""
    assert same_tokens(family, prompts(1), prefill_chunk_size=4)
    if family.local.config.model_type not in STATEFUL:
        repetitive = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])}
        assert same_tokens(family, repetitive, prompt_lookup_num_tokens=3)


def test_logits_of_each_step_equal_those_of_transformers(family: Pair) -> None:
    """Within 1e-4: tokens alone say little for tiny models with tied embeddings."""
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    expected = family.local.generate(**prompts(3), max_new_tokens=6, **options)
    found = family.distributed.generate(**prompts(3), max_new_tokens=6, **options)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_whole_sequence_logits_equal_those_of_transformers(family: Pair) -> None:
    """A plain call of the model, without a session, gives all positions' logits and the loss."""
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        expected = family.local(ids, labels=ids, use_cache=False)
        found = family.distributed(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    assert family.service.num_open == 0
