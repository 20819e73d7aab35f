"""A server process stays free of what it never uses, and still runs every kind of block."""

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from swarm.server.lean import collect_garbage

SCRIPT = """
import gc, sys, torch
from swarm.server.lean import import_transformers_lean, settle_heap, thaw_heap
assert import_transformers_lean()
from swarm.checkpoint.source import resolve
from swarm.server.blocks.span import BlockSpan
from swarm.server.block_facts import measure
from swarm.types import BlockRange
for path in sys.argv[1:]:
    span = BlockSpan.load(resolve(path), BlockRange(0, 2), num_pages=4)
    assert measure(span).single_tps > 0
loaded = {name for name in ("torch._inductor", "torch.distributed.tensor", "scipy", "pandas") if name in sys.modules}
assert not loaded, loaded
assert not import_transformers_lean(), "too late now"
settle_heap()
assert gc.get_freeze_count() > 50_000 and len(gc.get_objects()) < 10_000, "all that is there is exempt"
assert thaw_heap() and gc.get_freeze_count() == 0 and not thaw_heap(), "until it is thawed"
"""


def test_a_lean_process_runs_blocks_without_compiler_scipy_or_distributed_tensors(tmp_path):
    """A model with our attention plugged in and one with an adapter both run in a process without the heavy modules,
    whose objects the garbage collector never looks at again."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)).to(torch.float32).save_pretrained(tmp_path / "llama")
    FalconForCausalLM(FalconConfig(**sizes)).to(torch.float32).save_pretrained(tmp_path / "falcon")
    paths = [str(tmp_path / "llama"), str(tmp_path / "falcon")]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_garbage_is_freed_though_another_thread_is_in_the_middle_of_it():
    """Python's own collection does nothing then; a server that leaves its blocks needs their memory."""
    entered, may_end = threading.Event(), threading.Event()

    class Slow:
        def __init__(self):
            self.itself = self

        def __del__(self):
            entered.set()
            may_end.wait(10)

    class Blocks:
        def __init__(self):
            self.itself = self

    gc.disable()  # only who is told to collects
    try:
        with ThreadPoolExecutor(2) as pool:
            Slow()
            other = pool.submit(gc.collect)
            assert entered.wait(10)
            blocks = weakref.ref(Blocks())
            assert gc.collect() == 0 and blocks() is not None
            freeing = pool.submit(collect_garbage)
            may_end.set()
            freeing.result(10)
            assert blocks() is None
            other.result(10)
    finally:
        gc.enable()
