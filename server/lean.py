"""Keeps out of a CPU server's process what transformers imports and a server never uses: small and quick to start.

Importing transformers' modelling code pulls in torch's compiler (for decorators that say "do not compile this"),
torch's distributed tensors and scipy's optimisers (for losses): 150 MB of resident memory and over a second of
start-up. A process that runs decoder layers eagerly on a CPU needs none of the three.

To be called once by the server's command line, before transformers is imported; never by a library, since it changes
the whole process: torch.compile does not work afterwards.
"""

import ctypes
import gc
import importlib.util
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch

GARBAGE_PAUSE_S = 0.001
"""How long another thread that collects garbage is left alone with it."""
_HIDDEN = frozenset({"scipy", "sklearn", "pandas"})


def import_transformers_lean() -> bool:
    """Keep the compiler, distributed tensors and scipy out of this process; False when it is too late for that."""
    if "transformers" in sys.modules or "torch._dynamo" in sys.modules:
        return False
    _stub_compiler()
    torch.distributed.is_available = lambda: False
    _hide(_HIDDEN)
    import transformers.utils.import_utils  # noqa: F401 - looks for optional packages now, and remembers the answer

    return True


def settle_heap() -> None:
    """Keep the garbage collector from looking at what is there now, which stays: to be called once all is loaded.

    Else it goes through all objects of torch, transformers and the model whenever enough others have come, and the
    device thread stands still meanwhile, for longer than a token takes.
    """
    gc.collect()
    gc.freeze()


def return_free_memory() -> None:
    """Give back to the system what this process has freed, where the C library can (glibc); some ten milliseconds.

    Tensors of many sizes that come and go leave holes, which the library keeps: a server that trains batches of ever
    other shapes would grow to several times what it needs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def thaw_heap() -> bool:
    """Undo `settle_heap`, so that blocks that are given up are found and freed; whether it had been called."""
    was_settled = gc.get_freeze_count() > 0
    gc.unfreeze()
    collect_garbage()
    return was_settled


def collect_garbage() -> None:
    """Free all that nobody can reach any more, even if another thread is about to do so.

    `gc.collect` does nothing while any thread is in the middle of a collection, where it may wait in a finalizer; then
    this waits, and collects.
    """
    own_thread, has_run = threading.get_ident(), False

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal has_run
        has_run |= phase == "stop" and info["generation"] == 2 and threading.get_ident() == own_thread

    gc.callbacks.append(note)
    try:
        while True:
            gc.collect()
            if has_run:
                return
            time.sleep(GARBAGE_PAUSE_S)
    finally:
        gc.callbacks.remove(note)


class _Compiler(types.ModuleType):
    """torch._dynamo as a package whose own code never runs; its functions are decorators that change nothing."""

    __path__: list[str]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorator


def _decorator(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return function if function is not None else _decorator


def _stub_compiler() -> None:
    stub = _Compiler("torch._dynamo")
    stub.__path__ = [os.path.join(os.path.dirname(torch.__file__), "_dynamo")]  # some of its files are used, and light
    sys.modules["torch._dynamo"] = stub
    torch._dynamo = stub


def _hide(names: frozenset[str]) -> None:
    """Let `importlib.util.find_spec`, by which transformers looks for optional packages, not find these."""
    find_spec = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in names else find_spec(name, package)

    importlib.util.find_spec = find_others
