"""The self-check at load: what kind of block is this, and would this runner run it wrongly?

A block is run on a few made-up rows with attention replaced by a stand-in that mixes nothing between rows. Then

    each row alone gives the same   one attention call, or none: rows of any sessions may share a batch
    it does not                     rows are mixed by something else: it must be a recurrent state that transformers'
                                    cache holds (run sequence by sequence), or the model is refused

Also refused: attention called twice, with a mask, not causal, or with arguments that we can't honour. So a model
that would silently be run without its causal mask, or with another session's rows, never loads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from swarm.errors import UnsupportedModel
from swarm.kernels.paged_attention import AttentionForm
from swarm.server.blocks.attention import attention_form
from swarm.server.blocks.internals import PROBE, LayerCall, Ropes, SequenceState
from swarm.server.blocks.quirks import Quirks

_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedAttention:
    """The one attention call of a block."""

    module: nn.Module
    """The submodule that makes the call."""
    form: AttentionForm
    kv_shape: tuple[int, int, int]
    """(kv heads, key width, value width)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """What the self-check found out about one block."""

    attention: ProbedAttention | None
    """None for a block without attention."""
    stateful: bool
    """It keeps a recurrent state and must be run sequence by sequence."""
    token_by_token: bool
    """Its state is only read when it is given one row (transformers' Mamba scans a longer chunk from zero)."""
    returns_tuple: bool


class Prober:
    """Checks blocks of one model.

    Args:
        config: of the whole model.
        quirks: of the model type.
        ropes: the rotary embeddings of the span.
    """

    def __init__(
        self, config: PretrainedConfig, quirks: Quirks, ropes: Ropes, dtype: torch.dtype, device: torch.device
    ):
        self._config = config
        self._text_config = config.get_text_config(decoder=True)
        self._quirks = quirks
        self._ropes = ropes
        self.device = device
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, _ROWS, self._text_config.hidden_size, generator=generator)
        self._hidden = hidden.to(dtype).to(device)
        self._positions = torch.arange(2, 2 + _ROWS, device=device)[None]
        slopes = quirks.alibi_H(self._text_config)
        self._alibi_H = slopes.to(device) if slopes is not None else None
        self._forms: dict[tuple[Any, ...], AttentionForm] = {}

    def check(self, index: int, layer: nn.Module, call: LayerCall) -> BlockSpec:
        """Examine block `index`.

        Raises:
            UnsupportedModel: it would be run wrongly; the message names the block and the reason.
        """
        try:
            return self._check(index, layer, call)
        except UnsupportedModel as error:
            kind = type(layer).__name__
            raise UnsupportedModel(f"{self._config.model_type}: block {index} ({kind}): {error}") from error

    def run(self, index: int, layer: nn.Module, call: LayerCall, rows: slice, state: Any = None) -> Tensor:
        """Run a block on made-up rows with the stand-in for attention -> its hidden states."""
        output, _ = self._run(index, layer, call, rows, state)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _run(
        self, index: int, layer: nn.Module, call: LayerCall, rows: slice, state: Any = None
    ) -> tuple[Any, list[Any]]:
        calls: list[Any] = []

        def stand_in(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
            calls.append((module, q.shape, k.shape, v.shape, mask, options))
            return _rowwise_attention(q, k, v)

        hidden, positions = self._hidden[:, rows], self._positions[:, rows]
        arguments = dict(call.constants)
        if call.rope is not None:
            arguments["position_embeddings"] = self._ropes.compute(hidden, positions, [hidden.shape[1]])[call.rope]
        if call.takes_positions:
            arguments["position_ids"] = positions
        if call.cache_argument is not None:
            arguments[call.cache_argument] = state
        bound = [module for module in layer.modules() if module.__dict__.pop("swarm_attention", None) is not None]
        assert not bound, "a block is probed before its attention is bound"
        PROBE.handler = stand_in
        try:
            with torch.inference_mode():
                return layer(hidden, **arguments), calls
        finally:
            PROBE.handler = None

    def _check(self, index: int, layer: nn.Module, call: LayerCall) -> BlockSpec:
        output, calls = self._run(index, layer, call, slice(0, _ROWS))
        returns_tuple = isinstance(output, tuple)
        together = output[0] if returns_tuple else output
        if not isinstance(together, Tensor) or together.shape != self._hidden.shape:
            raise UnsupportedModel("it doesn't return hidden states of the shape that it takes")
        if not torch.isfinite(together).all():
            raise UnsupportedModel("its output is not finite; a buffer was left without values")
        attention = self._attention(index, layer, calls)
        alone = self.run(index, layer, call, slice(_ROWS - 1, _ROWS))
        mixes = _difference(alone, together[:, -1:]) > _tolerance(together)
        stateful = self._keeps_state(index, layer, call)
        if mixes and not stateful:
            seen = "beside its attention call" if calls else "without calling attention"
            raise UnsupportedModel(f"it mixes tokens {seen} and without a recurrent state that could be kept")
        slow = stateful and self._must_go_token_by_token(index, layer, call, together)
        return BlockSpec(attention=attention, stateful=stateful, token_by_token=slow, returns_tuple=returns_tuple)

    def _must_go_token_by_token(self, index: int, layer: nn.Module, call: LayerCall, together: Tensor) -> bool:
        """Whether rows in two chunks give something else than all rows at once, while row after row gives the same."""

        def in_parts(*cuts: int) -> float:
            state, parts = SequenceState(self._config), []
            for start, end in zip((0, *cuts), (*cuts, _ROWS), strict=True):
                state.position = start
                parts.append(self.run(index, layer, call, slice(start, end), state))
            return _difference(torch.cat(parts, dim=1), together)

        chunked, single = in_parts(2), in_parts(*range(1, _ROWS))
        if single > _tolerance(together):
            raise UnsupportedModel(f"its state doesn't resume: row after row is off by {single:.1e}")
        return chunked > max(3 * single, _tolerance(together) / 10)

    def _attention(self, index: int, layer: nn.Module, calls: list[Any]) -> ProbedAttention | None:
        if not calls:
            return None
        if len(calls) > 1:
            raise UnsupportedModel(f"it calls attention {len(calls)} times, expected once")
        module, q, k, v, mask, options = calls[0]
        if mask is not None:
            raise UnsupportedModel("it gives its attention a mask of its own")
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModel("its attention is not causal")
        if q[0] != 1 or q[2] != _ROWS or k[2] != _ROWS or v[2] != _ROWS or q[1] % k[1] or k[1] != v[1] or q[3] != k[3]:
            raise UnsupportedModel(f"its queries {tuple(q)}, keys {tuple(k)} and values {tuple(v)} don't fit together")
        form = self._form(index, module, options, k[3])
        return ProbedAttention(module=module, form=form, kv_shape=(k[1], k[3], v[3]))

    def _form(self, index: int, module: nn.Module, options: dict[str, Any], key_width: int) -> AttentionForm:
        """What the call computes; layers that compute the same share one form, and so their masks."""
        kinds = getattr(self._text_config, "layer_types", None) or []
        kind = kinds[index] if index < len(kinds) else None
        chunk = self._text_config.attention_chunk_size if kind == "chunked_attention" else None
        if kind == "sliding_attention" and options.get("sliding_window") is None:
            options = {**options, "sliding_window": self._text_config.sliding_window}
        form = attention_form(options, key_width=key_width, chunk=chunk, alibi_H=self._alibi_H, sinks_H=None)
        if form.sinks_H is not None:
            return form
        return self._forms.setdefault((form.scale, form.window, form.chunk, form.softcap), form)

    def _keeps_state(self, index: int, layer: nn.Module, call: LayerCall) -> bool:
        if call.cache_argument is None:
            return False
        state = SequenceState(self._config)
        try:
            self.run(index, layer, call, slice(0, _ROWS), state)
        except (ValueError, AttributeError, IndexError, TypeError, NotImplementedError):
            return False  # it isn't a layer of this kind of cache
        return state.touched(index)


def _rowwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, T, H, E] from each row's own query, key and value alone.

    Every element of them matters by itself: q . k of one row would not notice another rotary embedding, which turns
    both alike.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ramp = torch.linspace(-1, 2, query.shape[-1], device=query.device)
    weight = torch.tanh((query.float() * ramp + key.float() * ramp.square()).mean(-1, keepdim=True))
    return (value * (1 + weight).to(value.dtype)).transpose(1, 2).contiguous()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / (1e-6 + b.abs().max()))


def _tolerance(like: Tensor) -> float:
    """What the rounding of matrix products of different shapes may do, relative to the largest number."""
    return 1e-4 if like.dtype == torch.float32 else 5e-2
