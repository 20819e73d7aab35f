"""Numbers that all clients of a run begin with, drawn from its name: nobody has to send them. Pure.

    seed, shape ─► SHAKE-256 ─► A for LoRA, as PEFT's own begins; or which input columns the warm-up changes

A hash function is used as the source of chance because its output is fixed for good, on any machine and any version of
anything, which no generator of torch or NumPy promises.
"""

from hashlib import shake_256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def common_a(seed: str, rank: int, num_inputs: int) -> Tensor:
    """[rank, num_inputs], uniform in +-1 / sqrt(num_inputs), as PEFT draws A (Kaiming's rule with a = sqrt(5))."""
    parts = _words(seed, rank * num_inputs) >> 8  # 24 bits: each is a number of fp32
    uniform = parts.astype(np.float64) * 2.0**-23 - 1.0
    return torch.from_numpy((uniform / np.sqrt(np.float64(num_inputs))).reshape(rank, num_inputs)).float()


def selection(seed: str, num_columns: int, num_inputs: int) -> Tensor:
    """[num_columns, num_inputs]: a row with a single one for each of some input columns, drawn without repetition."""
    keys = _words(seed, num_inputs)
    columns = np.sort(np.argsort(keys, kind="stable")[:num_columns])
    found = torch.zeros(num_columns, num_inputs)
    found[torch.arange(len(columns)), torch.from_numpy(columns)] = 1.0
    return found


def _words(seed: str, number: int) -> NDArray[np.uint32]:
    return np.frombuffer(shake_256(seed.encode()).digest(4 * number), dtype="<u4").astype(np.uint32)
