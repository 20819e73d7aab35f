"""What is trained in a model's remote blocks, read off the modules that PEFT has put beside their linears.

    layers.3.self_attn.q_proj: lora.Linear(lora_A, lora_B, scaling) ─► BlockDelta ─► run_trained    (differentiable)
                               ia3.Linear(ia3_l)                                ─► snapshot         (for sessions)

The tensors are the parameters themselves. What servers can't do is refused: dropout while training, merged weights,
variants such as DoRA. Knows nothing of networks; imports PEFT only where it has been at work.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import Manifest
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft import Contents, LoadedAdapter, pack
from swarm.client.remote_layers import RemoteConv1D, RemoteLinear
from swarm.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """What is trained, as it is now."""

    deltas: Mapping[int, BlockDelta]
    """By block."""
    num_virtual: int = 0
    embeddings_PH: Tensor | None = None
    """Of the virtual positions; None where servers replace them."""
    method: str = "LORA"
    base: str = ""

    def rows(self, num_blocks: int, hidden_size: int) -> LoadedAdapter:
        """Its virtual positions alone, as `swarm.client.virtual` wants them."""
        manifest = Manifest(
            method=self.method,
            base=self.base,
            num_blocks=num_blocks,
            hidden_size=hidden_size,
            num_virtual=self.num_virtual,
            shards=(),
        )
        return LoadedAdapter(manifest=manifest, shards={}, embeddings_PH=self.embeddings_PH)

    def snapshot(self, layout: ModelLayout) -> LoadedAdapter:
        """As an adapter that sessions can use; later steps don't change it."""
        with torch.no_grad():
            embeddings = None if self.embeddings_PH is None else self.embeddings_PH.detach().clone()
            contents = Contents(deltas=self.deltas, num_virtual=self.num_virtual, embeddings_PH=embeddings)
            return pack(contents, method=self.method, base=self.base, layout=layout)


_prompted: ContextVar[Trained | None] = ContextVar("swarm_client_prompted", default=None)


@contextmanager
def prompted(trained: Trained) -> Iterator[None]:
    """Let the model that this thread calls use these virtual positions."""
    token = _prompted.set(trained)
    try:
        yield
    finally:
        _prompted.reset(token)


def trained_now(layers: Sequence[nn.Module], config: Mapping[str, Any] | None = None) -> Trained | None:
    """What is active in the layers and trained by PEFT; None where nothing is.

    Args:
        layers: `RemoteLayers.placeholders`.
        config: PEFT's configs by adapter, for their names in the swarm.

    Raises:
        InvalidRequest: something that servers can't do; names it.
    """
    if (found := _prompted.get()) is not None:
        return found
    deltas = {index: delta for index, layer in enumerate(layers) if (delta := _block(index, layer)) is not None}
    if not deltas:
        return None
    for name, own in (config or {}).items():
        if getattr(own, "bias", "none") != "none":
            raise InvalidRequest(f"adapter {name}: bias = {own.bias} can't be had in remote blocks, whose biases stay")
    first = next(iter((config or {}).values()), None)
    method = str(getattr(getattr(first, "peft_type", None), "value", "LORA"))
    return Trained(deltas=deltas, method=method, base=str(getattr(first, "base_model_name_or_path", None) or "")[:1024])


def adapted(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules in a layer that PEFT has put there, by the path of what they stand for."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        is_ours = type(module) in (nn.Module, RemoteLinear, RemoteConv1D)
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if not is_ours and not is_inside:
            found[path] = module
    return found


def _block(index: int, layer: nn.Module) -> BlockDelta | None:
    linears = {}
    for path, module in adapted(layer).items():
        delta = _linear(f"block {index}, {path}", module)
        if delta is not None:
            linears[path] = delta
    return BlockDelta(linears=linears) if linears else None


def _linear(where: str, module: Any) -> LinearDelta | None:
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer

    is_ia3 = isinstance(module, IA3Layer)
    if not is_ia3 and not isinstance(module, LoraLayer):
        raise InvalidRequest(f"{where}: {type(module).__name__} can't be trained in remote blocks, LoRA and IA3 can")
    if module.merged:
        raise InvalidRequest(f"{where}: the adapter is merged; the weights of remote blocks never change")
    if module._forward_pre_hooks:
        raise InvalidRequest(f"{where}: adapter_names per row can't be used here; use generate(adapter_name=[...])")
    if module.disable_adapters:
        return None
    if is_ia3:
        return _ia3(module)
    active = [name for name in module.active_adapters if name in module.lora_A]
    return _together([_lora(where, module, name) for name in active]) if active else None


def _lora(where: str, module: Any, name: str) -> LinearDelta:
    if module.use_dora.get(name) or name in module.lora_variant:
        raise InvalidRequest(f"{where}: {type(module.lora_variant.get(name)).__name__} can't be trained remotely")
    dropout = getattr(module.lora_dropout[name], "p", 0.0)
    if module.training and dropout:
        raise InvalidRequest(f"{where}: lora_dropout = {dropout} can't be reproduced in remote blocks, set it to 0")
    bias = module.lora_B[name].bias
    scale = float(module.scaling[name])
    return LinearDelta(
        a_rI=module.lora_A[name].weight,
        b_Or=module.lora_B[name].weight,
        scale=scale,
        bias_O=None if bias is None else scale * bias,
    )


def _together(deltas: Sequence[LinearDelta]) -> LinearDelta:
    """Adapters that are active at once, as PEFT sums them up."""
    if len(deltas) == 1:
        return deltas[0]
    matrices = [(it.a_rI, it.scale * it.b_Or) for it in deltas if it.a_rI is not None and it.b_Or is not None]
    biases = [it.bias_O for it in deltas if it.bias_O is not None]
    both = LinearDelta(a_rI=torch.cat([a for a, _ in matrices]), b_Or=torch.cat([b for _, b in matrices], 1))
    return replace(both, bias_O=torch.stack(biases).sum(0)) if biases else both


def _ia3(module: Any) -> LinearDelta | None:
    active = [module.ia3_l[name] for name in module.active_adapters if name in module.ia3_l]
    if not active:
        return None
    scale = torch.stack([it.flatten() for it in active]).prod(0) if len(active) > 1 else active[0].flatten()
    return LinearDelta(input_scale_I=scale) if module.is_feedforward else LinearDelta(output_scale_O=scale)
