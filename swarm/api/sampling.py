"""Chooses the next token of each row as OpenAI's parameters say: penalties, bias, temperature, top_k, top_p, seed.

    logits [rows, V] ─► logprobs (as the model has them) ─► penalties, bias ─► temperature, top_k, top_p ─► draw
                                                       logits in which only the chosen token is possible ◄─┘

transformers draws from torch's global generator, which all threads share, so that a seed would mean nothing. Here every
row has a generator of its own, and `generate` is left with one token to choose from: it runs greedily.

Shapes: R rows, V vocabulary, T tokens so far.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from swarm.errors import PeerMisbehaved

MIN_TEMPERATURE = 1e-5
"""Anything between this and 0 is taken for this: fp32 has no room for less."""
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON doesn't have; OpenAI's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; every field has its value."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    """How many of the likeliest tokens to note; None: no logprobs."""

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated so far matters."""
        return bool(self.frequency_penalty or self.presence_penalty)

    @property
    def is_plain(self) -> bool:
        """Whether transformers' own greedy choice is all that is needed."""
        return not (self.temperature or self.has_penalties or self.logit_bias or self.top_logprobs is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely the model found a token, before penalties and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place."""


class Sampler(LogitsProcessor):
    """The last logits processor of a greedy `generate`.

    Args:
        sampling: how to choose.
        prompt_tokens: length of the prompt; penalties count what comes after it.
        rows: sequences that are generated together.
    """

    def __init__(self, sampling: Sampling, *, prompt_tokens: int, rows: int):
        self._sampling, self._prompt_tokens = sampling, prompt_tokens
        self._generators = [row_generator(sampling.seed, row) for row in range(rows)]
        self.logprobs: list[Logprob] = []
        """Of the tokens just chosen, per row; empty where nobody wants them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Token ids [R, T] and logits [R, V] to logits with one possible token per row."""
        chosen_R = self._choose(input_ids, scores)
        if self._sampling.top_logprobs is not None:
            self.logprobs = logprobs(scores, chosen_R, self._sampling.top_logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_R[:, None], 0.0)

    def _choose(self, ids_RT: torch.Tensor, logits_RV: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if sampling.has_penalties or sampling.logit_bias:
            logits_RV = penalised(logits_RV, ids_RT[:, self._prompt_tokens :], sampling)
        if not sampling.temperature:
            return logits_RV.argmax(-1)
        probabilities_RV = distribution(logits_RV, sampling)
        draws = [
            torch.multinomial(row_V, 1, generator=generator)
            for row_V, generator in zip(probabilities_RV, self._generators, strict=True)
        ]
        return torch.cat(draws)


def row_generator(seed: int | None, row: int) -> torch.Generator:
    """Random numbers of one row; those of a seed don't depend on how many rows there are."""
    name = f"{seed}:{row}".encode() if seed is not None else secrets.token_bytes(16)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "big"))


def penalised(logits_RV: torch.Tensor, generated_RT: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits less what was said already, plus the bias; OpenAI's formula."""
    result_RV = logits_RV.clone()
    if sampling.has_penalties:
        ones_RT = torch.ones_like(generated_RT, dtype=logits_RV.dtype)
        counts_RV = torch.zeros_like(logits_RV).scatter_add_(1, generated_RT, ones_RT)
        result_RV -= sampling.frequency_penalty * counts_RV + sampling.presence_penalty * (counts_RV > 0)
    for token, bias in sampling.logit_bias:
        result_RV[:, token] += bias
    return result_RV


def distribution(logits_RV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities to draw from; at least the likeliest token of a row keeps some.

    Raises:
        PeerMisbehaved: the logits are no numbers, so some server's outputs were none.
    """
    logits_RV = logits_RV.float()
    if 0 < sampling.top_k < logits_RV.shape[1]:
        least_R1 = logits_RV.topk(sampling.top_k).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, float("-inf"))
    probabilities_RV = (logits_RV / max(sampling.temperature, MIN_TEMPERATURE)).softmax(-1)
    if bool(probabilities_RV.isnan().any()):
        raise PeerMisbehaved("the outputs of the last block are no numbers")
    if sampling.top_p < 1.0:
        sorted_RV, order_RV = probabilities_RV.sort(descending=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        beyond_RV = before_RV >= sampling.top_p
        beyond_RV[:, 0] = False
        probabilities_RV = probabilities_RV.scatter(1, order_RV, sorted_RV.masked_fill(beyond_RV, 0.0))
    return probabilities_RV


def logprobs(logits_RV: torch.Tensor, chosen_R: torch.Tensor, num_top: int) -> list[Logprob]:
    """The log probabilities of the chosen tokens and of the `num_top` likeliest ones."""
    logprobs_RV = logits_RV.float().log_softmax(-1).clamp_min(MIN_LOGPROB)
    top = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]))
    chosen = logprobs_RV.gather(1, chosen_R[:, None])[:, 0]
    rows = zip(chosen_R.tolist(), chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Logprob(token=token, logprob=logprob, top=_pairs(indices, values)) for token, logprob, indices, values in rows
    ]


def _pairs(tokens: Sequence[int], values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple(zip(tokens, values, strict=True))
