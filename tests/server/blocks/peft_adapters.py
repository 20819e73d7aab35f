"""Random PEFT adapters on tiny models, and what PEFT itself makes of them: the definition of right for our blocks."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families.configs import VOCABULARY, Family
from tests.families.harness import split_model

_NEUTRAL_ONE = ("ia3_l", "magnitude")
"""Parameters that factors are: random ones lie around 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One adapter, a prompt, and the hidden states that PEFT gives to the first block and takes from the last one."""

    directory: Path | None
    """None for the base model alone."""
    entering_TH: Tensor
    leaving_TH: Tensor
    num_embedded: int
    """Rows before those of the tokens: the embeddings of prompt tuning."""


def save_adapter(
    model: PreTrainedModel, config: Any, directory: Path, *, seed: int, edit: Callable[[nn.Module], None] | None = None
) -> Path:
    """Give the model a random adapter of this config, and save it as PEFT does."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT thinks of such configs
        adapted = peft.get_peft_model(model, config)
        trainable = [(name, it) for name, it in adapted.named_parameters() if it.requires_grad]
        with torch.no_grad():
            for name, parameter in trainable:
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(parameter + noise if any(it in name for it in _NEUTRAL_ONE) else noise)
            if edit is not None:
                edit(adapted)
        adapted.save_pretrained(directory)
    return directory


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors of a saved adapter."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return directory


@torch.no_grad()
def run_peft(
    family: Family,
    directory: Path | None,
    length: int,
    *,
    seed: int,
    edit: Callable[[PreTrainedModel], object] | None = None,
) -> Case:
    """A prompt through the family's model, perhaps edited, with an adapter of PEFT's."""
    model: Any = family.model()
    if edit is not None:
        edit(model)
    blocks, _ = split_model(model)
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
    seen: dict[str, Tensor] = {}

    def remember(name: str, value: object) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        assert isinstance(tensor, Tensor)
        seen[name] = tensor.detach()[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if directory is not None:
            model = peft.PeftModel.from_pretrained(model, directory).eval()
        hooks = [
            blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: remember("in", args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            ),
            blocks[-1].register_forward_hook(lambda _, args, output: remember("out", output)),
        ]
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return Case(directory=directory, entering_TH=seen["in"], leaving_TH=seen["out"],
                num_embedded=len(seen["in"]) - length)  # fmt: skip
