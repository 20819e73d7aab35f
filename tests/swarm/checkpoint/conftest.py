"""Small checkpoints without a model behind them: a config, and a few numbers in safetensors files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "transformers_version": "5.23.0"}

Write = Callable[..., Path]


@pytest.fixture
def write_checkpoint() -> Write:
    """Write a checkpoint of `num_shards` files (one without an index) into a directory."""

    def write(directory: Path, *, num_shards: int = 3, config: dict[str, object] | None = None, seed: int = 0) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
        (directory / "tokenizer.json").write_text("{}")
        rng = np.random.default_rng(seed)
        tensors = {f"model.layers.{index}.weight": rng.random((4, 8), np.float32) for index in range(num_shards)}
        if num_shards == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        weight_map = {}
        for index, (name, value) in enumerate(tensors.items(), start=1):
            weight_map[name] = f"model-{index:05d}-of-{num_shards:05d}.safetensors"
            save_file({name: value}, directory / weight_map[name])
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return write
