"""One call from an adapter's name to its bytes: where its files are, what they must fit, what they say.

"org/adapter" or a directory ─source─► files ─peft─► LoadedAdapter
                   checkpoint's config ─layout──┘
"""

from pathlib import Path

from swarm.adapters.peft import LoadedAdapter, read_adapter
from swarm.adapters.source import resolve_adapter
from swarm.checkpoint.layout import model_layout
from swarm.checkpoint.source import Checkpoint


def load_adapter(
    name: str | Path,
    checkpoint: Checkpoint,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedAdapter:
    """Read an adapter for a model.

    Args:
        name: directory, or hub id.
        checkpoint: of the base model; its config is looked at, and whether the hub may be asked.
        revision: branch, tag or commit of a hub id.
        token: for adapters on the hub that need one.
        cache_dir: where downloads go.

    Raises:
        AdapterError: there is no such adapter, it does not fit, or is of a kind that servers can't apply.
    """
    directory = resolve_adapter(
        name, revision=revision, cache_dir=cache_dir, token=token, is_offline=checkpoint.is_offline
    )
    return read_adapter(directory, layout=model_layout(checkpoint.config()))
