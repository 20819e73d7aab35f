"""An adapter is a directory, or lies on the hub and is checked on its way."""

import json

import pytest
import torch
from safetensors.torch import save_file

from swarm.adapters.source import resolve_adapter
from swarm.errors import AdapterError
from tests.swarm.checkpoint.fake_hub import serve_hub


def write(directory, *, tensors="adapter_model.safetensors"):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (directory / "README.md").write_text("about")
    save_file({"a": torch.ones(4)}, directory / tensors)
    return directory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["org/adapter"] = write(tmp_path / "adapter")
        yield hub


def test_a_directory_is_used_where_it_lies(tmp_path):
    """Even if its name looks like a hub id."""
    directory = write(tmp_path / "mine")
    assert resolve_adapter(directory) == directory.resolve()


def test_the_two_files_come_from_the_hub(hub, tmp_path):
    """And nothing else; the second time nothing at all."""
    for _ in range(2):
        found = resolve_adapter("org/adapter", cache_dir=tmp_path / "cache")
        assert (found / "adapter_model.safetensors").read_bytes() == (
            hub.repos["org/adapter"] / "adapter_model.safetensors"
        ).read_bytes()
        assert sorted(hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]


def test_other_bytes_than_announced_are_refused(hub, tmp_path):
    """The hub's own hash is believed, not what came."""
    hub.corrupt.add("adapter_model.safetensors")
    with pytest.raises(AdapterError, match="SHA-256|consistency|size"):
        resolve_adapter("org/adapter", cache_dir=tmp_path / "cache")


def test_a_pickle_on_the_hub_is_not_even_fetched(hub, tmp_path):
    """Its name is enough."""
    hub.repos["org/pickle"] = write(tmp_path / "pickle", tensors="adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model.bin, a pickle"):
        resolve_adapter("org/pickle", cache_dir=tmp_path / "cache")
    assert "adapter_model.bin" not in hub.fetched


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", {}, "no such directory, and it is no hub id"),
        ("", {}, "no such directory"),
        ("../up", {}, "no such directory"),
        (".", {"revision": "main"}, "is not a hub id"),
        ("org/missing", {}, "org/missing"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(hub, tmp_path, name, options, message):
    """One error, which says what was looked for."""
    with pytest.raises(AdapterError, match=message):
        resolve_adapter(name, cache_dir=tmp_path / "cache", **options)
