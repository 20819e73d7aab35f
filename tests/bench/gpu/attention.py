"""Paged attention on a device: right in every case, and its speed against a copy and torch's own attention."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels import triton_paged_attention as kernel
from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan, paged_attention
from tests.bench.gpu.timing import Bench
from tests.kernels.cases import CASES, PAGE, check_case, poisoned

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Layer(NamedTuple):
    """Heads of the model whose attention is measured."""

    heads: int
    kv_heads: int
    width: int

    def kv_bytes(self, num_keys: int, dtype: torch.dtype) -> int:
        return 2 * num_keys * self.kv_heads * self.width * dtype.itemsize


def layer_of(bench: Bench) -> Layer:
    return Layer(4, 2, 16) if bench.smoke else Layer(32, 8, 128)


def attend_of(bench: Bench) -> Callable[..., Tensor]:
    """The public function, which a smoke run's CPU tensors would lead to another form."""
    return kernel.paged_attention_triton if bench.smoke else paged_attention


def cases(bench: Bench) -> list[dict[str, Any]]:
    """Every case of tests/kernels on the device."""
    chosen = [it for it in CASES if it.name == "one row float32"] if bench.smoke else CASES
    rows = []
    for case in chosen:
        if bench.time_is_up(f"case {case.name}"):
            continue
        row: dict[str, Any] = {"case": case.name}
        try:
            row["error"] = check_case(poisoned(attend_of(bench)), case, bench.device)
        except Exception as error:  # noqa: BLE001 - the other cases tell where it lies
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def decode(bench: Bench) -> list[dict[str, Any]]:
    """One row per sequence, by number of sequences and keys."""
    if bench.smoke:
        points = [(2, 40, torch.float32)]
    else:
        points = [(b, n, torch.bfloat16) for n in (128, 1024, 4096, 32768) for b in (1, 8, 32, 64, 256)]
        points += [(b, 4096, torch.float16) for b in (1, 64)]
    rows = []
    for batch_size, num_keys, dtype in points:
        name = f"{batch_size} x {num_keys} {_NAMES[dtype]}"
        kv_bytes = layer_of(bench).kv_bytes(batch_size * num_keys, dtype)
        if not bench.fits(kv_bytes + (1 << 30)):
            bench.left_out.append(f"decode {name}: no memory")
        elif not bench.time_is_up(f"decode {name}"):
            rows.append(_decode(bench, batch_size, num_keys, dtype, kv_bytes))
    if not bench.smoke and not bench.time_is_up("ragged decode"):
        rows.append(_ragged(bench))
    return rows


def _decode(bench: Bench, batch_size: int, num_keys: int, dtype: torch.dtype, kv_bytes: int) -> dict[str, Any]:
    layer = layer_of(bench)
    run = _step(bench, layer, [(num_keys - 1, 1)] * batch_size, dtype)
    us, host_us = bench.device_us(run), bench.host_us(run)
    sdpa_us = _sdpa_us(bench, layer, batch_size, 1, num_keys, dtype) if bench.fits(kv_bytes + (1 << 30)) else None
    gbs = kv_bytes / us / 1e3
    return {"sequences": batch_size, "keys": num_keys, "dtype": _NAMES[dtype], "us": us, "GB/s": gbs,
            "of_copy": gbs / bench.copy_gbs, "sdpa_us": sdpa_us, "over_sdpa": sdpa_us and sdpa_us / us,
            "host_us": host_us}  # fmt: skip


def _ragged(bench: Bench) -> dict[str, Any]:
    """Lengths from 128 to 32768, a few long ones among many short: what cutting by keys is for."""
    layer, dtype = layer_of(bench), torch.bfloat16
    lengths = [int(2 ** random.Random(index).uniform(7, 15)) for index in range(64)]
    us = bench.device_us(_step(bench, layer, [(length - 1, 1) for length in lengths], dtype))
    gbs = layer.kv_bytes(sum(lengths), dtype) / us / 1e3
    return {"sequences": 64, "keys": "128..32768", "dtype": "bf16", "us": us, "GB/s": gbs,
            "of_copy": gbs / bench.copy_gbs}  # fmt: skip


def prefill(bench: Bench) -> list[dict[str, Any]]:
    """One chunk of a prompt, by its length and what is cached before it."""
    points = [(20, 20)] if bench.smoke else [(n, p) for n in (128, 512, 2048, 8192) for p in (0, 4096, 24576)]
    dtypes = [torch.float32] if bench.smoke else [torch.bfloat16]
    rows = []
    for dtype in dtypes:
        for count, position in points:
            if not bench.time_is_up(f"prefill {count} after {position}"):
                rows.append(_prefill(bench, count, position, dtype))
    return rows


def _prefill(bench: Bench, count: int, position: int, dtype: torch.dtype) -> dict[str, Any]:
    layer = layer_of(bench)
    us = bench.device_us(_step(bench, layer, [(position, count)], dtype), 10)
    sdpa_us = _sdpa_us(bench, layer, 1, count, position + count, dtype)
    seen = count * position + count * (count + 1) / 2
    return {"rows": count, "cached": position, "dtype": _NAMES[dtype], "us": us,
            "TFLOP/s": 4 * layer.heads * layer.width * seen / us / 1e6, "sdpa_us": sdpa_us,
            "over_sdpa": sdpa_us and sdpa_us / us}  # fmt: skip


def tiles(bench: Bench) -> list[dict[str, Any]]:
    """Tiles that might be better than those of `tile_of`."""
    if bench.smoke:
        grid = {"narrow": [(16, 16, 4, 2)], "wide": [(16, 16, 4, 2)]}
        steps = {"narrow": [(39, 1)], "wide": [(20, 20)]}
    else:
        few = ((32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 7), (128, 4, 3), (128, 8, 3), (32, 2, 5), (64, 2, 5))
        narrow = [(16, *numbers) for numbers in few]
        wide = [(128, 64, 8, 3), (128, 128, 8, 3), (128, 32, 8, 5), (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3),
                (128, 64, 4, 3)]  # fmt: skip
        grid = {"narrow": narrow, "wide": wide}
        steps = {"narrow": [(4095, 1)] * 32, "wide": [(4096, 2048)]}
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    rows = []
    for kind, shapes in grid.items():
        chosen = kernel.tile_of(kind, 4, dtype, layer_of(bench).width)
        candidates = dict.fromkeys((chosen, *(kernel.Tile(*numbers) for numbers in shapes)))
        found = [_tile(bench, kind, tile, steps[kind], dtype) for tile in candidates]
        found[0]["chosen"] = "*"
        rows += sorted(found, key=lambda row: row.get("us", float("inf")))
    return rows


def _tile(
    bench: Bench, kind: str, tile: kernel.Tile, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> dict[str, Any]:
    row: dict[str, Any] = {"launch": kind, **tile._asdict()}
    if bench.time_is_up(f"tile {kind} {tuple(tile)}"):
        return row
    with _tiles_are(tile):
        try:
            row["us"] = bench.device_us(_step(bench, layer_of(bench), sequences, dtype), 10)
        except Exception as error:  # noqa: BLE001 - it may need more shared memory than there is
            row["note"] = type(error).__name__
    return row


@contextmanager
def _tiles_are(tile: kernel.Tile) -> Iterator[None]:
    before = kernel.tile_of
    kernel.tile_of = lambda *_: tile
    try:
        yield
    finally:
        kernel.tile_of = before


def _step(bench: Bench, layer: Layer, sequences: list[tuple[int, int]], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Attention of one step over scattered pages, ready to be called."""
    needed = [-(-(position + count) // PAGE) for position, count in sequences]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    spans, row = [], 0
    for (position, count), pages in zip(sequences, needed, strict=True):
        spans.append(RowSpan(row, count, position, [order.pop() for _ in range(pages)]))
        row += count
    batch = PagedBatch(spans, PAGE, bench.device)
    k_pool, v_pool = (
        _random(layer.kv_heads, sum(needed) * PAGE, layer.width, dtype=dtype, device=bench.device) for _ in range(2)
    )
    q_HTD = _random(row, layer.heads, layer.width, dtype=dtype, device=bench.device).transpose(0, 1)
    form, attend = AttentionForm(scale=layer.width**-0.5), attend_of(bench)
    return lambda: attend(q_HTD, k_pool, v_pool, batch, form)


def _sdpa_us(
    bench: Bench, layer: Layer, batch_size: int, count: int, num_keys: int, dtype: torch.dtype
) -> float | None:
    """torch's attention over contiguous keys; None where it can't."""
    q = _random(batch_size, layer.heads, count, layer.width, dtype=dtype, device=bench.device)
    heads = layer.kv_heads if count == 1 else layer.heads
    k, v = (_random(batch_size, heads, num_keys, layer.width, dtype=dtype, device=bench.device) for _ in range(2))
    try:
        if count == 1:
            run = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
        elif count == num_keys:
            run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        else:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(count, num_keys)
            run = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
        return bench.device_us(run, 10)
    except (RuntimeError, ImportError, TypeError, NotImplementedError):
        return None


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device).normal_()
