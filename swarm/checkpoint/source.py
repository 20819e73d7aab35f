"""Finds the checkpoint that a name stands for, and fetches the weight files of it that are asked for.

    MODEL --resolve--> embedded name     converted once into the cache directory  (embedded)
                       local directory   used where it lies                       (content)
                       hub id            config, tokenizer and index now          (hub)
                 \\--> Checkpoint --ensure(shards)--> paths of weight files, downloaded if they are missing

Knows nothing of blocks or tensors: `swarm.checkpoint.partial` reads them. Light to import: neither torch nor
transformers is loaded until `Checkpoint.config` is called.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from swarm.checkpoint import content
from swarm.checkpoint.cache import default_cache_dir, file_sha256
from swarm.checkpoint.embedded import DEFAULT_MODEL, EMBEDDED, convert_once
from swarm.errors import CheckpointMismatch, InvalidRequest, UnknownModel, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["DEFAULT_MODEL", "Checkpoint", "ShardStore", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


class ShardStore(Protocol):
    """Where the weight files of one checkpoint come from."""

    def fetch(self, shards: Iterable[str], /) -> dict[str, Path]:
        """Path of each shard, after downloading what is missing."""
        ...

    def is_here(self, shard: str, /) -> bool:
        """Whether a shard is on disk already."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's config, tokenizer and weight files, named by content."""

    name: str
    """For people: the embedded name, the directory's name or the hub id."""
    path: Path
    """Directory with config.json and the tokenizer's files (weight files may be missing still)."""
    digest: str
    """SHA-256 in hex over config and weight files: equal digests, equal models."""
    weight_map: dict[str, str] = field(repr=False)
    """Name of a tensor -> name of the weight file that holds it."""
    store: ShardStore = field(repr=False)
    is_offline: bool = field(default=False, repr=False)
    """Whether the hub must not be asked for anything, adapters included."""

    @property
    def shards(self) -> tuple[str, ...]:
        """All weight files, sorted."""
        return tuple(sorted(set(self.weight_map.values())))

    def ensure(self, shards: Iterable[str], /) -> dict[str, Path]:
        """Make weight files present, downloading only what is missing.

        Returns:
            The path of each one.

        Raises:
            InvalidRequest: a name that is no weight file of this checkpoint.
            UnknownModel: a download failed.
            CheckpointMismatch: a downloaded file has other content than the hub promised.
        """
        wanted = sorted(set(shards))
        if foreign := set(wanted).difference(self.weight_map.values()):
            raise InvalidRequest(f"{min(foreign)!r} is none of the {len(self.shards)} weight files of {self.name}")
        return self.store.fetch(wanted)

    def config(self) -> "PretrainedConfig":
        """The transformers config.

        Raises:
            UnsupportedModel: transformers doesn't know this type of model, or it brings its own code.
        """
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            reason = (str(error).splitlines() or ["?"])[0]
            raise UnsupportedModel(f"transformers can't read the config of {self.name}: {reason}") from error
        return config


def resolve(
    model: str | Path = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    is_offline: bool = False,
) -> Checkpoint:
    """Find the checkpoint that `model` stands for.

    Args:
        model: name of an embedded model, path of a checkpoint directory, or hub id ("org/name").
        revision: branch, tag or commit on the hub; its main branch by default.
        cache_dir: keep everything here instead of $SWARM_CACHE (by default ~/.cache/swarm) and the hub's own cache.
        token: for models on the hub that need one; by default what `hf auth login` stored.
        is_offline: take models of the hub, and later their adapters, from its cache only.

    Raises:
        UnknownModel: nothing has this name, or it can't be reached and isn't cached.
        UnsupportedModel: it has no safetensors.
        CheckpointMismatch: its files contradict each other.
        InvalidRequest: a revision of something that isn't on the hub.
        ConfigError: the cache directory can't be written to.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    name = str(model)
    directory = Path(name or "-").expanduser()  # not Path(""), which is where we are
    on_hub = name not in EMBEDDED and not directory.is_dir() and _HUB_ID.fullmatch(name) is not None
    if revision is not None and not on_hub:
        raise InvalidRequest(f"revision {revision!r} was given, but {name!r} is not a hub id")
    if on_hub:
        from swarm.checkpoint import hub

        found = hub.look_up(
            name,
            revision=revision,
            hub_cache=cache / "hub-files" if cache_dir else None,
            token=token,
            cache_dir=cache,
            is_offline=is_offline,
        )
        checkpoint = Checkpoint(
            name=name, path=found.path, digest=found.digest, weight_map=found.weight_map, store=found.files
        )
    elif name in EMBEDDED:
        checkpoint = _open_directory(convert_once(name, cache_dir=cache), name, cache)
    elif directory.is_dir():
        checkpoint = _open_directory(directory.resolve(), directory.resolve().name, cache)
    else:
        raise UnknownModel(_what_to_do(name))
    return replace(checkpoint, is_offline=is_offline)


@dataclass(frozen=True, slots=True)
class _LocalFiles:
    root: Path

    def fetch(self, shards: Iterable[str], /) -> dict[str, Path]:
        return {shard: self.root / shard for shard in shards}

    def is_here(self, shard: str, /) -> bool:
        return (self.root / shard).is_file()


def _open_directory(directory: Path, name: str, cache_dir: Path) -> Checkpoint:
    config = content.read_config(directory)
    weight_map = content.read_weight_map(directory)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise CheckpointMismatch(f"{directory} misses {len(missing)} of {len(shards)} weight files: {missing[0]}, ...")
    digest = content.content_digest(
        config, {shard: file_sha256(directory / shard, cache_dir=cache_dir) for shard in shards}
    )
    return Checkpoint(name=name, path=directory, digest=digest, weight_map=weight_map, store=_LocalFiles(directory))


def _what_to_do(name: str) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"no model {name!r}: there is no such directory"
    embedded = ", ".join(sorted(EMBEDDED))
    return (
        f"no model {name!r}: it is no embedded model ({embedded}), no directory here, "
        "and no hub id, which looks like org/name"
    )
