"""One step of a server's block on a device: everything between the hidden states that come in and those that go out."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PAGE_SIZE
from swarm.types import BlockRange
from tests.bench.gpu.timing import Bench
from tests.families.harness import SavedCheckpoint

NUM_LAYERS = 2


def steps(bench: Bench) -> list[dict[str, Any]]:
    """Decode steps of one to 64 sequences and a prompt chunk, in bf16, int8 and nf4."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _random_checkpoint(bench, Path(folder))
        for quantization in ("none", "int8", "nf4"):
            missing = None if quantization == "none" or bench.smoke else _why_no_bitsandbytes()
            if missing is not None:
                rows.append({"weights": quantization, "skipped": missing})
            elif not bench.time_is_up(f"blocks {quantization}"):
                rows += _quantized(bench, checkpoint, quantization)
    return rows


def _why_no_bitsandbytes() -> str | None:
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        return f"bitsandbytes can't be imported ({type(error).__name__})"
    return None if hasattr(bitsandbytes.nn, "Linear8bitLt") else "bitsandbytes has no Linear8bitLt"


def _random_checkpoint(bench: Bench, folder: Path) -> SavedCheckpoint:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64 if bench.smoke else 4096,
        intermediate_size=128 if bench.smoke else 14336,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4 if bench.smoke else 32,
        num_key_value_heads=2 if bench.smoke else 8,
        max_position_embeddings=8192,
    )
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if bench.smoke else torch.bfloat16)
    model.save_pretrained(folder)
    return SavedCheckpoint(folder)


def _quantized(bench: Bench, checkpoint: SavedCheckpoint, quantization: str) -> list[dict[str, Any]]:
    context = 20 if bench.smoke else 1024
    points = [(1, 1), (2, 1), (1, 8)] if bench.smoke else [(b, 1) for b in (1, 2, 4, 8, 16, 32, 64)] + [(1, 512)]
    pages_each = -(-(context + max(count for _, count in points)) // PAGE_SIZE)
    num_pages = pages_each * max(batch_size for batch_size, _ in points)
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    span = BlockSpan.load(checkpoint, BlockRange(0, NUM_LAYERS), device=bench.device, dtype=dtype,
                          quantization=quantization, num_pages=num_pages)  # fmt: skip
    rows = []
    for batch_size, count in points:
        if bench.time_is_up(f"blocks {quantization} {batch_size} x {count}"):
            continue
        hidden = torch.empty(count, span.hidden_size, dtype=dtype, device=bench.device).normal_()
        batch = [
            Chunk(hidden_states=hidden, position=context, pages=range(i * pages_each, (i + 1) * pages_each), entry=0,
                  exit=NUM_LAYERS)
            for i in range(batch_size)
        ]  # fmt: skip
        us = bench.wall_us(lambda batch=batch: span.run(batch)) / NUM_LAYERS
        kv_bytes = batch_size * context * span.page_bytes // PAGE_SIZE // NUM_LAYERS
        weight_bytes = _weight_bytes(span, quantization)
        rows.append({"weights": quantization, "sequences": batch_size, "rows": batch_size * count, "ms": us / 1000,
                     "floor_ms": (weight_bytes + kv_bytes) / bench.copy_gbs / 1e6,
                     "rows/s": batch_size * count / us * 1e6})  # fmt: skip
    return rows


def _weight_bytes(span: BlockSpan, quantization: str) -> int:
    """Of one block, from the number of its weights: what each format packs differs."""
    config = span.config
    kv_width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    weights = config.hidden_size * (2 * config.hidden_size + 2 * kv_width + 3 * config.intermediate_size)
    size = {"int8": 1.0, "nf4": 0.5}.get(quantization, float(span.dtype.itemsize))
    return int(weights * size)
