"""Finds the adapter that a name stands for, and fetches its two files from the hub if it lies there.

    path of a directory --> itself          "org/name" --> hub --hash checked--> a directory with both files

It does not read what is in them: that is `peft`.
"""

import re
from pathlib import Path

from swarm.adapters.peft_files import CONFIG_FILE, MAX_ADAPTER_BYTES, PICKLE_FILE, TENSORS_FILE
from swarm.errors import AdapterError, CheckpointMismatch, UnknownModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


def resolve_adapter(
    adapter: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    is_offline: bool = False,
) -> Path:
    """A directory with the adapter's files.

    Args:
        adapter: path of a directory, or hub id ("org/name").
        revision: branch, tag or commit on the hub; its main branch by default.
        cache_dir: keep everything here instead of $SWARM_CACHE and the hub's own cache.
        token: for repositories that need one; by default what `hf auth login` stored.
        is_offline: take adapters of the hub from its cache only.

    Raises:
        AdapterError: there is no such adapter, it can't be reached, or it is none that servers can read.
    """
    name, directory = str(adapter), Path(str(adapter) or "-").expanduser()
    if directory.is_dir() or not _HUB_ID.fullmatch(name):
        if revision is not None:
            raise AdapterError(f"revision {revision!r} was given, but {name!r} is not a hub id")
        if not directory.is_dir():
            raise AdapterError(f"no adapter {name!r}: there is no such directory, and it is no hub id (org/name)")
        return directory.resolve()
    from swarm.checkpoint.cache import default_cache_dir
    from swarm.checkpoint.hub import fetch_files

    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    try:
        found = fetch_files(name, {CONFIG_FILE: 1 << 20, TENSORS_FILE: MAX_ADAPTER_BYTES}, revision=revision,
                            hub_cache=cache / "hub-files" if cache_dir else None, token=token,
                            cache_dir=cache, is_offline=is_offline)  # fmt: skip
    except (UnknownModel, CheckpointMismatch) as error:
        raise AdapterError(str(error)) from error
    if CONFIG_FILE not in found.paths:
        raise AdapterError(f"{name} on the hub is no PEFT adapter: it has no {CONFIG_FILE}")
    if TENSORS_FILE not in found.paths:
        pickled = f"only {PICKLE_FILE}, a pickle, which could run code" if PICKLE_FILE in found.others else "no tensors"
        raise AdapterError(f"{name} on the hub has no {TENSORS_FILE} ({pickled})")
    return found.paths[CONFIG_FILE].parent
