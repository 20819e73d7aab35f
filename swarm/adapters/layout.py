"""What the reader of an adapter's files has to know of the base model: names and shapes, no weights.

    config --swarm.checkpoint.layout--> ModelLayout --> peft.read_adapter

Values on their own; it does not know where they come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_WRAPPERS = frozenset({"language_model", "text_model"})
"""Parts of a path that come and go with the class that a model was loaded as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """One linear that adapters may change."""

    num_inputs: int
    num_outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What a block has that adapters may change."""

    hidden_size: int
    linears: Mapping[str, LinearShape]
    kv_shape: tuple[int, int, int] | None
    """(heads, key width, value width); None for a block without attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """A base model as adapters see it."""

    blocks_path: str
    """Of the list of blocks in the model, such as "model.layers"."""
    blocks: tuple[BlockShape, ...]
    """What adapters may change in each block."""

    @property
    def hidden_size(self) -> int:
        return self.blocks[0].hidden_size

    def split(self, name: str) -> tuple[int, str] | None:
        """(block, rest) of a name like "model.layers.3.self_attn.q_proj"; None if it lies outside the blocks."""
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal() and part.isascii()), None)
        if at is None or _bare(parts[:at]) != _bare(self.blocks_path.split(".")) or len(parts[at]) > 6:
            return None
        return int(parts[at]), ".".join(parts[at + 1 :])


def _bare(parts: list[str]) -> list[str]:
    return [part for part in parts if part not in _WRAPPERS]
