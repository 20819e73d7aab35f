"""A checkpoint's identity depends on its content alone, and files of strangers are checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.checkpoint.content import content_digest, read_config, read_weight_map
from swarm.errors import CheckpointMismatch, UnknownModel, UnsupportedModel

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=6), st.dictionaries(st.text(min_size=1), st.text(), max_size=4))
def test_the_digest_ignores_order_and_who_wrote_the_config(config: dict[str, Any], shards: dict[str, str]) -> None:
    """Keys in another order and another transformers version name the same content."""
    other = {"transformers_version": "5.17.0", "_name_or_path": "x", **dict(reversed(config.items()))}
    assert content_digest({**config, "transformers_version": "5"}, shards) == content_digest(
        {**other, "_name_or_path": "y"}, dict(reversed(shards.items()))
    )


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=4), st.data())
def test_the_digest_sees_every_weight_file(shards: dict[str, str], data: st.DataObject) -> None:
    """Another hash, another name or one file less is other content."""
    name = data.draw(st.sampled_from(sorted(shards)))
    changed = {**shards, name: shards[name] + "x"}
    fewer = {key: value for key, value in shards.items() if key != name}
    assert len({content_digest({}, it) for it in (shards, changed, fewer)}) == 3


def test_the_digest_sees_the_config() -> None:
    """A model with another rotary base computes something else."""
    assert content_digest({"rope_theta": 1e4}, {}) != content_digest({"rope_theta": 1e5}, {})


def test_a_single_file_needs_no_index(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    """Tensor names come from the file's own header."""
    assert read_weight_map(write_checkpoint(tmp_path, num_shards=1)) == {"model.layers.0.weight": "model.safetensors"}


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", 3, None])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, shard: object) -> None:
    """An index is a stranger's data: it must not lead out of its directory."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointMismatch, match="no name of a safetensors file"):
        read_weight_map(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "{}", '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    """Neither half a file nor another structure passes for an index."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointMismatch):
        read_weight_map(tmp_path)


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, data: bytes) -> None:
    """A header that is longer than its file is never allocated."""
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointMismatch):
        read_weight_map(tmp_path)


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """Reading a pickle can run code, so the message says how to convert it."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedModel, match=r"pickle only \(pytorch_model.bin\).*save_pretrained"):
        read_weight_map(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    """The message names the files that were looked for."""
    with pytest.raises(UnsupportedModel, match=r"neither model.safetensors.index.json nor model.safetensors"):
        read_weight_map(tmp_path)


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    """The first thing that is missing is the one that is named."""
    with pytest.raises(UnknownModel, match=r"no config.json"):
        read_config(tmp_path)
