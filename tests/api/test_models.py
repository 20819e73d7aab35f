"""Names, prompts and defaults of what is served."""

from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from swarm.api.errors import ApiError
from swarm.api.models import Models, ServedModel, _defaults, _endless
from swarm.api.prompts import Prompts
from swarm.api.sampling import Sampling


def test_models_are_found_by_name(served: ServedModel) -> None:
    """Or the names that there are, are told."""
    models = Models([served])
    assert models.find(served.name) is served and models.all == (served,)
    with pytest.raises(ApiError, match=f"there is {served.name}") as caught:
        models.find("nobody")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Sampling(temperature=1.0)),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling(temperature=1.0)),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            Sampling(temperature=0.6, top_p=0.9, top_k=20),
        ),
    ],
)
def test_defaults_are_openais_or_the_authors(settings: dict[str, Any], expected: Sampling) -> None:
    """A checkpoint that is to be sampled says how; for the others there is a temperature of 1."""
    assert _defaults(GenerationConfig(**settings)) == expected


def test_served_models_have_no_end_of_their_own() -> None:
    """Ends and choices are made here; what the authors forbid stays forbidden."""
    settings = GenerationConfig(
        eos_token_id=[2, 3], do_sample=True, temperature=0.5, repetition_penalty=1.1, suppress_tokens=[7], max_length=20
    )
    changed = _endless(settings)
    assert (changed.eos_token_id, changed.do_sample, changed.temperature, changed.max_length) == (
        None,
        False,
        None,
        None,
    )
    assert (changed.repetition_penalty, changed.suppress_tokens) == (1.1, [7])
    assert settings.eos_token_id == [2, 3], "the model's own are left alone"


def test_a_chat_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Base models complete texts only."""
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ApiError, match="no chat template"):
            Prompts(tokenizer, 96).chat([{"role": "user", "content": "w3"}])
    finally:
        tokenizer.chat_template = template


def test_what_a_template_refuses_is_the_clients_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    """Many want turns to alternate, and say so."""
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(ApiError, match="roles must alternate"):
            Prompts(tokenizer, 96).chat([{"role": "user", "content": "w3"}])
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("prompt", ["", [], [96], [-1], [1, 1 << 40]])
def test_prompts_without_tokens_and_ids_that_are_none_are_refused(
    tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    """Before anything is looked up in a table of embeddings."""
    with pytest.raises(ApiError) as caught:
        Prompts(tokenizer, 96).text(prompt)
    assert caught.value.param == "prompt"


def test_limits_of_a_tokenizers_file_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    """A prompt is never cut in silence."""
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert len(Prompts(tokenizer, 96).text("w3 w4 w5")) == 3
