"""Tokens are chosen as OpenAI's parameters say, per row and repeatably."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from swarm.api.sampling import MIN_LOGPROB, Sampler, Sampling, distribution, logprobs, penalised
from swarm.errors import PeerMisbehaved

VOCABULARY = 12


def choose(logits: torch.Tensor, generated: list[list[int]] | None = None, **settings: Any) -> list[int]:
    """The tokens that a new sampler chooses after a prompt of two tokens."""
    rows = len(logits)
    ids = torch.tensor([[0, 1, *(generated[row] if generated else [])] for row in range(rows)])
    scores = Sampler(Sampling(**settings), prompt_tokens=2, rows=rows)(ids, logits)
    assert (scores > float("-inf")).sum(1).tolist() == [1] * rows
    return scores.argmax(-1).tolist()


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    """Whatever the other settings are."""
    logits = random_logits(0, rows=3)
    assert choose(logits, top_p=0.5, top_k=2, seed=1) == logits.argmax(-1).tolist()


def test_a_seed_repeats_each_row() -> None:
    """Also when other rows come with it, and rows differ from each other."""
    logits = torch.zeros(1, 1000)
    alone = choose(logits, temperature=1.0, seed=7)
    together = choose(logits.repeat(3, 1), temperature=1.0, seed=7)
    assert together[0] == alone[0]
    assert len(set(together)) == 3
    assert choose(logits, temperature=1.0, seed=8) != alone


def test_without_a_seed_answers_differ() -> None:
    """Each sampler has a seed of its own."""
    logits = torch.zeros(1, 1 << 20)
    assert choose(logits, temperature=1.0) != choose(logits, temperature=1.0)


@example(seed=0, temperature=0.5, top_p=1 - 2**-53, top_k=0)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.05, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, VOCABULARY + 2),
)
def test_the_distribution_is_that_of_transformers(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    """Its warpers, in its order, give the same probabilities; rounding may decide about one at top_p, or crumbs."""
    logits = random_logits(seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)
    found = distribution(logits, Sampling(temperature=temperature, top_p=top_p, top_k=top_k))
    found = found / found.sum()
    kept = found > 0
    if (kept == (expected > 0)).all():
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    else:
        differs = kept != (expected > 0)
        assert int(differs.sum()) == 1 or float(torch.maximum(found, expected)[differs].sum()) < 1e-5


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 2.0])
@pytest.mark.parametrize("top_p", [0.0, 1e-9, 1.0])
def test_extreme_settings_still_choose_a_token(temperature: float, top_p: float) -> None:
    """No division by what fp32 takes for zero, and top_p of 0 leaves the likeliest."""
    logits = random_logits(3)
    found = choose(logits, temperature=temperature, top_p=top_p, seed=1)
    if top_p < 1 or temperature < 1:
        assert found == logits.argmax(-1).tolist()


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    """Presence once, frequency for each time."""
    logits = torch.zeros(1, VOCABULARY)
    generated = torch.tensor([[4, 4, 5]])
    found = penalised(logits, generated, Sampling(frequency_penalty=0.5, presence_penalty=1.0))
    expected = torch.zeros(VOCABULARY)
    expected[4], expected[5] = -2.0, -1.5
    assert torch.equal(found[0], expected)
    assert not logits.any(), "the caller's logits are left alone"


def test_penalties_reach_the_choice() -> None:
    """A token that was said is said no more."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4], logits[0, 5] = 1.0, 0.5
    assert choose(logits, [[4]]) == [4]
    assert choose(logits, [[4]], presence_penalty=2.0) == [5]


def test_a_bias_forces_or_forbids_a_token() -> None:
    """As -100 and 100 do."""
    logits = random_logits(5)
    best = int(logits.argmax())
    assert choose(logits, logit_bias=((3, 100.0),)) == [3]
    assert choose(logits, logit_bias=((best, -100.0),)) != [best]


def test_logprobs_are_the_models_own() -> None:
    """Before penalties and temperature, of the token that was chosen and of the likeliest ones."""
    logits = random_logits(6)
    sampler = Sampler(Sampling(logit_bias=((3, 100.0),), top_logprobs=2), prompt_tokens=1, rows=1)
    sampler(torch.tensor([[0]]), logits)
    expected = logits.log_softmax(-1)[0]
    [found] = sampler.logprobs
    assert found.token == 3
    assert found.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in found.top] == expected.topk(2).indices.tolist()


def test_impossible_tokens_have_a_finite_logprob() -> None:
    """JSON has no infinities."""
    logits = torch.tensor([[0.0, float("-inf")]])
    [found] = logprobs(logits, torch.tensor([1]), 2)
    assert found.logprob == MIN_LOGPROB


def test_outputs_that_are_no_numbers_are_the_servers_fault() -> None:
    """A server may send what it likes."""
    with pytest.raises(PeerMisbehaved, match="no numbers"):
        choose(torch.full((1, VOCABULARY), float("nan")), temperature=1.0)


def test_plain_greedy_needs_no_sampler() -> None:
    """Anything else does."""
    assert Sampling().is_plain
    for settings in (
        {"temperature": 0.1},
        {"presence_penalty": 1.0},
        {"frequency_penalty": -1.0},
        {"logit_bias": ((1, 1.0),)},
        {"top_logprobs": 0},
    ):
        assert not Sampling(**settings).is_plain
