"""A model's list of layers, as two parties see it: its own forward, and PEFT.

    for layer in model.layers       ─► one RemoteBlocks, which runs them all       what transformers' forwards do
    model.named_modules()           ─► layers.3.self_attn.q_proj, ...              what PEFT looks for its targets in

The linears that are found by name are placeholders: they have the shapes of those on the servers, no memory, and never
run. PEFT puts its own modules around them, whose parameters are real and belong to the client (`trained`).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swarm.client.remote_blocks import RemoteBlocks
from swarm.errors import UnsupportedModel


class RemoteLinear(nn.Linear):
    """Stands for a linear of a block that runs on a server.

    Args:
        original: on the meta device.
        device: where what is trained beside it is to be.
    """

    def __init__(self, original: Any, device: torch.device | str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        _stand_in(self, original, device)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Refused.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel("a linear of a remote block was called locally")


class RemoteConv1D(Conv1D):  # type: ignore[misc,unused-ignore]
    """The same for GPT-2's kind of linear, whose weight is [in, out]."""

    def __init__(self, original: Any, device: torch.device | str):
        nn.Module.__init__(self)
        self.nf, self.nx = original.nf, original.nx
        _stand_in(self, original, device)

    forward = RemoteLinear.forward


class RemoteLayers(nn.Module):
    """See the module docstring.

    Args:
        remote: runs all layers.
        originals: the layers on the meta device.
        device: of the model's local part.
    """

    def __init__(self, remote: RemoteBlocks, originals: Iterable[nn.Module], device: torch.device | str):
        super().__init__()
        self.remote = remote
        for index, original in enumerate(originals):
            self.add_module(str(index), _placeholders(original, device))

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return iter((self.remote,))

    def __getitem__(self, key: int | slice) -> "RemoteBlocks | list[RemoteBlocks]":
        return [self.remote][key]

    @property
    def placeholders(self) -> list[nn.Module]:
        """One module per layer, with its linears, and what PEFT has put around them."""
        return [module for name, module in self.named_children() if name != "remote"]


def _placeholders(original: nn.Module, device: torch.device | str) -> nn.Module:
    """The linears of a layer under their own names, in their own order."""
    root = nn.Module()
    for path, module in original.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            *parents, name = path.split(".")
            at = root
            for parent in parents:
                if parent not in at._modules:
                    at.add_module(parent, nn.Module())
                at = getattr(at, parent)
            is_linear = isinstance(module, nn.Linear)
            at.add_module(name, (RemoteLinear if is_linear else RemoteConv1D)(module, device))
    return root.eval()


def _stand_in(module: nn.Module, original: nn.Module, device: torch.device | str) -> None:
    """Give a module plain attributes with the shapes of the original's parameters, all of one number in memory."""
    for name in ("weight", "bias"):
        tensor = getattr(original, name, None)
        zero = None if tensor is None else torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
        object.__setattr__(module, name, zero)
