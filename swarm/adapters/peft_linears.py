"""Which tensor of a PEFT file belongs to which linear of which block.

    key "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" --> block 3, "self_attn.q_proj", "lora_A"

Everything else in the file is refused by name: modules outside the blocks, modules that are no adaptable linears,
parameters that the method doesn't have. It does not know what the parameters mean.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from swarm.adapters.layout import LinearShape, ModelLayout
from swarm.adapters.peft_files import PeftFiles, module_name
from swarm.errors import AdapterError

BIASES = {".base_layer.bias": "base_bias", ".bias": "base_bias"}
"""Where files keep the trained biases of the base (bias="all" and the like); the second way is that of old ones."""


class LinearParts(NamedTuple):
    """What a file has for one linear."""

    files: PeftFiles
    block: int
    path: str
    """In the block."""
    name: str
    """In the model."""
    shape: LinearShape
    keys: Mapping[str, str]
    """Key in the file, by parameter."""

    def read(self, parameter: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter that must be there, of this shape."""
        if parameter not in self.keys:
            raise AdapterError(f"{self.files.method} adapter: {self.name} has no {parameter}")
        return self.files.read(self.keys[parameter], shape)

    def read_if_there(self, parameter: str, shape: tuple[int, ...]) -> Tensor | None:
        """A parameter that may be there."""
        return self.read(parameter, shape) if parameter in self.keys else None

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        """As the file has it; () if it doesn't."""
        return self.files.shapes[self.keys[parameter]] if parameter in self.keys else ()


def linears_of(
    files: PeftFiles, layout: ModelLayout, suffixes: Mapping[str, str], ignored: frozenset[str] = frozenset()
) -> Iterator[LinearParts]:
    """All linears that a file has something for, block by block.

    Args:
        files: the adapter's.
        layout: of the base model.
        suffixes: end of a key -> parameter.
        ignored: keys that the caller reads itself.

    Raises:
        AdapterError: a key belongs to nothing that servers can change; names it.
    """
    found: dict[tuple[int, str, str], dict[str, str]] = {}
    for key in sorted(set(files.shapes) - ignored):
        name, suffix = _split(key, suffixes)
        if suffix is None:
            raise AdapterError(f"{files.method} adapter has {key}, which servers can't apply")
        place = layout.split(name)
        if place is None:
            raise AdapterError(f"{files.method} adapter changes {name}, which is outside the blocks")
        block, path = place
        if block >= len(layout.blocks):
            raise AdapterError(f"{files.method} adapter changes {name}; the base model has {len(layout.blocks)} blocks")
        if path not in layout.blocks[block].linears:
            raise AdapterError(f"{files.method} adapter changes {name}, which is no linear of the base model that "
                               f"adapters may change")  # fmt: skip
        keys = found.setdefault((block, path, name), {})
        if suffixes[suffix] in keys:
            raise AdapterError(f"{files.method} adapter has {suffixes[suffix]} of {name} twice")
        keys[suffixes[suffix]] = key
    for (block, path, name), keys in sorted(found.items()):
        yield LinearParts(files, block, path, name, layout.blocks[block].linears[path], keys)


def _split(key: str, suffixes: Mapping[str, str]) -> tuple[str, str | None]:
    """(name of the module, end of the key), the longest that is known."""
    name = module_name(key)
    suffix = max((it for it in suffixes if name.endswith(it)), key=len, default=None)
    return (name, None) if suffix is None else (name.removesuffix(suffix), suffix)
