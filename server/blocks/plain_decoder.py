"""The most common decoder layer with half the operators: pre-norm, rotary attention, gated MLP, two residuals.

    x -> norm -> q,k,v -> [q, k norms] -> rotary -> attend -> o -> + -> norm -> gate,up -> act * -> down -> +

One row of a small model spends much of its time between matrix products. Whether a layer is of this kind is not decided
by its name: it must have these submodules, and its output on sample rows must not change (`PlainDecoder.of` checks
both). Llama, Mistral, Qwen 2 and 3 and many others are. It runs instead of the layer's own forward, and calls `forward`
of products directly, where adapters put themselves while they are needed (`sites`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swarm.server.blocks.attention import LayerAttention
from swarm.server.blocks.fusion import same_output
from swarm.server.blocks.internals import attend

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "swarm_group_0"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn", "swarm_group_0"}


class RotaryTables:
    """cos and sin of the rows being run, as `PlainDecoder` uses them; shared by the blocks of a span."""

    __slots__ = ("_cos", "_of", "_sin")

    def __init__(self) -> None:
        self._of: Any = None

    def get(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[T, 1, D] each; the sign of rotate_half is in sin already."""
        if self._of is not position_embeddings:
            cos, sin = position_embeddings
            half = sin.shape[-1] // 2
            self._cos = cos[0][:, None]
            self._sin = torch.cat([-sin[0][:, None, :half], sin[0][:, None, half:]], dim=-1)
            self._of = position_embeddings
        return self._cos, self._sin


class PlainDecoder:
    """A fused layer's forward with fewer operators.

    Args:
        layer: a transformers layer after `fusion`, its linears grouped.
        tables: shared by the span.
    """

    def __init__(self, layer: nn.Module, tables: RotaryTables):
        self._layer = layer
        self._attention: Any = layer.self_attn
        self._mlp: Any = layer.mlp
        self._norms: Any = (layer.input_layernorm, layer.post_attention_layernorm)
        self._tables = tables
        attention: Any = layer.self_attn
        self._width = int(attention.head_dim)
        self._sizes = [size // self._width for size in attention.swarm_group_0.sizes]
        self._head_norms = hasattr(self._attention, "q_norm")

    @classmethod
    def of(cls, layer: nn.Module, run: Callable[[], Tensor], tables: RotaryTables) -> "PlainDecoder | None":
        """The plain form of a layer, not installed yet; None if it is of another kind.

        Args:
            layer: after `fusion`, before quantisation.
            run: runs the layer on some rows -> its output.
            tables: shared by the span.
        """
        if not cls.fits(layer):
            return None
        expected = run()
        plain = cls(layer, tables)
        plain.install()
        try:
            same = same_output(run(), expected)
        except (RuntimeError, TypeError):  # other widths, other arguments
            same = False
        plain.remove()
        return plain if same else None

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether the layer has the submodules of this kind and no others."""
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None or not hasattr(attention, "head_dim"):
            return False
        parts = {name for name, _ in layer.named_children()}
        return (
            parts == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
            and {name for name, _ in attention.named_children()} <= _ATTENTION_PARTS
            and {name for name, _ in mlp.named_children()} == _MLP_PARTS
            and len(getattr(getattr(attention, "swarm_group_0", None), "sizes", ())) == 3
            and len(mlp.swarm_group_0.sizes) == 2
        )

    def install(self) -> None:
        """Run instead of the layer's own forward."""
        self._layer.__dict__["forward"] = self

    def remove(self) -> None:
        """Give the layer its own forward back."""
        self._layer.__dict__.pop("forward", None)

    def __call__(self, hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        x_TH = hidden_states.view(hidden_states.shape[1:])
        x_TH = x_TH + self._attend(self._norms[0].forward(x_TH), position_embeddings)
        gate_up = self._mlp.swarm_group_0
        gate_TI, up_TI = gate_up.linear.forward(self._norms[1].forward(x_TH)).split_with_sizes(gate_up.sizes, dim=-1)
        down_TH: Tensor = self._mlp.down_proj.forward(self._mlp.act_fn.forward(gate_TI) * up_TI)
        return (x_TH + down_TH).unsqueeze(0)

    def _attend(self, x_TH: Tensor, position_embeddings: Any) -> Tensor:
        attention, (heads, kv_heads, _) = self._attention, self._sizes
        qkv = attention.swarm_group_0.linear.forward(x_TH).view(x_TH.shape[0], -1, self._width)
        if self._head_norms:
            q, k, v = qkv.split_with_sizes(self._sizes, dim=1)
            qk = torch.cat([attention.q_norm.forward(q), attention.k_norm.forward(k)], dim=1)
        else:
            qk, v = qkv.split_with_sizes([heads + kv_heads, kv_heads], dim=1)
        if position_embeddings is not None:
            cos, sin = self._tables.get(position_embeddings)
            qk = torch.addcmul(qk * cos, qk.roll(self._width // 2, -1), sin)
        q, k = qk.split_with_sizes([heads, kv_heads], dim=1)
        mixed: Tensor = attention.o_proj.forward(self._mix(q, k, v).view(x_TH.shape[0], -1))
        return mixed

    def _mix(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        bound: LayerAttention | None = self._attention.__dict__.get("swarm_attention")
        if bound is not None:
            return bound.attend_rows(q_THD, k_TKD, v_TKD)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q_THD, k_TKD, v_TKD))
        return attend(self._attention, q, k, v, None)[0][0]
