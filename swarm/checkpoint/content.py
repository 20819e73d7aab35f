"""What a checkpoint is, whatever it is called and wherever it lies: its config and the bytes of its weight files.

    config.json                     -> read_config
    model.safetensors[.index.json]  -> read_weight_map: tensor -> file
    config + SHA-256 of each file   -> content_digest: the same for a directory and for its twin on the hub

Knows neither networks nor models. Everything is checked here: an index or a header from the hub is a stranger's data.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.errors import CheckpointMismatch, UnknownModel, UnsupportedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 256 << 20
_VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})
"""Keys of config.json that say who wrote it, not what the model computes."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def content_digest(config: Mapping[str, Any], shard_sha256: Mapping[str, str]) -> str:
    """SHA-256, in hex, that names a checkpoint by its content.

    Args:
        config: what config.json holds.
        shard_sha256: SHA-256 in hex of each weight file, by file name.
    """
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    document = {"config": kept, "shards": dict(shard_sha256)}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        UnknownModel: there is none.
        CheckpointMismatch: it isn't a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UnknownModel(f"{directory} is no transformers checkpoint: it has no config.json")
    return _read_object(path, MAX_CONFIG_BYTES)


def read_weight_map(directory: Path) -> dict[str, str]:
    """Which weight file holds which tensor.

    Raises:
        UnsupportedModel: the directory holds no safetensors.
        CheckpointMismatch: the index or the header is broken.
    """
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_object(directory / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
        return check_weight_map(weight_map, INDEX_FILE)
    if (directory / SINGLE_FILE).is_file():
        return dict.fromkeys(_read_header(directory / SINGLE_FILE), SINGLE_FILE)
    raise no_safetensors(str(directory), [path.name for path in directory.iterdir()])


def check_weight_map(weight_map: object, origin: str) -> dict[str, str]:
    """Return the map if it is one, with plain file names only (no way out of the directory).

    Raises:
        CheckpointMismatch: it is not.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointMismatch(f"{origin} has no weight_map")
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointMismatch(f"{origin} puts {key} into {shard!r}, which is no name of a safetensors file")
    return weight_map


def no_safetensors(where: str, names: list[str]) -> UnsupportedModel:
    """The error for a checkpoint without safetensors; says so if it has weights in another format."""
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return UnsupportedModel(
            f"{where} has its weights as pickle only ({pickles[0]}), which can run code when it is read; "
            "save it with transformers' save_pretrained() as safetensors first"
        )
    return UnsupportedModel(f"{where} has neither {INDEX_FILE} nor {SINGLE_FILE}")


def _read_header(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file. The format: 8 bytes little-endian length, then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_INDEX_BYTES):
            raise CheckpointMismatch(f"{path} is no safetensors file: header of {length} bytes in {size}")
        header = _parse(file.read(length), path)
    return [name for name in header if name != "__metadata__"]


def _read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointMismatch(f"{path} has {size} bytes, at most {max_bytes} are read")
    return _parse(path.read_bytes(), path)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{path} is broken: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointMismatch(f"{path} holds a {type(found).__name__}, not an object")
    return found
