"""Gradients of plain transformers and of two chained spans, for the same hidden states and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarm.adapters.delta import BlockDelta
from swarm.server.blocks import BlockSpan
from swarm.server.blocks.training_pass import Part, TrainingPass
from swarm.server.host_pages import HostBudget
from tests.families.configs import Family
from tests.families.harness import SavedCheckpoint, load_spans, split_model

LENGTHS = (19, 7, 12)
NUM_PROMPTS = 3


class Gradients(NamedTuple):
    """Outputs of the last block, and gradients of what went in."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    prompts_LPH: Tensor


def run_pass(training_pass: TrainingPass, upstream: Tensor, *, keep: bool = True) -> None:
    """Forth and back without pauses; the gradient of each output is that of the loss (output * upstream).sum()."""
    for _ in training_pass.forward(keep=keep):
        pass
    for _ in training_pass.backward([upstream]):
        pass


def local_gradients(
    model: PreTrainedModel, inputs: Sequence[Tensor], prompts_LPH: Tensor, upstream: Sequence[Tensor]
) -> Gradients:
    """By torch's autograd through the whole model, one sequence after another."""
    blocks, _ = split_model(model)
    leaves = [hidden.clone().requires_grad_() for hidden in inputs]
    prompts = prompts_LPH.clone().requires_grad_()
    outputs = [_through_blocks(model, blocks, leaf, prompts) for leaf in leaves]
    loss = sum((output * ahead).sum() for output, ahead in zip(outputs, upstream, strict=True))
    assert isinstance(loss, Tensor)
    *of_inputs, of_prompts = torch.autograd.grad(loss, [*leaves, prompts])
    return Gradients([output.detach() for output in outputs], list(of_inputs), of_prompts)


def _through_blocks(model: PreTrainedModel, blocks: nn.ModuleList, hidden: Tensor, prompts_LPH: Tensor) -> Tensor:
    """[n, H] of the last block, while the model runs on made-up tokens."""
    seen: list[Tensor] = []

    def enter(index: int):
        def replace(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = args[0] if args else kwargs["hidden_states"]
            rows = hidden[None] if index == 0 else given
            count = prompts_LPH.shape[1]
            rows = torch.cat([rows[:, :count] + prompts_LPH[index], rows[:, count:]], 1)
            return ((rows, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": rows})

        return replace

    hooks = [block.register_forward_pre_hook(enter(index), with_kwargs=True) for index, block in enumerate(blocks)]
    hooks.append(
        blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    try:
        model(input_ids=torch.zeros(1, len(hidden), dtype=torch.int64), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output[0]


def remote_gradients(
    spans: Sequence[BlockSpan], inputs: Sequence[Tensor], prompts_LPH: Tensor, upstream: Sequence[Tensor], room: int
) -> Gradients:
    """By a pass through each span, as two servers would do it.

    Args:
        room: bytes for what is kept of a pass; 0 keeps the inputs of the first block alone.
    """
    lengths = tuple(len(hidden) for hidden in inputs)
    hidden, passes = torch.cat(list(inputs)), []
    for span in spans:
        deltas = {block: BlockDelta(prompt_PH=prompts_LPH[block]) for block in span.blocks}
        part = Part(hidden_states=hidden, lengths=lengths, deltas=deltas, num_virtual=prompts_LPH.shape[1])
        budget = HostBudget(max(room, hidden.nbytes))
        passes.append(span.training_pass(span.blocks, [part], budget))
        for _ in passes[-1].forward(keep=True):
            pass
        hidden = passes[-1].outputs[0]
    gradient = torch.cat(list(upstream))
    of_prompts = torch.zeros_like(prompts_LPH)
    for training_pass in reversed(passes):
        for _ in training_pass.backward([gradient]):
            pass
        found = training_pass.gradients[0]
        gradient = found.hidden_states
        for block, (of_prompt,) in found.deltas.items():
            of_prompts[block] = of_prompt
        assert training_pass.num_bytes == 0
    return Gradients(list(hidden.split(list(lengths))), list(gradient.split(list(lengths))), of_prompts)


def compare_gradients(family: Family, directory: Path) -> float:
    """Largest error of two spans' outputs and gradients against plain transformers, relative to the largest number."""
    model = family.model().requires_grad_(False)
    model.save_pretrained(directory)
    blocks, _ = split_model(model)
    spans = load_spans(SavedCheckpoint(directory), len(blocks))
    generator = torch.Generator().manual_seed(5)
    width = spans[0].hidden_size
    inputs = [torch.randn(length, width, generator=generator) for length in LENGTHS]
    upstream = [torch.randn(length, width, generator=generator) for length in LENGTHS]
    prompts = torch.randn(len(blocks), NUM_PROMPTS, width, generator=generator) / 4
    expected = local_gradients(model, inputs, prompts, upstream)
    worst = 0.0
    for room in (1 << 30, 0):
        found = remote_gradients(spans, inputs, prompts, upstream, room)
        pairs = [
            (torch.cat(found.outputs), torch.cat(expected.outputs)),
            (torch.cat(found.inputs), torch.cat(expected.inputs)),
            (found.prompts_LPH, expected.prompts_LPH),
        ]
        for ours, right in pairs:
            assert torch.isfinite(ours).all() and right.abs().max() > 0
            worst = max(worst, float((ours - right).abs().max() / right.abs().max()))
    return worst
