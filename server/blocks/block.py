"""One decoder layer, made ready to run: checked, fused, in its final format, with our attention and its sites.

    layer (transformers) --quirks, probe, fuse, quantise--> Block --run(hidden states, arguments)--> hidden states

It knows one layer; which rows are run, and in which order blocks follow each other, is the span's business.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from swarm.server.blocks.attention import LayerAttention
from swarm.server.blocks.fusion import fuse
from swarm.server.blocks.internals import CallPlan, LayerCall
from swarm.server.blocks.plain_decoder import PlainDecoder, RotaryTables
from swarm.server.blocks.probe import BlockSpec, Prober
from swarm.server.blocks.quirks import Quirks
from swarm.server.blocks.sites import Current, Site, adaptable_linears, find_sites
from swarm.server.blocks.step import Step
from swarm.server.quantization import quantize

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One decoder layer, ready to run."""

    index: int
    layer: nn.Module
    call: LayerCall
    spec: BlockSpec
    attention: LayerAttention | None
    sites: Sequence[Site]
    """Where adapters change it."""

    def run(self, hidden_1TH: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = self.layer.forward(hidden_1TH, **arguments)
        hidden: Tensor = output[0] if self.spec.returns_tuple else output
        return hidden


def prepare(
    index: int,
    layer: nn.Module,
    plan: CallPlan,
    prober: Prober,
    step: Step,
    current: Current,
    quirks: Quirks,
    tables: RotaryTables,
    quantization: str,
) -> Block:
    """Patch, check, fuse and quantise one freshly loaded layer, and give its attention our cache."""
    call = plan.layers[index]
    if quirks.patch is not None:
        temperature = quirks.temperature(layer)
        quirks.patch(layer)
    else:
        temperature = None
    spec = prober.check(index, layer, call)
    run_once = partial(prober.run, index, layer, call, slice(None))
    linears = adaptable_linears(layer, partial(prober.run, index, layer, call))
    fuse(layer, run_once)
    plain = PlainDecoder.of(layer, run_once, tables)
    share = quantize(layer, quantization, run_once)
    if quantization != "none" and share < 0.9:
        logger.warning("block %d: only %.0f %% of its weights could be quantised to %s (experts and other parameters "
                       "that are no linear layers stay as they are)", index, 100 * share, quantization)  # fmt: skip
    if plain is not None:
        plain.install()
    attention = None
    if spec.attention is not None:
        attention = LayerAttention(spec.attention.form, spec.attention.kv_shape, temperature, step)
        spec.attention.module.__dict__["swarm_attention"] = attention
    sites = find_sites(layer, linears, current, prober.device)
    return Block(index=index, layer=layer, call=call, spec=spec, attention=attention, sites=sites)
