"""Triton's interpreter as far as it needs help; imported by tests and by tests/bench/gpu/check.py --smoke."""

from collections.abc import Callable
from typing import Any


def mend_interpreter() -> None:
    """Let Triton 3.6's interpreter turn loop bounds into numbers under numpy 2.4 and later.

    It calls int() on arrays of one element, which numpy no longer takes; Triton 3.7 squeezes them first.
    """
    from triton.runtime import interpreter

    patch_tensor: Callable[..., None] | None = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None or hasattr(patch_tensor, "mended"):
        return

    def patch_and_squeeze(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)  # keeps what it replaces, and puts that back afterwards
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    patch_and_squeeze.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_squeeze
