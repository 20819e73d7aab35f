"""The attention of one block over its paged KV cache, in the shape in which transformers' layers call it.

transformers layer --q, k, v of the new rows--> internals.attend --> LayerAttention --> kernels.paged_attention
                                                                         |
                                                          k_pool, v_pool (all pages of this block), Step

Rows of whole sequences that are trained on (`Step.whole`) are attended to without the cache, with gradients.
The rows at positions that an adapter has put before a sequence get the keys and values that the adapter has for them.
"""

from typing import Any

import torch
from torch import Tensor

from swarm.errors import UnsupportedModel
from swarm.kernels.paged_attention import AttentionForm, paged_attention, write_kv
from swarm.kernels.ragged_attention import ragged_attention
from swarm.server.blocks.rank_pages import Strip
from swarm.server.blocks.step import Step
from swarm.server.pages import PAGE_SIZE

IGNORED_OPTIONS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cu_seq_lens_q",
                             "cu_seq_lens_k", "max_length_q", "max_length_k", "position_embeddings", "layer_idx",
                             "output_hidden_states", "return_dict", "cache_position", "seq_idx"})  # fmt: skip
"""Keyword arguments of attention calls that don't change what causal attention with our own cache computes."""


class LayerAttention:
    """Attention of one block: owns the block's KV pools.

    Args:
        form: what it computes.
        kv_shape: (kv heads, key width, value width).
        temperature: (floor_scale, attn_scale) of Llama 4's position-dependent query scale, or None.
        step: the rows being run, shared by all blocks of the span.
    """

    def __init__(
        self,
        form: AttentionForm,
        kv_shape: tuple[int, int, int],
        temperature: tuple[float, float] | None,
        step: Step,
    ):
        self.form = form
        self.kv_shape = kv_shape
        self._temperature = temperature
        self._step = step
        self.prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        """By adapter: keys and values of its virtual positions, [P, kv heads, width]."""
        self.memory: Tensor
        """One flat buffer; the pools are views of it, keys first."""
        self.k_pool: Tensor
        self.v_pool: Tensor

    def allocate(self, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the pools, [kv heads, num_pages * PAGE_SIZE, width]; a CPU gives memory only to pages that are used."""
        heads, key_width, value_width = self.kv_shape
        slots = num_pages * PAGE_SIZE
        keys, values = heads * slots * key_width, heads * slots * value_width
        self.memory = torch.empty(keys + values, dtype=dtype, device=device)
        self.k_pool = self.memory[:keys].view(heads, slots, key_width)
        self.v_pool = self.memory[keys:].view(heads, slots, value_width)

    @property
    def strips(self) -> list[Strip]:
        """Where the parts of a page lie in `memory`."""
        heads, key_width, value_width = self.kv_shape
        slots = self.k_pool.shape[1]
        keys = [Strip(head * slots * key_width, PAGE_SIZE * key_width) for head in range(heads)]
        first = self.k_pool.numel()
        return keys + [Strip(first + head * slots * value_width, PAGE_SIZE * value_width) for head in range(heads)]

    def page_bytes(self, dtype: torch.dtype) -> int:
        heads, key_width, value_width = self.kv_shape
        return heads * PAGE_SIZE * (key_width + value_width) * dtype.itemsize

    def copy_page(self, source: int, destination: int) -> None:
        for pool in (self.k_pool, self.v_pool):
            old, new = source * PAGE_SIZE, destination * PAGE_SIZE
            pool[:, new : new + PAGE_SIZE] = pool[:, old : old + PAGE_SIZE]

    def read_pages(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these pages on the host, [kv heads, pages, PAGE_SIZE * width]."""
        return self._by_page(self.k_pool)[:, pages].cpu(), self._by_page(self.v_pool)[:, pages].cpu()

    def write_pages(self, pages: Tensor, saved: tuple[Tensor, Tensor]) -> None:
        """Put what `read_pages` gave into these pages."""
        for pool, content in zip((self.k_pool, self.v_pool), saved, strict=True):
            self._by_page(pool).index_copy_(1, pages, content.to(pool.device))

    @staticmethod
    def _by_page(pool: Tensor) -> Tensor:
        return pool.view(pool.shape[0], -1, PAGE_SIZE * pool.shape[2])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, options: Any) -> Tensor:
        """Cache the new rows' keys and values and attend.

        Args:
            query, key, value: [1, H, T, D], [1, K, T, D], [1, K, T, E].

        Returns:
            [1, T, H, E].
        """
        if self._temperature is not None:
            query = query * self._query_scale(query.dtype)
        if self._step.whole is not None:
            return self._attend_whole(query[0], key[0].transpose(0, 1), value[0].transpose(0, 1))[None]
        batch = self._step.batch
        key, value = key[0], value[0]
        if self._step.virtual:
            key, value = self._with_prefixes(key, value)
        write_kv(key, value, self.k_pool, self.v_pool, batch)
        return paged_attention(query[0], self.k_pool, self.v_pool, batch, self.form)[None]

    def attend_rows(self, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor) -> Tensor:
        """The same for rows as they come out of a projection -> [T, H, E]."""
        if self._step.whole is not None:
            return self._attend_whole(q_THD.transpose(0, 1), k_TKD, v_TKE)
        batch = self._step.batch
        k_KTD, v_KTE = k_TKD.transpose(0, 1), v_TKE.transpose(0, 1)
        if self._step.virtual:
            k_KTD, v_KTE = self._with_prefixes(k_KTD, v_KTE)
        write_kv(k_KTD, v_KTE, self.k_pool, self.v_pool, batch)
        return paged_attention(q_THD.transpose(0, 1), self.k_pool, self.v_pool, batch, self.form)

    def _attend_whole(self, q_HTD: Tensor, k_TKD: Tensor, v_TKE: Tensor) -> Tensor:
        """Rows of whole sequences: nothing is cached -> [T, H, E]."""
        whole = self._step.whole
        assert whole is not None
        if whole.prefix is not None:
            k_TKD, v_TKE = whole.prefix.put(k_TKD, v_TKE)
        return ragged_attention(q_HTD, k_TKD.transpose(0, 1), v_TKE.transpose(0, 1), whole.batch, self.form)

    def _with_prefixes(self, k_KTD: Tensor, v_KTE: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with what adapters have for the rows at their virtual positions."""
        if not self.prefixes:
            return k_KTD, v_KTE
        k_KTD, v_KTE = k_KTD.clone(), v_KTE.clone()
        for it in self._step.virtual:
            if (prefix := self.prefixes.get(it.adapter)) is not None:
                for rows, prefix_PKW in zip((k_KTD, v_KTE), prefix, strict=True):
                    own = prefix_PKW[it.position : it.position + it.num_rows]
                    rows[:, it.row : it.row + it.num_rows] = own.transpose(0, 1)
        return k_KTD, v_KTE

    def _query_scale(self, dtype: torch.dtype) -> Tensor:
        assert self._temperature is not None
        return query_scale(self._step.positions_1T, self._temperature).to(dtype)


def query_scale(positions_1T: Tensor, temperature: tuple[float, float]) -> Tensor:
    """[1, 1, T, 1]: Llama 4 scales the queries of its position-free layers with the logarithm of the position."""
    floor_scale, attn_scale = temperature
    scale = torch.log1p(torch.floor((positions_1T.float() + 1.0) / floor_scale)) * attn_scale + 1.0
    return scale[:, None, :, None]


def attention_form(
    options: dict[str, Any], *, key_width: int, chunk: int | None, alibi_H: Tensor | None, sinks_H: Tensor | None
) -> AttentionForm:
    """Read the keyword arguments with which a layer calls its attention.

    Raises:
        UnsupportedModel: for an argument that we don't know and so can't honour.
    """
    known = dict(options)
    scale = known.pop("scaling", None)
    window = known.pop("sliding_window", None)
    softcap = known.pop("softcap", None)
    sinks_H = known.pop("s_aux", sinks_H)
    unknown = sorted(name for name, value in known.items() if name not in IGNORED_OPTIONS and value is not None)
    if unknown:
        raise UnsupportedModel(f"its attention is called with {', '.join(unknown)}, which this runner can't honour")
    if options.get("is_causal") is False:
        raise UnsupportedModel("its attention is not causal")
    return AttentionForm(
        scale=float(scale) if scale is not None else key_width**-0.5,
        window=int(window) if window else None,
        chunk=chunk,
        softcap=float(softcap) if softcap else None,
        sinks_H=sinks_H.detach() if sinks_H is not None else None,
        alibi_H=alibi_H,
    )
