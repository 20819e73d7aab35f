"""The two files of a PEFT adapter: their config and their tensors, checked before anything is read.

    directory --PeftFiles.open--> config (JSON), names and shapes --read(key)--> a finite tensor of the shape expected

Whoever wrote the files is a stranger. No pickle is opened. It does not know methods.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from swarm.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_ADAPTER_BYTES = 16 << 30
MAX_TENSORS = 1 << 17
_DTYPES = ("F32", "F16", "BF16")
_PREFIX = "base_model.model."
_UNIVERSAL = frozenset({"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type",
                        "inference_mode"})  # fmt: skip
"""Fields of every config, which change nothing that is computed."""


class PeftFiles:
    """An adapter's directory; made by `open`.

    Args:
        config: the JSON object.
        shapes: of all tensors, by key.
        file: the safetensors file, open.
    """

    def __init__(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], file: Any):
        self.config = config
        self.shapes = shapes
        self._file = file

    @classmethod
    def open(cls, directory: Path) -> "PeftFiles":
        """Open an adapter's files.

        Raises:
            AdapterError: there is none, its tensors are a pickle, or a file is malformed or too large.
        """
        config = _read_config(directory)
        path = directory / TENSORS_FILE
        if not path.is_file():
            if (directory / PICKLE_FILE).is_file():
                raise AdapterError(f"{directory} has {PICKLE_FILE}, a pickle, which could run code; save it again "
                                         f"with PEFT's save_pretrained(safe_serialization=True)")  # fmt: skip
            raise AdapterError(f"{directory} is no PEFT adapter: it has no {TENSORS_FILE}")
        if path.stat().st_size > MAX_ADAPTER_BYTES:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes, limit {MAX_ADAPTER_BYTES}")
        try:
            file: Any = safe_open(path, framework="pt")
            keys = list(file.keys())
            slices = {key: file.get_slice(key) for key in keys[: MAX_TENSORS + 1]}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{path} is no safetensors file: {error}") from error
        if len(keys) > MAX_TENSORS:
            raise AdapterError(f"{path} has {len(keys)} tensors, limit {MAX_TENSORS}")
        for key, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise AdapterError(f"{path}: {key} is {part.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        shapes = {key: tuple(int(size) for size in part.get_shape()) for key, part in slices.items()}
        return cls(config, shapes, file)

    @property
    def method(self) -> str:
        return str(self.config.get("peft_type"))

    @property
    def base(self) -> str:
        """What the adapter was trained on, as its author called it."""
        return str(self.config.get("base_model_name_or_path") or "")[:1024]

    def read(self, key: str, shape: Sequence[int]) -> Tensor:
        """One tensor.

        Raises:
            AdapterError: it is not there, has another shape, or numbers that are not finite.
        """
        if key not in self.shapes:
            raise AdapterError(f"{self.method} adapter has no tensor {key}")
        if self.shapes[key] != tuple(shape):
            raise AdapterError(f"{self.method} adapter: {key} has shape {self.shapes[key]}, expected {tuple(shape)}")
        tensor: Tensor = self._file.get_tensor(key).clone()  # not a view of a file that somebody may change
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.method} adapter: {key} has numbers that are not finite")
        return tensor

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__(None, None, None)

    def refuse_other_options(self, known: Iterable[str]) -> None:
        """Refuse a config with a field that changes what is computed in a way that we don't know.

        Args:
            known: fields that the caller honours, or that only matter while training.

        Raises:
            AdapterError: names the field.
        """
        known = _UNIVERSAL.union(known)
        for name in sorted(self.config):
            if name not in known and self.config[name] not in (None, False, "none", [], {}):
                raise AdapterError(f"{self.method} adapters with {name} can't be applied by servers "
                                         f"({name} = {str(self.config[name])[:80]})")  # fmt: skip

    def integer(self, name: str, low: int, high: int) -> int:
        """A field of the config.

        Raises:
            AdapterError: it is not an integer in [low, high].
        """
        value = self.config.get(name)
        if type(value) is not int or not low <= value <= high:
            raise AdapterError(f"{self.method} adapter: {name} = {value!r}, expected an integer in {low}..{high}")
        return value

    def number(self, name: str) -> float:
        """A field of the config.

        Raises:
            AdapterError: it is not a finite number.
        """
        return finite(self.config.get(name), f"{self.method} adapter: {name}")


def finite(value: object, what: str) -> float:
    """A number out of a config.

    Raises:
        AdapterError: it is none, or not finite.
    """
    if type(value) not in (int, float) or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise AdapterError(f"{what} = {value!r}, expected a finite number")
    return float(value)  # type: ignore[arg-type]


def module_name(key: str) -> str:
    """A tensor's key without what PEFT puts before the model's own name."""
    return key.removeprefix(_PREFIX)


class Patterns:
    """PEFT's rank_pattern and alpha_pattern: regular expressions over names, the first that matches counts.

    Args:
        patterns: value by expression, from the config.
        what: their name there.

    Raises:
        AdapterError: they are no such thing, or an expression could take for ever to match.
    """

    def __init__(self, patterns: object, what: str):
        if not isinstance(patterns, dict | None) or len(patterns or {}) > MAX_TENSORS:
            raise AdapterError(f"{what} is {type(patterns).__name__}, expected an object")
        self._cases = [(key, self._compiled(key, what), value) for key, value in (patterns or {}).items()]

    def get(self, name: str, default: Any) -> Any:
        """The value for a module."""
        for key, expression, value in self._cases:
            if name == key or name.endswith(f".{key}") or (expression is not None and expression.match(name)):
                return value
        return default

    @staticmethod
    def _compiled(key: str, what: str) -> "re.Pattern[str] | None":
        if re.fullmatch(r"[\w.\-]*", key):
            return None  # a name, as nearly all are
        quantifiers = re.findall(r"(?<!\\)[*+{]", key)
        if len(key) > 256 or len(quantifiers) > 3 or re.search(r"\)[*+{?]", key):
            raise AdapterError(f"{what} has an expression that is too involved: {key[:80]!r}")
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise AdapterError(f"{what}: {key[:80]!r} is no regular expression: {error}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes, limit {MAX_CONFIG_BYTES}")
    try:
        config: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON object: {error}") from error
    return config
