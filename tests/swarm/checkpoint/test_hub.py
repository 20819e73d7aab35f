"""A model on the hub: only what is asked for is downloaded, and what comes is checked."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from swarm.checkpoint.source import Checkpoint, resolve
from swarm.errors import CheckpointMismatch, UnknownModel, UnsupportedModel
from tests.swarm.checkpoint.fake_hub import FakeHub, serve_hub

Write = Callable[..., Path]
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_checkpoint: Write) -> Iterator[FakeHub]:
    """A hub with one model, org/tiny, of three weight files."""
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["org/tiny"] = write_checkpoint(tmp_path / "tiny")
        yield hub


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Resolve with a cache of this test's own."""
    return lambda name="org/tiny", **options: resolve(name, cache_dir=tmp_path / "cache", **options)


def test_only_the_weight_files_that_are_asked_for_are_downloaded(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """Looking up costs the small files; a shard costs itself, once."""
    found = find()
    assert sorted(hub.fetched) == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert (found.path / "tokenizer.json").is_file()
    path = found.ensure([SECOND])[SECOND]
    assert path.read_bytes() == (hub.repos["org/tiny"] / SECOND).read_bytes()
    found.ensure([SECOND])
    assert hub.fetched.count(SECOND) == 1
    assert not [name for name in hub.fetched if name.startswith(("model-00001", "model-00003"))]


def test_a_directory_and_its_twin_on_the_hub_have_one_digest(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """Peers that downloaded a model and peers that copied it serve each other, without downloading to compare."""
    assert find().digest == find(hub.repos["org/tiny"]).digest
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_one_file_without_an_index_is_a_checkpoint_too(
    hub: FakeHub, find: Callable[..., Checkpoint], tmp_path: Path, write_checkpoint: Write
) -> None:
    """Its header serves as the index."""
    hub.repos["org/single"] = write_checkpoint(tmp_path / "single", num_shards=1)
    found = find("org/single")
    assert found.weight_map == {"model.layers.0.weight": "model.safetensors"}
    assert found.digest == find(tmp_path / "single").digest


def test_weight_files_inside_git_are_hashed_here(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """The hub keeps no SHA-256 of small files, so they are fetched for it."""
    hub.large = re.compile("nothing")
    assert find().digest == find(hub.repos["org/tiny"]).digest


def test_a_model_that_was_used_before_is_found_without_a_network(
    hub: FakeHub, find: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was downloaded can be served offline; what wasn't is an error that names the file."""
    online = find()
    online.ensure([SECOND])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = find()
    assert offline.digest == online.digest
    assert offline.ensure([SECOND]) == online.ensure([SECOND])
    with pytest.raises(UnknownModel, match="can't download model-00001-of-00003.safetensors of org/tiny"):
        offline.ensure(["model-00001-of-00003.safetensors"])


def test_a_model_that_was_never_used_needs_the_network(
    find: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message tells a misspelt path from a dead network."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnknownModel, match=r"can't look up org/other \(no such directory here"):
        find("org/other")


def test_a_full_commit_is_looked_up_once(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """A commit can't change; a branch can, and is asked for each time."""
    commit = hub.commit("org/tiny")
    find(revision=commit)
    find(revision=commit)
    assert hub.asked == 1
    find()
    find()
    assert hub.asked == 3


def test_a_new_commit_on_the_branch_is_another_model(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """Two peers that downloaded at different times don't mix silently."""
    before = find()
    config = hub.repos["org/tiny"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5e5}))
    assert find().digest != before.digest


def test_other_bytes_than_announced_are_refused(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """Weights that don't match the digest under which they would be served are never used."""
    hub.corrupt.add(SECOND)
    with pytest.raises(CheckpointMismatch, match=rf"{SECOND} of org/tiny has SHA-256 \w+, the hub announced"):
        find().ensure([SECOND])


@pytest.mark.parametrize(
    ("break_it", "options", "reason"),
    [
        (lambda hub: hub.repos.clear(), {}, "no model 'org/tiny' on the hub"),
        (lambda hub: hub.private.add("org/tiny"), {}, "private and needs a token"),
        (lambda hub: hub.gated.add("org/tiny"), {}, "terms to be accepted"),
        (lambda hub: None, {"revision": "v9"}, "has no revision 'v9'"),
        (lambda hub: (hub.repos["org/tiny"] / "config.json").unlink(), {}, "has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: FakeHub,
    find: Callable[..., Checkpoint],
    break_it: Callable[[FakeHub], None],
    options: dict[str, str],
    reason: str,
) -> None:
    """Missing, private, gated, wrong revision, no model: one sentence each."""
    break_it(hub)
    with pytest.raises(UnknownModel, match=reason):
        find(**options)


def test_pickles_on_the_hub_are_refused_before_any_download(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """The listing is enough to know."""
    for path in hub.repos["org/tiny"].glob("model*"):
        path.unlink()
    (hub.repos["org/tiny"] / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedModel, match=r"pickle only \(pytorch_model.bin\)"):
        find()
    assert not hub.fetched


def test_an_index_that_names_missing_files_is_refused(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """A repository may be uploaded half."""
    (hub.repos["org/tiny"] / SECOND).unlink()
    with pytest.raises(CheckpointMismatch, match=rf"org/tiny has no {SECOND}"):
        find()


def test_offline_nothing_is_asked(hub: FakeHub, find: Callable[..., Checkpoint]) -> None:
    """A model that was never used is not there, and the error says how to get it; one that was is taken as it was."""
    with pytest.raises(UnknownModel, match="hf download org/tiny --local-dir DIR"):
        find(is_offline=True)
    assert hub.fetched == []
    digest = find().digest
    fetched = list(hub.fetched)
    again = find(is_offline=True)
    assert again.digest == digest and hub.fetched == fetched
    with pytest.raises(UnknownModel, match=f"can't download {SECOND}"):
        again.ensure([SECOND])
    assert hub.fetched == fetched
