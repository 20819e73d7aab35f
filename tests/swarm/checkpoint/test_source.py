"""A name becomes a checkpoint, or an error that says what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.checkpoint.source import resolve
from swarm.errors import CheckpointMismatch, InvalidRequest, UnknownModel, UnsupportedModel

Write = Callable[..., Path]


def test_a_directory_is_used_where_it_lies(tmp_path: Path, write_checkpoint: Write) -> None:
    """Nothing is copied, and all its shards are there already."""
    directory = write_checkpoint(tmp_path / "tiny")
    found = resolve(directory, cache_dir=tmp_path / "cache")
    assert (found.name, found.path) == ("tiny", directory)
    assert found.ensure(found.shards) == {shard: directory / shard for shard in found.shards}
    assert len(found.shards) == 3


def test_equal_content_has_one_digest_under_any_name(tmp_path: Path, write_checkpoint: Write) -> None:
    """A copy, even one saved by another transformers version, is the same model."""
    first = write_checkpoint(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "transformers_version": "5.17.1"}, indent=8))
    cache = tmp_path / "cache"
    assert resolve(first, cache_dir=cache).digest == resolve(second, cache_dir=cache).digest


def test_other_weights_or_another_config_have_another_digest(tmp_path: Path, write_checkpoint: Write) -> None:
    """One number or one setting makes a different model."""
    plain = write_checkpoint(tmp_path / "plain")
    trained = write_checkpoint(tmp_path / "trained", seed=1)
    renamed = write_checkpoint(tmp_path / "renamed", config={"model_type": "llama", "hidden_size": 16})
    cache = tmp_path / "cache"
    assert len({resolve(it, cache_dir=cache).digest for it in (plain, trained, renamed)}) == 3


def test_only_weight_files_of_the_checkpoint_can_be_asked_for(tmp_path: Path, write_checkpoint: Write) -> None:
    """The message tells which name was wrong."""
    found = resolve(write_checkpoint(tmp_path / "tiny"), cache_dir=tmp_path / "cache")
    with pytest.raises(InvalidRequest, match=r"'config.json' is none of the 3 weight files of tiny"):
        found.ensure(["config.json"])


def test_a_missing_weight_file_is_named(tmp_path: Path, write_checkpoint: Write) -> None:
    """Half a download is no checkpoint."""
    directory = write_checkpoint(tmp_path / "tiny")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"misses 1 of 3 weight files: model-00002"):
        resolve(directory, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smollm3", r"embedded model \(smollm2-135m-instruct\).*org/name"),
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("~/nowhere", "no such directory"),
        ("", "no embedded model"),
        ("a b/c", "no hub id"),
    ],
)
def test_an_unknown_name_says_what_was_tried(tmp_path: Path, name: str, reason: str) -> None:
    """Each message says what to type instead."""
    with pytest.raises(UnknownModel, match=reason):
        resolve(name, cache_dir=tmp_path)


def test_only_hub_models_have_revisions(tmp_path: Path, write_checkpoint: Write) -> None:
    """A revision of a directory would be silently ignored otherwise."""
    with pytest.raises(InvalidRequest, match="not a hub id"):
        resolve(write_checkpoint(tmp_path / "tiny"), revision="main")


def test_a_config_that_transformers_cannot_read_is_unsupported(tmp_path: Path, write_checkpoint: Write) -> None:
    """Models with their own code are refused: nothing from a checkpoint is ever run."""
    directory = write_checkpoint(
        tmp_path / "tiny", config={"model_type": "no-such-type", "auto_map": {"AutoConfig": "x.Y"}}
    )
    (directory / "x.py").write_text("raise SystemExit('ran code from a checkpoint')")
    with pytest.raises(UnsupportedModel, match="tiny"):
        resolve(directory, cache_dir=tmp_path / "cache").config()


def test_resolving_loads_no_heavy_library(tmp_path: Path, write_checkpoint: Write) -> None:
    """A server's start can't wait for torch just to learn which model it serves."""
    code = (
        "import sys; from swarm.checkpoint.source import resolve; resolve(sys.argv[1], cache_dir=sys.argv[2]);"
        "print([it for it in ('torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy') if it in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(write_checkpoint(tmp_path / "tiny")), str(tmp_path / "cache")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
