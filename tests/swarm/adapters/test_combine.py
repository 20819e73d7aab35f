"""Several adapters as one: the same numbers as each in turn, and what does not add up is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.adapters.combine import combine
from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import decode_shard
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.adapters.peft import Contents, LoadedAdapter, pack
from swarm.errors import InvalidRequest

INPUTS, OUTPUTS, HIDDEN = 6, 5, 6
SHAPE = BlockShape(
    hidden_size=HIDDEN,
    linears={name: LinearShape(num_inputs=INPUTS, num_outputs=OUTPUTS) for name in ("q", "v")},
    kv_shape=(1, 2, 2),
)
LAYOUT = ModelLayout(blocks_path="layers", blocks=(SHAPE, SHAPE))


def lora(rank: int, scale: float, seed: int, **more: Any) -> LinearDelta:
    """A random low-rank change."""
    dice = torch.Generator().manual_seed(seed)
    a_rI, b_Or = torch.randn(rank, INPUTS, generator=dice), torch.randn(OUTPUTS, rank, generator=dice)
    return LinearDelta(a_rI=a_rI, b_Or=b_Or, scale=scale, **more)


def adapter(*blocks: BlockDelta, num_virtual: int = 0, embeddings: Tensor | None = None) -> LoadedAdapter:
    """With these changes in block 0, 1, ..."""
    contents = Contents(deltas=dict(enumerate(blocks)), num_virtual=num_virtual, embeddings_PH=embeddings)
    return pack(contents, method="LORA", base="tiny", layout=LAYOUT)


def linears(of: LoadedAdapter, block: int) -> Any:
    """What it does to a block's linears."""
    info = next(info for info in of.manifest.shards if info.block == block)
    return decode_shard(bytearray(of.shards[block]), info, SHAPE, of.manifest.num_virtual).linears


def added(linear: LinearDelta, x_I: Tensor) -> Tensor:
    """What it adds to W x."""
    total = torch.zeros(OUTPUTS) if linear.bias_O is None else linear.bias_O.clone()
    if linear.a_rI is not None and linear.b_Or is not None:
        total += linear.scale * (linear.b_Or @ (linear.a_rI @ x_I))
    return total


def test_low_rank_changes_and_biases_add_up() -> None:
    """Different ranks and scales, a linear that only one of them changes, a block that only one of them changes."""
    first = adapter(BlockDelta(linears={"q": lora(2, 0.5, 1), "v": lora(3, 2.0, 2)}))
    second = adapter(
        BlockDelta(linears={"q": lora(4, 1.5, 3, bias_O=torch.ones(OUTPUTS))}),
        BlockDelta(linears={"q": lora(1, 1.0, 4)}),
    )
    both, x_I = combine([first, second], LAYOUT), torch.randn(INPUTS)
    for name, parts in (("q", [linears(first, 0), linears(second, 0)]), ("v", [linears(first, 0)])):
        expected = sum(added(part[name], x_I) for part in parts)
        torch.testing.assert_close(added(linears(both, 0)[name], x_I), expected)
    torch.testing.assert_close(added(linears(both, 1)["q"], x_I), added(linears(second, 1)["q"], x_I))
    assert both.manifest.method == "LORA + LORA" and both.digest not in (first.digest, second.digest)


def test_scales_multiply() -> None:
    """Those of inputs and of outputs, as IA3 adapters that are active together do."""
    scales = [torch.rand(OUTPUTS) for _ in "ab"]
    parts = [adapter(BlockDelta(linears={"q": LinearDelta(output_scale_O=scale)})) for scale in scales]
    both = linears(combine(parts, LAYOUT), 0)["q"]
    torch.testing.assert_close(both.output_scale_O, scales[0] * scales[1])


def test_one_of_them_may_have_virtual_positions() -> None:
    """They stay what they are, and so do its embeddings."""
    embeddings = torch.randn(3, HIDDEN)
    prompt = adapter(BlockDelta(prompt_PH=torch.ones(3, HIDDEN)), num_virtual=3, embeddings=embeddings)
    both = combine([adapter(BlockDelta(linears={"q": lora(2, 1.0, 1)})), prompt], LAYOUT)
    assert both.manifest.num_virtual == 3 and both.embeddings_PH is embeddings
    info = both.manifest.shards[0]
    delta = decode_shard(bytearray(both.shards[0]), info, SHAPE, 3)
    assert delta.prompt_PH is not None and "q" in delta.linears
    with pytest.raises(InvalidRequest, match="2 of the adapters have virtual positions"):
        combine([prompt, prompt], LAYOUT)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (lora(2, 1.0, 1, magnitude_O=torch.ones(OUTPUTS)), lora(2, 1.0, 2), "magnitude"),
        (LinearDelta(input_scale_I=torch.ones(INPUTS)), lora(2, 1.0, 2), "scales what the other adds"),
        (LinearDelta(base_bias_O=torch.ones(OUTPUTS)), LinearDelta(base_bias_O=torch.ones(OUTPUTS)), "own bias"),
    ],
    ids=["dora", "scale and sum", "two biases of the base"],
)
def test_what_does_not_add_up_is_refused(first: LinearDelta, second: LinearDelta, reason: str) -> None:
    """In either order, with the linear's name."""
    parts = [adapter(BlockDelta(linears={"q": linear})) for linear in (first, second)]
    for pair in (parts, parts[::-1]):
        with pytest.raises(InvalidRequest, match=f"block 0, q: .*{reason}"):
            combine(pair, LAYOUT)
