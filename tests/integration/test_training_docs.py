"""The examples of docs/training.md run as they stand, but for fewer steps and a tiny model."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest

from tests.client.conftest import tokenizer  # noqa: F401 - a fixture
from tests.integration.conftest import LocalSwarm

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def place(swarm: LocalSwarm, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A directory with the files that the examples read, and a model with a tokenizer."""
    path = tmp_path_factory.mktemp("docs")
    tokenizer.save_pretrained(shutil.copytree(swarm.model, path / "model"))
    question, answer, other = ({"role": role, "content": text} for role, text in
                               (("user", "w1 w2"), ("assistant", "w3 w4 w5"), ("assistant", "w6")))  # fmt: skip
    chats = [{"messages": [question, answer]}] * 4
    pairs = [{"prompt": [question], "chosen": [answer], "rejected": [other]}] * 8
    for name, rows in (("chats", chats), ("preferences", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "reviews.csv").write_text("text,label\n" + "w1 w2 w3,0\nw4 w5,1\n" * 8)
    return path


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_an_example_runs(index, swarm: LocalSwarm, place: Path, monkeypatch):
    """In order: later ones read what earlier ones have written."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    text, _ = re.subn(r"max_steps=\d+", "max_steps=2", BLOCKS[index])
    exec(compile(text, f"docs/training.md, example {index}", "exec"), {"NAME": "model", "PEERS": [swarm.address]})


def test_there_are_examples():
    """Chats, loading, DPO, classification, modules of one's own, verbs."""
    assert len(BLOCKS) == 6
