"""The kernel compiles for real devices, which Triton's interpreter can't tell: types, least sizes, memory, registers.

The public function is called with CPU tensors while a driver stands in that only names a device, and every launch is
compiled for it (ahead of time, with the argument specialisation of a real launch) instead of run.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from swarm.kernels.paged_attention import PagedBatch, RowSpan
from tests.kernels.cases import CPU, Shape, make_form

triton = pytest.importorskip("triton")

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Shared memory that one program may have, by compute capability (CUDA programming guide, technical specifications)."""
LLAMA = Shape(32, 8, 128, 128)
WIDE = Shape(8, 2, 256, 256)


class NamedDevice:
    """Triton's driver as far as compiling asks for it."""

    def __init__(self, capability):
        self._target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiling:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel, compiled):
        self._kernel = kernel
        self._compiled = compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self._compiled.append(self._kernel.run(*args, grid=grid, warmup=True, **options))

        return launch


@pytest.fixture
def compile_step(monkeypatch):
    """(capability, sequences, shape, dtype, form options) -> the compiled kernels of the step."""
    module = importlib.import_module("swarm.kernels.triton_paged_attention")
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active", None)  # put back afterwards
    kernels = {name: getattr(module, name) for name in ("_kernel", "_merge_kernel")}

    def compile_step(capability, sequences, shape, dtype, **options):
        driver.set_active(NamedDevice(capability))
        compiled = []
        for name, kernel in kernels.items():
            kernel.device_caches.clear()
            monkeypatch.setattr(module, name, Compiling(kernel, compiled))
        spans, row = [], 0
        for position, count in sequences:
            spans.append(RowSpan(row, count, position, range((position + count) // 16 + 1)))
            row += count
        q = torch.empty(row, shape.heads, shape.width, dtype=dtype).transpose(0, 1)
        k_pool = torch.empty(shape.kv_heads, 4096, shape.width, dtype=dtype)
        v_pool = torch.empty(shape.kv_heads, 4096, shape.value_width, dtype=dtype)
        module.paged_attention_triton(q, k_pool, v_pool, PagedBatch(spans, 16, CPU), make_form(shape.heads, **options))
        return compiled

    yield compile_step
    for kernel in kernels.values():
        kernel.device_caches.clear()  # what was compiled for the named device must not be launched on a real one


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("sequences", "shape", "dtype", "options"),
    [
        ([(1500, 1), (100, 64)], LLAMA, torch.bfloat16, {}),
        ([(1500, 1), (100, 64)], LLAMA, torch.float16, {"window": 600, "softcap": 30.0, "sinks": True}),
        ([(100, 64)], Shape(71, 1, 64, 64), torch.float16, {"alibi": True}),
        ([(100, 1), (0, 64)], WIDE, torch.bfloat16, {}),
        ([(100, 1)], Shape(9, 3, 80, 80), torch.float32, {}),
    ],
    ids=["llama", "all options", "multi-query", "256 wide", "fp32"],
)
def test_every_launch_compiles(compile_step, capability, sequences, shape, dtype, options):
    """Types and tl.dot sizes are right, half precision uses the tensor cores, keys are loaded asynchronously, and a
    program fits the device; registers hardly spill."""
    compiled = compile_step(capability, sequences, shape, dtype, **options)
    assert {kernel.name for kernel in compiled} >= {"_kernel"}
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        if kernel.name == "_kernel":
            ptx = kernel.asm["ptx"]
            assert "cp.async" in ptx
            assert dtype == torch.float32 or "mma.sync" in ptx or "wgmma.mma_async" in ptx
            assert spilled_bytes(ptx, capability) <= 128


@pytest.mark.parametrize("capability", [86, 89])
@pytest.mark.parametrize("shape", [LLAMA, WIDE, Shape(2, 1, 512, 512)], ids=["128 wide", "256 wide", "512 wide"])
def test_consumer_devices_have_room(compile_step, capability, shape):
    """The tiles fit where there are 99 KB of shared memory."""
    for kernel in compile_step(capability, [(100, 1), (0, 64)], shape, torch.bfloat16):
        assert kernel.metadata.shared <= SHARED_BYTES[capability]


def spilled_bytes(ptx, capability):
    """What the assembler has to keep in memory for want of registers; 0 where Triton brings no assembler."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not assembler.exists():
        return 0
    target = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [str(assembler), "-v", f"--gpu-name={target}", "-", "-o", "/dev/null"]
    result = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    found = re.findall(r"(\d+) bytes spill stores", result.stdout + result.stderr)
    return int(found[-1]) if found else 0
