"""Modules of Triton kernels run by Triton's interpreter on the CPU. Its bf16 dots are wrong: fp32 and fp16 only."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """The module of this name with interpreted kernels; afterwards compiled ones again.

    Triton decides at its own import how its library functions (tl.cdiv, ...) run, and others may have imported it
    before: they are switched over too. An interpreted one leaves the language patched, so that nothing would compile
    any more: all of it is put back.
    """
    from triton import language
    from triton.language import core
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    spaces = (language, language.standard, language.math, core, core.tensor, core.dtype, core.tensor_descriptor_base)
    before = [dict(vars(space)) for space in spaces]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            for library in (language, language.standard):
                for key, function in list(vars(library).items()):
                    if isinstance(function, JITFunction):
                        patch.setattr(library, key, InterpretedFunction(function.fn))
            yield importlib.reload(importlib.import_module(name))
    finally:
        for space, members in zip(spaces, before, strict=True):
            for key, member in list(vars(space).items()):
                if key not in members:
                    delattr(space, key)
                elif member is not members[key]:
                    setattr(space, key, members[key])
        importlib.reload(importlib.import_module(name))
