"""Causal attention of new rows over a paged KV cache: layout of a step, reference, and the one public function.

    softmax_j( cap(scale * q_i . k_j) + alibi_h * (j - i)  |  sink_h ) . v_j      over the keys j that row i may see:
    j <= i,   j > i - window,   j // chunk == i // chunk                          (i, j: absolute positions)

Rows of many sequences, prefill and decode, are flattened into one batch; `PagedBatch` says which rows belong to which
sequence and where its pages lie, and is built once per step for all layers. A sink is a logit without a value.

    q_HTD, k_KTD, v_KTE --write_kv--> pools --paged_attention--> out_THE
                                               |-- CUDA: triton_paged_attention      |-- CPU: cpu_paged_attention

It does not know models, layers or sessions. Legend: T rows of all sequences, H query heads, K key/value heads
(H = K * G, query heads h*G..h*G+G-1 share head h), D key width, E value width, S slots of a pool (pages * page size),
N sequences, L keys of one sequence.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["AttentionForm", "PagedBatch", "RowSpan", "paged_attention", "paged_attention_reference", "write_kv"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionForm:
    """What one layer's attention computes; the same for every step."""

    scale: float
    """Factor on the logits q . k."""
    window: int | None = None
    """Sliding window: a row sees this many positions, its own included."""
    chunk: int | None = None
    """Chunked attention: a row sees only positions of its own chunk of this many."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap)."""
    sinks_H: Tensor | None = None
    """One extra logit per query head that takes part in the softmax and has no value."""
    alibi_H: Tensor | None = None
    """One slope per query head: slope * (j - i) is added to the (capped) logits."""

    @property
    def simple(self) -> bool:
        """Whether one row over its own visible keys is a plain softmax, without caps, sinks or biases."""
        return self.softcap is None and self.sinks_H is None and self.alibi_H is None

    def first_key(self, position: int) -> int:
        """The smallest position that a row at `position` may see."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The new rows of one sequence inside a step."""

    start: int
    """Index of the first row in the flattened batch."""
    count: int
    """Number of new rows, >= 1."""
    position: int
    """Absolute position of the first row: keys [0, position) are in the pages already."""
    pages: Sequence[int]
    """Pages of the sequence; token i lies in pages[i // page_size]. More pages than needed are ignored."""

    @property
    def length(self) -> int:
        """Keys of the sequence once the new rows are written."""
        return self.position + self.count


class PagedBatch:
    """Where the rows of one step live. Built once per step; every layer of the step uses it.

    Args:
        spans: the sequences in row order, together covering rows [0, T).
        page_size: tokens per page.
        device: of the pools.
    """

    __slots__ = ("decode_run", "device", "fresh_tails", "memo", "num_rows", "page_size", "runs", "single_run",
                 "slots_T", "spans")  # fmt: skip

    def __init__(self, spans: Sequence[RowSpan], page_size: int, device: torch.device):
        self.spans = spans
        self.page_size = page_size
        self.device = device
        self.num_rows = spans[-1].start + spans[-1].count
        self.runs = [_run(span, page_size) for span in spans]
        """First slot of each sequence whose pages are one ascending run; None for a scattered one."""
        self.fresh_tails = (
            [] if device.type == "cuda" else [tail for span in spans if (tail := _fresh_tail(span, page_size))]
        )
        """Slots [first, last) of pages that this step enters but doesn't fill, where they are ever read: on CPUs."""
        first_run = self.runs[0] if len(spans) == 1 else None
        self.single_run = None if first_run is None else first_run + spans[0].position
        """First slot to write to when the step is one sequence in one run of pages: its cache is a plain slice."""
        self.decode_run = first_run if self.num_rows == 1 else None
        """First slot of the sequence when, besides, there is just one row: the most frequent step of all."""
        self.slots_T = None if self.single_run is not None else self._slots()
        self.memo: dict[Hashable, Any] = {}
        """What an implementation derives from the layout, kept for the other layers of this step."""

    def _slots(self) -> Tensor:
        size = self.page_size
        slots: list[int] = []
        for span, run in zip(self.spans, self.runs, strict=True):
            if run is not None:
                slots += range(run + span.position, run + span.length)
            else:
                slots += [span.pages[i // size] * size + i % size for i in range(span.position, span.length)]
        return torch.tensor(slots, dtype=torch.int64).to(self.device, non_blocking=True)


def write_kv(k_KTD: Tensor, v_KTE: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch) -> None:
    """Put the new keys and values of all rows into their slots.

    On CPUs the unused rest of a page that a sequence enters is zeroed, so that no stale number (or NaN) of the page's
    former owner can reach a batched read that masks it only by weight. The Triton kernel never reads it.
    """
    if batch.slots_T is None:
        assert batch.single_run is not None
        k_pool_KSD.narrow(1, batch.single_run, batch.num_rows).copy_(k_KTD)
        v_pool_KSE.narrow(1, batch.single_run, batch.num_rows).copy_(v_KTE)
    else:
        k_pool_KSD.index_copy_(1, batch.slots_T, k_KTD.to(k_pool_KSD.dtype))
        v_pool_KSE.index_copy_(1, batch.slots_T, v_KTE.to(v_pool_KSE.dtype))
    for first, last in batch.fresh_tails:
        k_pool_KSD[:, first:last] = 0
        v_pool_KSE[:, first:last] = 0


def paged_attention(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """Attention of all rows of a step over their own sequences, whose new keys and values are in the pools already.

    Args:
        q_HTD: queries of all rows; fp32, fp16 or bf16.
        k_pool_KSD, v_pool_KSE: pools of one layer, of the queries' dtype.
        batch: the layout of the step.
        form: what this layer computes.

    Returns:
        [T, H, E] in the dtype of the queries.
    """
    if q_HTD.is_cuda:
        from swarm.kernels.triton_paged_attention import paged_attention_triton

        return paged_attention_triton(q_HTD, k_pool_KSD, v_pool_KSE, batch, form)
    from swarm.kernels.cpu_paged_attention import paged_attention_cpu

    return paged_attention_cpu(q_HTD, k_pool_KSD, v_pool_KSE, batch, form)


def paged_attention_reference(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """The definition, one sequence at a time and in fp32: slow, and what every other form is tested against."""
    groups = q_HTD.shape[0] // k_pool_KSD.shape[0]
    outputs = []
    for span in batch.spans:
        keys = torch.arange(span.length)
        pages = torch.tensor(list(span.pages))
        slots = (pages[keys // batch.page_size] * batch.page_size + keys % batch.page_size).to(batch.device)
        k_HLD = k_pool_KSD[:, slots].float().repeat_interleave(groups, 0)
        v_HLE = v_pool_KSE[:, slots].float().repeat_interleave(groups, 0)
        q_HnD = q_HTD[:, span.start : span.start + span.count].float()
        logits_HnL = q_HnD @ k_HLD.transpose(1, 2) * form.scale
        if form.softcap is not None:
            logits_HnL = form.softcap * torch.tanh(logits_HnL / form.softcap)
        distance_nL = (keys - torch.arange(span.position, span.length)[:, None]).to(batch.device)
        if form.alibi_H is not None:
            logits_HnL = logits_HnL + form.alibi_H.float()[:, None, None] * distance_nL
        logits_HnL = logits_HnL.masked_fill(~visible(span, form).to(batch.device), float("-inf"))
        if form.sinks_H is not None:
            sinks_Hn1 = form.sinks_H.float()[:, None, None].expand(-1, span.count, 1)
            logits_HnL = torch.cat([logits_HnL, sinks_Hn1], -1)
        weights_HnL = logits_HnL.softmax(-1)[..., : span.length]
        outputs.append((weights_HnL @ v_HLE).transpose(0, 1))
    return torch.cat(outputs).to(q_HTD.dtype)


def visible(span: RowSpan, form: AttentionForm, first_key: int = 0) -> Tensor:
    """[count, length - first_key] bool on the CPU: which keys (from `first_key` on) each new row may see."""
    rows = torch.arange(span.position, span.length)[:, None]
    keys = torch.arange(first_key, span.length)
    seen = keys <= rows
    if form.window is not None:
        seen &= keys > rows - form.window
    if form.chunk is not None:
        seen &= keys // form.chunk == rows // form.chunk
    return seen


def _run(span: RowSpan, page_size: int) -> int | None:
    needed = -(-span.length // page_size)
    first = span.pages[0]
    if needed > 1 and list(span.pages[:needed]) != list(range(first, first + needed)):
        return None
    return first * page_size


def _fresh_tail(span: RowSpan, page_size: int) -> tuple[int, int] | None:
    used = span.length % page_size
    last = span.length - used
    if used == 0 or last < span.position:
        return None
    page = span.pages[span.length // page_size] * page_size
    return page + used, page + page_size
