"""The kernels of adapters compile for real devices, which Triton's interpreter can't tell: types, sizes, memory.

As in test_triton_compiles: every launch is compiled for a named device instead of run.
"""

import importlib

import pytest
import torch

from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget
from tests.kernels.test_triton_compiles import SHARED_BYTES, Compiling, NamedDevice, spilled_bytes

triton = pytest.importorskip("triton")

KERNELS = ("_shrink_kernel", "_expand_kernel", "_gradient_kernel")
DECODE = [0, 1, 2, -1]
PREFILL = [0] * 200 + [1, 2, -1]


@pytest.fixture
def compile_step(monkeypatch):
    """(capability, adapters, dtype, pool dtype, widths of the parts) -> the compiled kernels, forth and back."""
    module = importlib.import_module("swarm.kernels.triton_lora")
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active", None)  # put back afterwards
    kernels = {name: getattr(module, name) for name in KERNELS}

    def compile_step(capability, adapters, dtype, pool_dtype, width, outs):
        driver.set_active(NamedDevice(capability))
        compiled = []
        for name, kernel in kernels.items():
            kernel.device_caches.clear()
            monkeypatch.setattr(module, name, Compiling(kernel, compiled))
        ranks = {
            adapter: AdapterRanks(a_rows=range(start, start + rank), b_rows=range(start, start + rank), scale=2.0)
            for adapter, (start, rank) in enumerate([(0, 8), (8, 16), (24, 64)])
        }
        targets = [
            LoraTarget(a_pool_RI=torch.zeros(88, width, dtype=pool_dtype),
                       b_pool_RO=torch.zeros(88, out, dtype=pool_dtype), ranks=ranks, column=sum(outs[:index]))
            for index, out in enumerate(outs)
        ]  # fmt: skip
        batch = LoraBatch(adapters)
        x = torch.zeros(len(adapters), width, dtype=dtype)
        y = torch.zeros(len(adapters), sum(outs), dtype=dtype)
        h = module.shrink(x, targets, "a", batch)
        module.expand(y, h, targets, "b", batch)
        dh = module.shrink(y, targets, "b", batch)
        module.expand(x, dh, targets, "a", batch)
        module.pool_gradients(dh, x, targets, "a", batch)
        module.pool_gradients(h, y, targets, "b", batch)
        return compiled

    yield compile_step
    for kernel in kernels.values():
        kernel.device_caches.clear()  # what was compiled for the named device must not be launched on a real one


@pytest.mark.parametrize(
    ("capability", "adapters", "dtype", "pool_dtype", "outs"),
    [
        (80, DECODE, torch.bfloat16, torch.bfloat16, (4096, 1024, 1024)),
        (80, PREFILL, torch.float16, torch.float16, (4096,)),
        (90, DECODE, torch.bfloat16, torch.bfloat16, (4096, 1024, 1024)),
        (90, PREFILL, torch.bfloat16, torch.bfloat16, (4096, 1024, 1024)),
        (90, PREFILL, torch.float16, torch.bfloat16, (1024, 1024)),
        (90, DECODE, torch.float32, torch.float32, (1000,)),
    ],
    ids=["sm_80 decode", "sm_80 prefill", "sm_90 decode", "sm_90 prefill", "two dtypes", "fp32, unaligned"],
)
def test_every_launch_compiles(compile_step, capability, adapters, dtype, pool_dtype, outs):
    """Types and tl.dot sizes are right, a program fits the device, and registers hardly spill; products of half
    precision are on the tensor cores, and aligned pools are read asynchronously, 16 bytes at a time."""
    compiled = compile_step(capability, adapters, dtype, pool_dtype, 4096, outs)
    assert {kernel.name for kernel in compiled} == set(KERNELS)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        assert kernel.metadata.shared <= min(SHARED_BYTES.values())
        assert spilled_bytes(ptx, capability) <= 128
        assert dtype == torch.float32 or "mma.sync" in ptx or "wgmma.mma_async" in ptx
        if kernel.name != "_gradient_kernel" and dtype == pool_dtype == torch.bfloat16:
            assert "cp.async.cg" in ptx
