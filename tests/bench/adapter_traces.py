"""Requests for adapters over time, as published for S-LoRA, dLoRA and Punica, rebuilt from their descriptions.

    slora(n, alpha, cv)   S-LoRA's generator: P(adapter < k) = (k / n) ** alpha, so that less alpha is more skew; gaps
                          are Gamma with coefficient of variation cv; uniform lengths
    dlora(n)              after dLoRA's: each window, each model's share of the rate is drawn anew and its requests come
                          as a Gamma process; lengths like ShareGPT's. Its shares come from Azure's traces, which
                          are not at hand: here they are Zipf with exponent 1.5
    punica(kind, n)       Punica's popularities: distinct, identical, uniform (sqrt(n) adapters), skewed (each group 1.5
                          times as large as the next); Poisson arrivals

Lengths are an eighth of the published ones, so that a simulated minute has as many requests as theirs have on a GPU.
Seeded; times in seconds.
"""

import math
from dataclasses import dataclass

import numpy as np

SHORTER = 8
WINDOW_S = 60.0
"""Of dLoRA's rates; theirs is an hour, as their traces are."""


@dataclass(frozen=True, slots=True)
class Request:
    """One user's question."""

    arrives: float
    adapter: int
    prompt: int
    answer: int


def slora(n: int, alpha: float, cv: float, *, rate: float, duration: float, seed: int = 42) -> list[Request]:
    """S-LoRA's synthetic trace (its benchmarks/trace.py)."""
    random = np.random.default_rng(seed)
    total = int(rate * duration)
    adapters = np.minimum((random.power(alpha, total) * n).astype(int), n - 1)
    times = np.cumsum(random.gamma(1 / cv**2, cv**2 / rate, total))
    lengths = np.maximum(1, random.integers(8, 512, (total, 2)) // SHORTER)
    return _requests(times, adapters, lengths)


def dlora(n: int, *, rate: float, duration: float, seed: int = 42) -> list[Request]:
    """After dLoRA's workload (its artifact's trace generator)."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, n + 1) ** 1.5
    shares /= shares.sum()
    times, adapters = [], []
    for start in np.arange(0.0, duration, WINDOW_S):
        for adapter, share in zip(random.permutation(n), shares, strict=True):
            now = start
            while (now := now + random.exponential(1 / (rate * share))) < min(start + WINDOW_S, duration):
                times.append(now)
                adapters.append(adapter)
    lengths = random.lognormal([math.log(161) - 0.5, math.log(338) - 0.25], [1.0, 0.7], (len(times), 2)) / SHORTER
    lengths = np.clip(lengths, 1, 2048 // SHORTER).astype(int)
    return _requests(np.array(times), np.array(adapters), lengths)


def punica(kind: str, n: int, *, rate: float, duration: float, seed: int = 42) -> list[Request]:
    """Punica's four popularities among n adapters."""
    random = np.random.default_rng(seed)
    total = int(rate * duration)
    used = {"distinct": n, "identical": 1, "uniform": math.isqrt(n - 1) + 1, "skewed": n}[kind]
    shares = 1.5 ** -np.arange(used) if kind == "skewed" else np.ones(used)
    adapters = np.arange(total) % n if kind == "distinct" else random.choice(used, total, p=shares / shares.sum())
    times = np.cumsum(random.exponential(1 / rate, total))
    lengths = np.maximum(1, random.integers(8, 512, (total, 2)) // SHORTER)
    return _requests(times, adapters, lengths)


def _requests(times: np.ndarray, adapters: np.ndarray, lengths: np.ndarray) -> list[Request]:
    order = np.argsort(times, kind="stable")
    return [Request(float(times[i]), int(adapters[i]), int(lengths[i, 0]), int(lengths[i, 1])) for i in order]
