"""What a distributed model can do with adapters: the methods of transformers' own models, and PEFT's words.

    model.load_adapter("org/adapter", adapter_name="a"), set_adapter("a"), disable_adapters(), ... ─► AdapterBook

A mixin of `swarm.client.generation.DistributedModel`; which adapter a row uses is decided there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.checkpoint.source import Checkpoint
from swarm.client.adapters import AdapterBook
from swarm.client.cache import BlockService
from swarm.client.row_adapters import ClientAdapter
from swarm.errors import InvalidRequest

DEFAULT_NAME = "default"


class AdapterMethods:
    """See the module; a class that has this is a transformers model with a checkpoint."""

    checkpoint: Checkpoint
    block_service: BlockService

    @property
    def adapters(self) -> AdapterBook:
        """All adapters of this model."""
        book = self.__dict__.get("swarm_adapters")
        if book is None:
            book = self.__dict__["swarm_adapters"] = AdapterBook(self._combine)
        return book

    def load_adapter(  # type: ignore[override,unused-ignore]
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Load an adapter that PEFT has saved, and make it the active one.

        It is read and checked here; servers that don't have it get it when a session needs it. One that others have
        brought to the swarm can be had by its digest alone (`adapter_digest`), from the servers that have it.

        Args:
            peft_model_id: directory with adapter_config.json and adapter_model.safetensors, hub id, or "sha256:...".
            adapter_name: how to call it; "default" if not given.
            revision: branch, tag or commit of a hub id.
            token: for adapters on the hub that need one.
            cache_dir: where downloads go.

        Raises:
            AdapterError: it is malformed, not for this model, of a kind that can't be served, or no server has it; says
                which.
            UnknownModel: there is no such directory or hub id.
            InvalidRequest: the name is taken.
        """
        from swarm.adapters.load import load_adapter
        from swarm.adapters.source import digest_in
        from swarm.checkpoint.layout import model_layout

        name = adapter_name or DEFAULT_NAME
        if name in self.adapters.names:
            raise InvalidRequest(f"adapter name {name!r} is taken; delete_adapter({name!r}) first, or choose another")
        source = str(peft_model_id)
        loaded: ClientAdapter
        if (digest := digest_in(source)) is not None:
            loaded = self.block_service.fetch_adapter(digest, model_layout(self.checkpoint.config()))
        else:
            loaded = load_adapter(source, self.checkpoint, revision=revision, token=token, cache_dir=cache_dir)
        self.adapters.add(name, loaded)
        self.adapters.activate([name])

    def adapter_digest(self, adapter_name: str = DEFAULT_NAME) -> str:
        """What the swarm knows an adapter by, "sha256:...": with it, others can load it as long as servers have it.

        Raises:
            InvalidRequest: the name is unknown.
        """
        from swarm.adapters.source import DIGEST_PREFIX

        return DIGEST_PREFIX + self.adapters[adapter_name].digest

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let all rows use this adapter, or these together, unless a call names others.

        Raises:
            InvalidRequest: a name is unknown, or these kinds of adapters can't be used together.
        """
        self.adapters.activate([adapter_name] if isinstance(adapter_name, str) else list(adapter_name))
        self.adapters.is_enabled = True

    def disable_adapters(self) -> None:
        """Use none, unless a call names some; which were active is remembered."""
        self.adapters.is_enabled = False

    def enable_adapters(self) -> None:
        """Use those again that were active."""
        self.adapters.is_enabled = True

    def active_adapters(self) -> list[str]:
        """Names of those that rows use unless a call names others."""
        return list(self.adapters.active)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; sessions that use them go on.

        Raises:
            InvalidRequest: a name is unknown.
        """
        self.adapters.remove([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: blocks are elsewhere.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest("a distributed model has no blocks to add a fresh adapter to; use swarm.get_peft_model")

    def _combine(self, adapters: Sequence[ClientAdapter]) -> ClientAdapter:
        from swarm.adapters.combine import combine
        from swarm.checkpoint.layout import model_layout

        return combine(adapters, model_layout(self.checkpoint.config()))
