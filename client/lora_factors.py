"""The LoRA matrices of a PEFT model over remote blocks, by block and path, to be read and written as a whole.

    LoraFactors(model).read("default") ─► {block: BlockDelta} ─► write("default", ...), in place
                       add("default_shared", rank) ─ activate ─► several adapters at once, some of them frozen

PEFT does all that is done with modules; nothing here knows what the numbers are for.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.layout import ModelLayout
from swarm.client.generation import DistributedModel
from swarm.client.peft_model import DistributedPeftModel
from swarm.client.trained import adapted
from swarm.errors import InvalidRequest


class LoraFactors:
    """See the module docstring.

    Args:
        model: with one LoRA adapter that is trained, of one rank and one alpha, without biases.

    Raises:
        InvalidRequest: something else is trained; names it.
    """

    def __init__(self, model: DistributedPeftModel):
        self.model = model
        self.name: str = model.active_adapter
        config = model.peft_config[self.name]
        if not isinstance(config, LoraConfig):
            raise InvalidRequest(f"peft_type = {config.peft_type} can't be trained by several clients, LORA can")
        for field in ("rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save"):
            if getattr(config, field, None):
                raise InvalidRequest(f"{field} = {str(getattr(config, field))[:80]} can't be had in a federated run")
        self._config = config
        self._layers: dict[tuple[int, str], Any] = {
            (block, path): module
            for block, layer in enumerate(self._base.remote_layers.placeholders)
            for path, module in adapted(layer).items()
            if isinstance(module, LoraLayer) and self.name in module.lora_A
        }
        self._check_trained()

    @property
    def layout(self) -> ModelLayout:
        """Of the base model."""
        return self._base.layout

    @property
    def base_name(self) -> str:
        """Of the base model, as whoever loads the adapter needs it."""
        return str(self._config.base_model_name_or_path or "")

    @property
    def rank(self) -> int:
        """Of the adapter that was there in the beginning."""
        return int(self._config.r)

    @property
    def scale(self) -> float:
        """Of the adapter that was there in the beginning."""
        return float(next(iter(self._layers.values())).scaling[self.name])

    @property
    def linears(self) -> Mapping[int, Sequence[str]]:
        """Paths of the linears that are changed, by block."""
        found: dict[int, list[str]] = {}
        for block, path in self._layers:
            found.setdefault(block, []).append(path)
        return {block: sorted(paths) for block, paths in found.items()}

    def shape(self, block: int, path: str) -> tuple[int, int]:
        """(inputs, outputs) of a linear."""
        linear = self.layout.blocks[block].linears[path]
        return linear.num_inputs, linear.num_outputs

    def read(self, name: str) -> dict[int, BlockDelta]:
        """An adapter's numbers as they are now; later steps don't change them."""
        found: dict[int, dict[str, LinearDelta]] = {}
        for (block, path), module in self._layers.items():
            found.setdefault(block, {})[path] = LinearDelta(
                a_rI=_copy(module.lora_A[name].weight),
                b_Or=_copy(module.lora_B[name].weight),
                scale=float(module.scaling[name]),
            )
        return {block: BlockDelta(linears=linears) for block, linears in sorted(found.items())}

    @torch.no_grad()
    def write(self, name: str, update: Mapping[int, BlockDelta]) -> None:
        """Put numbers into an adapter's parameters, which stay the same objects; scales are those that it has."""
        for (block, path), module in self._layers.items():
            linear = update[block].linears[path]
            module.lora_A[name].weight.copy_(cast(Tensor, linear.a_rI))
            module.lora_B[name].weight.copy_(cast(Tensor, linear.b_Or))

    def add(self, name: str, rank: int) -> None:
        """Another adapter for the same linears, of scale 1; one of this name is replaced."""
        self.remove(name)
        config = copy.deepcopy(self._config)
        config.r, config.lora_alpha, config.use_rslora, config.init_lora_weights = rank, rank, False, True
        self.model.add_adapter(name, config)

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        if name in self.model.peft_config:
            self.model.delete_adapter(name)

    def activate(self, trained: str, frozen: Sequence[str] = (), *, with_a: bool = True) -> None:
        """Use an adapter and train it; use others beside it as they are.

        Args:
            trained: its name.
            frozen: others' names.
            with_a: whether A is trained, too, or B alone.
        """
        self.model.set_adapter(trained)
        if frozen:
            cast(Any, self.model.base_model).set_adapter([trained, *frozen])
        for module in self._layers.values():
            for matrices, is_trained in ((module.lora_A, with_a), (module.lora_B, True)):
                for name, matrix in matrices.items():
                    matrix.weight.requires_grad_(name == trained and is_trained)

    @property
    def _base(self) -> DistributedModel:
        return cast(DistributedModel, self.model.get_base_model())

    def _check_trained(self) -> None:
        ours = {
            id(matrix[self.name].weight)
            for module in self._layers.values()
            for matrix in (module.lora_A, module.lora_B)
        }
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                raise InvalidRequest(f"{name} is trained, which is no matrix of a remote block's LoRA")
            if id(parameter) in ours and parameter.dtype is not torch.float32:
                raise InvalidRequest(f"{name} is {parameter.dtype}, a federated run needs torch.float32")
        if not ours:
            raise InvalidRequest(f"adapter {self.name} changes no linear of a remote block")


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
