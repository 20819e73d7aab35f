"""Gradients of adapters in the blocks' linears are those of local autograd, for many families and every method."""

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.errors import InvalidRequest
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.blocks.training_pass import Part
from swarm.server.host_pages import HostBudget
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.gradients import NUM_PROMPTS, _through_blocks
from tests.families.harness import SavedCheckpoint, split_model

LENGTHS = (11, 6)
PLENTY = 1 << 30
TRAINED = ("llama", "qwen3", "gemma2", "gpt2", "gptj", "gpt_neox", "bloom", "mpt", "falcon-7b", "falcon-40b", "opt",
           "phi", "mixtral", "gpt_oss", "deepseek_v3", "cohere2", "mamba2", "qwen3_next")  # fmt: skip
METHODS = ("lora", "ia3 inputs", "ia3 outputs", "bias", "base bias", "dora")


def make_linear(method, shape, generator):
    """What one linear is trained with."""

    def random(*size):
        return torch.randn(*size, generator=generator) / 8

    inputs, outputs = shape.num_inputs, shape.num_outputs
    if method == "ia3 inputs":
        return LinearDelta(input_scale_I=1 + random(inputs))
    if method == "ia3 outputs":
        return LinearDelta(output_scale_O=1 + random(outputs))
    if method == "bias":
        return LinearDelta(bias_O=torch.zeros(outputs))  # as training begins
    if method == "base bias":
        return LinearDelta(base_bias_O=random(outputs))
    magnitude = 1 + random(outputs) if method == "dora" else None
    return LinearDelta(a_rI=random(3, inputs), b_Or=random(outputs, 3), scale=0.7, magnitude_O=magnitude)


def weight_and_bias(module):
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
    return weight, 0 if module.bias is None else module.bias


def by_definition(module, linear, x):
    """y = o * (W (i * x) + c + s * B (A x)) + b, with DoRA's norm as a constant, as PEFT has it."""
    weight, bias = weight_and_bias(module)
    y = (x if linear.input_scale_I is None else x * linear.input_scale_I) @ weight.t()
    if linear.a_rI is not None:
        y = y + linear.scale * (x @ linear.a_rI.t()) @ linear.b_Or.t()
    if linear.magnitude_O is not None:
        whole = (weight + linear.scale * linear.b_Or @ linear.a_rI).detach()
        y = y * (linear.magnitude_O / whole.norm(dim=1))
    y = y + (bias if linear.base_bias_O is None else linear.base_bias_O)
    if linear.output_scale_O is not None:
        y = y * linear.output_scale_O
    return y if linear.bias_O is None else y + linear.bias_O


def local_gradients(model, deltas, inputs, upstream):
    """Of the inputs and of all tensors of the deltas."""
    blocks, _ = split_model(model)
    tensors = [tensor.requires_grad_() for delta in deltas.values() for tensor in delta.tensors()]
    leaves = [hidden.clone().requires_grad_() for hidden in inputs]

    def change(linear):
        return lambda module, args, _: by_definition(module, linear, args[0])

    hooks = [
        blocks[block].get_submodule(path).register_forward_hook(change(linear))
        for block, delta in deltas.items()
        for path, linear in delta.linears.items()
    ]
    nothing = torch.zeros(len(blocks), NUM_PROMPTS, inputs[0].shape[1])
    outputs = [_through_blocks(model, blocks, leaf, nothing) for leaf in leaves]
    loss = sum((output * ahead).sum() for output, ahead in zip(outputs, upstream, strict=True))
    found = torch.autograd.grad(loss, [*leaves, *tensors], materialize_grads=True)
    for hook in hooks:
        hook.remove()
    for tensor in tensors:
        tensor.requires_grad_(False)
    return torch.cat(found[: len(leaves)]), found[len(leaves) :]


def make(name, directory, method, **options):
    """A model, its blocks, and what is trained in them."""
    model = FAMILIES[name].model().requires_grad_(False)
    model.save_pretrained(directory)
    count = len(split_model(model)[0])
    span = BlockSpan.load(SavedCheckpoint(directory), BlockRange(0, count), num_pages=8, **options)
    generator = torch.Generator().manual_seed(2)
    deltas = {
        block: BlockDelta(
            linears={
                path: make_linear(method, shape, generator) for path, shape in sorted(span.shape(block).linears.items())
            }
        )
        for block in span.blocks
    }
    return model, span, deltas


def rows(span, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, span.hidden_size, generator=generator) for length in LENGTHS]


def run(span, parts, upstream, room=PLENTY):
    whole = span.training_pass(span.blocks, parts, HostBudget(room))
    for _ in whole.forward(keep=True):
        pass
    for _ in whole.backward(upstream):
        pass
    return whole


def part_of(span, deltas, seed=1):
    return Part(hidden_states=torch.cat(rows(span, seed)), lengths=LENGTHS, deltas=deltas)


def assert_near(found, expected):
    scale = max(float(right.abs().max()) for right in expected)
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).abs().max() <= 1e-4 * max(float(right.abs().max()), 1e-3 * scale)


def check(model, span, deltas):
    upstream = rows(span, 9)
    of_inputs, of_tensors = local_gradients(model, deltas, rows(span, 1), upstream)
    assert any(bool(tensor.any()) for tensor in of_tensors)
    found = run(span, [part_of(span, deltas)], [torch.cat(upstream)]).gradients[0]
    assert_near([found.hidden_states], [of_inputs])
    assert_near([tensor for block in sorted(deltas) for tensor in found.deltas[block]], of_tensors)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_lora_are_those_of_local_autograd(name, tmp_path):
    """On every linear that adapters may change, fused or not."""
    check(*make(name, tmp_path, "lora"))


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_method_has_the_gradients_of_its_definition(name, method, tmp_path):
    """Scales, biases and magnitudes; the base with and without biases, by nn.Linear and by Conv1D."""
    check(*make(name, tmp_path, method))


def test_tenants_with_adapters_of_their_own_share_a_pass(tmp_path):
    """One with, one without, one with another: each as if alone, before and after inference with an adapter."""
    _, span, deltas = make("llama", tmp_path, "lora")
    others = {
        block: BlockDelta(linears={path: make_linear("ia3 outputs", shape, torch.Generator().manual_seed(block))
                                   for path, shape in span.shape(block).linears.items()})
        for block in span.blocks
    }  # fmt: skip
    parts = [part_of(span, deltas), part_of(span, {}, 2), part_of(span, others, 3)]
    upstream = [torch.cat(rows(span, seed)) for seed in (7, 8, 9)]
    handle = span.attach(deltas)
    chunk = Chunk(hidden_states=rows(span, 4)[0], position=0, pages=[0], entry=0, exit=3, adapter=handle)
    served = span.run([chunk])[0]
    together = run(span, parts, upstream)
    assert torch.equal(span.run([chunk])[0], served)
    for index, part in enumerate(parts):
        alone = run(span, [part], [upstream[index]])
        torch.testing.assert_close(together.outputs[index], alone.outputs[0], rtol=1e-4, atol=1e-5)
        for block, tensors in alone.gradients[0].deltas.items():
            assert_near(together.gradients[index].deltas[block], tensors)


def test_what_is_trained_is_what_is_served(tmp_path):
    """The same adapter, attached and used by a session, gives the outputs of the training pass."""
    _, span, deltas = make("llama", tmp_path, "lora")
    part = part_of(span, deltas)
    outputs = run(span, [part], [torch.cat(rows(span, 9))]).outputs[0].split(LENGTHS)
    handle = span.attach(deltas)
    for hidden, output in zip(rows(span, 1), outputs, strict=True):
        chunk = Chunk(hidden_states=hidden, position=0, pages=[0], entry=0, exit=3, adapter=handle)
        torch.testing.assert_close(span.run([chunk])[0], output, rtol=1e-4, atol=1e-5)


def test_what_is_kept_changes_no_bit(tmp_path):
    """Adapters in a block that is run again give the same gradients."""
    _, span, deltas = make("llama", tmp_path, "lora")
    part, upstream = part_of(span, deltas), [torch.cat(rows(span, 9))]
    first, second = (run(span, [part], upstream, room) for room in (PLENTY, part.hidden_states.nbytes))
    for block, tensors in first.gradients[0].deltas.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, second.gradients[0].deltas[block], strict=True))


@pytest.mark.parametrize(("format", "error"), [("int8", 0.1), ("nf4", 0.6)])
def test_adapters_inside_quantised_blocks_have_gradients_near_the_originals(format, error, tmp_path):
    """What the peer can't do at all: LoRA inside 8-bit and 4-bit blocks."""
    _, exact, deltas = make("llama", tmp_path, "lora")
    _, rounded, _ = make("llama", tmp_path, "lora", quantization=format)
    upstream = [torch.cat(rows(exact, 9))]
    found, right = (run(it, [part_of(it, deltas)], upstream).gradients[0].deltas for it in (rounded, exact))
    ours, wanted = (torch.cat([it.flatten() for own in all.values() for it in own]) for all in (found, right))
    assert (ours - wanted).norm() < error * wanted.norm()


def test_linears_that_are_not_there_are_refused(tmp_path):
    """By name."""
    _, span, _ = make("llama", tmp_path, "lora")
    deltas = {1: BlockDelta(linears={"self_attn.nope": LinearDelta(bias_O=torch.zeros(3))})}
    with pytest.raises(InvalidRequest, match=r"block 1 has no linears self_attn\.nope"):
        span.training_pass(span.blocks, [part_of(span, deltas)], HostBudget(PLENTY))
