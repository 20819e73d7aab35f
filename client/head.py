"""Makes the head, hidden state to logits, as fast as this machine allows.

    fit_head ─► format asked for ─► fastest layout of its matrix ─► shared by concurrent sessions (client.sharing)

For one token the head is a matrix-vector product that must read the whole matrix (49152 x 576 floats = 113 MB), and
memory layout decides. One EPYC core, ms by number of rows:

    rows                              1     2     4     8    16    32
    [vocabulary, hidden]            7.6  14.3  11.8  12.0  16.4  26.1
    transposed ("columns")          4.2   8.4  10.9  13.0  17.4  25.8
    oneDNN's own layout ("packed")  2.9   3.3   3.6   4.4   6.0   9.9    bfloat16: 1.3 for one row, 3.4 for 16

All are the same sums in another order, so the choice is made by measurement at load. The packed matrix is a copy where
it is tied to the embeddings, which are looked up by rows; a transposed one stays one tensor. Reduced formats are an
option, never a default.

Knows nothing of models but their output embeddings.
"""

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from swarm.client.sharing import share
from swarm.errors import InvalidRequest

logger = logging.getLogger(__name__)

HeadFormat = Literal["auto", "float32", "bfloat16", "float16", "int8"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIN_GAIN = 0.9
"""Take the other layout only when it needs less than this part of the time."""
_SMALL = 1 << 20
"""Entries below which the layout does not matter."""
_MAX_COPY_BYTES = 1 << 30
"""Largest matrix that is kept twice, for the head and for the embeddings that are tied to it."""
_PACKED_ROWS = 32
"""Rows that the packed layout is made for; it is as good for fewer."""
_REPEATS = 3


def fit_head(model: PreTrainedModel, head: HeadFormat = "auto") -> None:
    """Choose the format and layout of the model's output matrix, in place.

    Args:
        model: loaded, with a head that is a nn.Linear; other heads stay as they are.
        head: "auto" keeps the dtype. A floating type or "int8" (a scale per row) makes the head approximate: about 4e-4
            (float16), 4e-3 (bfloat16) or 1e-2 (int8) of the largest logit.

    Raises:
        InvalidRequest: unknown format, or one that does not run here.
    """
    linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head not in ("auto", "int8", *_DTYPES):
        raise InvalidRequest(f"head format {head!r} is not one of auto, int8, {', '.join(_DTYPES)}")
    if not isinstance(linear, nn.Linear):
        if head != "auto":
            raise InvalidRequest(f"the head of {type(model).__name__} is no plain matrix, so it can't be {head}")
        return
    fitted: nn.Module
    if head == "int8":
        fitted = Int8Head(linear)
    else:
        embeddings = model.get_input_embeddings()
        is_tied = getattr(embeddings, "weight", None) is linear.weight
        fitted = fastest(linear, _DTYPES.get(head, linear.weight.dtype), is_tied=is_tied)
    if _matters(linear):
        fitted = share(fitted, linear.in_features, linear.weight.dtype)
    if fitted is not linear:
        model.set_output_embeddings(fitted)  # type: ignore[no-untyped-call]


@torch.no_grad()
def fastest(linear: nn.Linear, dtype: torch.dtype, *, is_tied: bool) -> nn.Module:
    """The head with its matrix in `dtype` and in the layout that takes the least time for one token.

    Args:
        linear: as loaded; its matrix may be laid out anew in place.
        dtype: for the product.
        is_tied: whether the matrix is also that of the input embeddings.
    """
    plain = linear if dtype == linear.weight.dtype else CastHead(linear, dtype)
    if not _matters(linear):
        return plain
    packed = None if is_tied and plain.weight.nbytes > _MAX_COPY_BYTES else pack(linear, dtype, is_tied=is_tied)
    if packed is not None:
        token = torch.ones(1, 1, linear.in_features, dtype=linear.weight.dtype)
        plain_s, packed_s = _best_s(lambda: plain(token)), _best_s(lambda: packed(token))
        logger.info("head: %.2f ms by rows, %.2f ms packed", plain_s * 1e3, packed_s * 1e3)
        if packed_s <= _MIN_GAIN * plain_s:
            return packed
    if plain is linear:
        choose_layout(linear)
    return plain


@torch.no_grad()
def choose_layout(linear: nn.Linear) -> str:
    """Store the matrix column after column where that is measurably faster for one token.

    Returns:
        "rows" or "columns".
    """
    weight = linear.weight
    if not _matters(linear):
        return "rows"
    token = torch.ones(1, 1, linear.in_features, dtype=weight.dtype)
    by_rows = _best_s(lambda: F.linear(token, weight, linear.bias))
    columns = weight.t().contiguous().t()
    by_columns = _best_s(lambda: F.linear(token, columns, linear.bias))
    logger.info("head: %.2f ms by rows, %.2f ms by columns", by_rows * 1e3, by_columns * 1e3)
    if by_columns > _MIN_GAIN * by_rows:
        return "rows"
    weight.data = columns
    return "columns"


def pack(linear: nn.Linear, dtype: torch.dtype, *, is_tied: bool) -> "PackedHead | None":
    """The head in oneDNN's layout, or None where there is no oneDNN or it doesn't know the type on this CPU."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    try:
        return PackedHead(linear, dtype, is_tied=is_tied)
    except RuntimeError as error:
        logger.debug("no packed head in %s: %s", dtype, error)
        return None


class PackedHead(nn.Module):
    """A head whose matrix is in oneDNN's blocked layout; all rows of a small batch take little more than one.

    Args:
        linear: the head as loaded.
        dtype: for the product.
        is_tied: keep the plain matrix, too, since the embeddings need it anyway; else it is made anew when needed.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, is_tied: bool):
        super().__init__()
        weight = linear.weight.detach().to(dtype).contiguous()
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        self._dtype = dtype
        self._tied = linear.weight if is_tied else None
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] to logits [..., V], in the dtype of the input."""
        is_plain = hidden_states.device.type == "cpu" and not (torch.is_grad_enabled() and hidden_states.requires_grad)
        rows = hidden_states.to(self._dtype)
        if is_plain:
            logits = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        else:
            logits = F.linear(rows, self.weight.to(rows), None if self.bias is None else self.bias.to(rows))
        return logits.to(hidden_states.dtype)  # type: ignore[no-any-return]

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [V, H]; made anew with each call where it is not that of the embeddings."""
        if self._tied is not None:
            return self._tied
        dense: torch.Tensor = self._packed.to_dense()
        return dense


class CastHead(nn.Module):
    """A head whose product is computed in a narrower floating type."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] to logits [..., V], in the dtype of the input."""
        return F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias).to(hidden_states.dtype)


class Int8Head(nn.Module):
    """A head whose matrix is int8 with a scale per row; products are summed in bfloat16's range."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] to logits [..., V], in the dtype of the input."""
        rows = hidden_states.reshape(-1, self.in_features).to(torch.bfloat16)
        logits = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(hidden_states.dtype)
        logits = logits if self.bias is None else logits + self.bias
        return logits.view(*hidden_states.shape[:-1], self.out_features)


def _matters(linear: nn.Linear) -> bool:
    """Whether the layout of this matrix can make a difference."""
    return linear.weight.device.type == "cpu" and linear.weight.numel() >= _SMALL


def _best_s(compute: Callable[[], object]) -> float:
    compute()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return min(times)
