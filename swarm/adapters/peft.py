"""Adapters from PEFT's files, in the one representation that servers apply, whatever method they were trained with.

    adapter_config.json        ─┐   by peft_type: peft_lora, peft_vectors, peft_prompts
    adapter_model.safetensors  ─┴─► {block: BlockDelta}, embeddings ──format──► Manifest, shards, digest

What can't be represented is refused by name: the method, the option, or the module. Needs neither PEFT nor the model,
only its layout. It does not know where the files come from (`source`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from swarm.adapters.delta import BlockDelta
from swarm.adapters.format import Manifest, embeddings_digest, encode_shard, shard_info
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft_files import PeftFiles
from swarm.adapters.peft_lora import read_adalora, read_lora, read_vera
from swarm.adapters.peft_prompts import read_deep_prompts, read_prefix, read_prompt
from swarm.adapters.peft_vectors import read_beft, read_ia3
from swarm.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedAdapter:
    """An adapter, ready to be given to servers."""

    manifest: Manifest
    shards: Mapping[int, bytes]
    """By block, of those that it changes."""
    embeddings_PH: Tensor | None
    """What the client puts before the embeddings of a prompt (prompt tuning)."""

    @property
    def digest(self) -> str:
        """Its name in the swarm."""
        return self.manifest.digest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """What one method's files say."""

    deltas: Mapping[int, BlockDelta]
    num_virtual: int = 0
    embeddings_PH: Tensor | None = None


def read_adapter(directory: Path | str, *, layout: ModelLayout) -> LoadedAdapter:
    """Read a PEFT adapter.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        layout: of the base model.

    Raises:
        AdapterError: it is malformed, made for another base, or does something that servers can't do; names what.
    """
    files = PeftFiles.open(Path(directory))
    try:
        read = _METHODS.get(files.method)
        if read is None:
            raise AdapterError(f"adapters of method {files.method[:64]} can't be applied by servers, only those of "
                               f"{', '.join(sorted(_METHODS))}")  # fmt: skip
        contents = read(files, layout)
    finally:
        files.close()
    return pack(contents, method=files.method, base=files.base, layout=layout)


def pack(contents: Contents, *, method: str, base: str, layout: ModelLayout) -> LoadedAdapter:
    """Bytes and names for what an adapter does.

    Args:
        contents: what it does.
        method: for people.
        base: what it was trained on, for people.
        layout: of the base model.
    """
    changed = {block: delta for block, delta in sorted(contents.deltas.items()) if delta.tensors()}
    shards = {block: encode_shard(delta) for block, delta in changed.items()}
    embeddings_PH = contents.embeddings_PH
    manifest = Manifest(
        method=method,
        base=base,
        num_blocks=len(layout.blocks),
        hidden_size=layout.hidden_size,
        num_virtual=contents.num_virtual,
        shards=tuple(shard_info(block, changed[block], data) for block, data in shards.items()),
        embeddings=None if embeddings_PH is None else embeddings_digest(embeddings_PH),
    )
    return LoadedAdapter(manifest=manifest, shards=shards, embeddings_PH=embeddings_PH)


def _linear(read: Callable[[PeftFiles, ModelLayout], Mapping[int, BlockDelta]]) -> "_Reader":
    return lambda files, layout: Contents(deltas=read(files, layout))


def _prompt(files: PeftFiles, layout: ModelLayout) -> Contents:
    embeddings_PH = read_prompt(files, layout)
    return Contents(deltas={}, num_virtual=len(embeddings_PH), embeddings_PH=embeddings_PH)


def _prefix(files: PeftFiles, layout: ModelLayout) -> Contents:
    num_virtual, deltas = read_prefix(files, layout)
    return Contents(deltas=deltas, num_virtual=num_virtual)


def _deep(files: PeftFiles, layout: ModelLayout) -> Contents:
    num_virtual, deltas, embeddings_PH = read_deep_prompts(files, layout)
    return Contents(deltas=deltas, num_virtual=num_virtual, embeddings_PH=embeddings_PH)


_Reader = Callable[[PeftFiles, ModelLayout], Contents]
_METHODS: dict[str, _Reader] = {
    "LORA": _linear(read_lora),
    "ADALORA": _linear(read_adalora),
    "VERA": _linear(read_vera),
    "IA3": _linear(read_ia3),
    "BEFT": _linear(read_beft),
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
    "PREFIX_TUNING": _prefix,
    "CARTRIDGE": _prefix,
    "DEEP_PROMPT_TUNING": _deep,
}
"""By peft_type; the last one is our own."""
