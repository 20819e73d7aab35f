"""What a batch costs, learnt from batches: the prompt tokens that may go along follow from it."""

import random

import pytest

from swarm.server.step_cost import MIN_PROMPT_TOKENS, STALL, StepCost


def seconds(num_decode, num_prompt, noise=1.0):
    """A machine: 20 ms, half a millisecond per row, 2 ms per prompt token."""
    return (0.02 + 0.0005 * num_decode + 0.002 * num_prompt) * noise


def test_without_decode_rows_a_prompt_gets_the_whole_budget():
    """There is nobody to be stalled."""
    assert StepCost().prompt_limit(0, 512) == 512


def test_before_anything_is_measured_the_limit_is_modest():
    """A guess that is neither nothing nor a whole chunk."""
    assert MIN_PROMPT_TOKENS < StepCost().prompt_limit(8, 512) < 100


@pytest.mark.parametrize("num_decode", [1, 8, 32])
def test_a_learnt_limit_keeps_the_stall(num_decode):
    """With noise on the measurements, the batch with prompt tokens takes (1 + STALL) times the one without."""
    dice, cost = random.Random(1), StepCost()
    for _ in range(200):
        rows = dice.choice([0, 1, 4, 8, 32])
        tokens = cost.prompt_limit(rows, 512) if dice.random() < 0.5 or not rows else 0
        cost.observe(rows, tokens, seconds(rows, tokens, dice.uniform(0.9, 1.1)))
    limit = cost.prompt_limit(num_decode, 512)
    stall = seconds(num_decode, limit) / seconds(num_decode, 0) - 1
    assert 0.6 * STALL < stall < 1.4 * STALL


def test_a_long_time_of_decoding_does_not_make_it_forget_what_prompts_cost():
    """The first prompt after an hour is limited as well as the one before."""
    cost = StepCost()
    for tokens in (16, 200, 512):
        cost.observe(0, tokens, seconds(0, tokens))
    for _ in range(5000):
        cost.observe(8, 0, seconds(8, 0))
    stall = seconds(8, cost.prompt_limit(8, 512)) / seconds(8, 0) - 1
    assert 0.5 * STALL < stall < 1.5 * STALL


def test_it_follows_a_machine_that_gets_slower():
    """Another process has taken half of the cores."""
    cost = StepCost()
    for factor in (1.0, 2.0):
        for _ in range(100):
            cost.observe(8, 0, factor * seconds(8, 0))
            cost.observe(8, 6, factor * seconds(8, 6))
    assert cost.seconds(8, 0) == pytest.approx(2 * seconds(8, 0), rel=0.1)


def test_one_measurement_of_either_kind_is_enough_for_a_sensible_limit():
    """A prompt alone, or decoding alone, gives the scale; the other is guessed from it."""
    for rows, tokens in ((0, 512), (8, 0)):
        cost = StepCost()
        cost.observe(rows, tokens, seconds(rows, tokens))
        assert MIN_PROMPT_TOKENS <= cost.prompt_limit(8, 512) < 200


def test_no_coefficient_is_negative_whatever_was_measured():
    """Nonsense (larger batches that took less time) limits more or less, but never below the least."""
    dice, cost = random.Random(2), StepCost()
    for _ in range(100):
        cost.observe(dice.randint(0, 30), dice.randint(0, 100), dice.uniform(1e-6, 10))
        assert min(cost._fit()) >= 0
        assert MIN_PROMPT_TOKENS <= cost.prompt_limit(dice.randint(1, 64), 512) <= 512
