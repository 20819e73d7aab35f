"""Remote blocks as a function that torch differentiates: hidden states and parameters in, hidden states out.

    rows, lengths, {block: BlockDelta} ─► _RemoteBlocks.forward ─► BlockTraining.forth ~~► servers
    their gradients ◄─ _RemoteBlocks.backward ◄─ BlockTraining.back ◄~~ servers

What is trained in the blocks is whatever the deltas' tensors come from. A new version of it is made when its numbers
have changed, and forgotten when no graph needs it any more. Knows nothing of networks and padding.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from swarm.adapters.delta import BlockDelta
from swarm.adapters.format import Manifest, encode_shard, shard_info
from swarm.client.parameters import Parameters


class BlockTraining(Protocol):
    """One client's training through some remote blocks, for synchronous callers."""

    def forth(
        self, hidden_states: Tensor, lengths: Sequence[int], *, parameters: Parameters | None, wants_gradients: bool
    ) -> tuple[Any, Tensor]:
        """Run whole sequences; see `swarm.client.training.RemoteTraining.forth`."""
        ...

    def back(
        self, call: Any, gradients: Tensor, *, wants_inputs: bool = True
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Gradients of a call's inputs, if wanted, and of its parameters, all numbers of each block."""
        ...

    def drop(self, call: Any) -> None:
        """Nobody will go back through this call; may be called on any thread."""
        ...

    def forget(self, version: int) -> None:
        """No call uses this version of the parameters any more; may be called on any thread."""
        ...

    @property
    def route(self) -> Sequence[Any]:
        """The hops in use, in order, each with .peer_id and .blocks."""
        ...


class TrainedBlocks:
    """Remote blocks that may be differentiated.

    Args:
        training: the remote side.
        num_blocks, hidden_size: of the whole model.
    """

    def __init__(self, training: BlockTraining, *, num_blocks: int, hidden_size: int):
        self.training = training
        self._num_blocks, self._hidden_size = num_blocks, hidden_size
        self._latest: Parameters | None = None
        self._numbers: list[Tensor] = []
        self._users: Counter[int] = Counter()
        self._lock = threading.RLock()
        """A garbage collection while we hold it may end graphs, which call `unuse`."""

    def __call__(
        self, rows: Tensor, lengths: Sequence[int], deltas: Mapping[int, BlockDelta] | None = None, num_virtual: int = 0
    ) -> Tensor:
        """Run whole sequences.

        Args:
            rows: [sum(lengths), hidden], one sequence after another.
            lengths: of the sequences.
            deltas: what changes in which block; differentiable in all tensors.
            num_virtual: positions at the beginning of each sequence that the deltas' prompts and prefixes stand at.

        Returns:
            [sum(lengths), hidden].
        """
        deltas = dict(sorted((deltas or {}).items()))
        tensors = [tensor for delta in deltas.values() for tensor in delta.tensors()]
        parameters = self._version(deltas, tensors, num_virtual) if tensors else None
        if not torch.is_grad_enabled() or not any(it.requires_grad for it in (rows, *tensors)):
            _, plain = self.training.forth(
                rows.detach().to("cpu"), lengths, parameters=parameters, wants_gradients=False
            )
            return plain.to(rows)
        given = (rows, self, tuple(lengths), parameters)
        outputs: Tensor = _RemoteBlocks.apply(*given, *tensors)  # type: ignore[no-untyped-call]
        return outputs

    def _version(self, deltas: Mapping[int, BlockDelta], tensors: Sequence[Tensor], num_virtual: int) -> Parameters:
        """The parameters as they are now: the latest version, or a new one if any number has changed."""
        latest = self._latest
        if (
            latest is not None
            and latest.manifest.num_virtual == num_virtual
            and list(latest.num_elements) == list(deltas)
            and len(tensors) == len(self._numbers)
            and all(torch.equal(old, new) for old, new in zip(self._numbers, tensors, strict=True))
        ):
            return latest
        shards = {block: encode_shard(delta) for block, delta in deltas.items()}
        manifest = Manifest(
            method="training",
            base="",
            num_blocks=self._num_blocks,
            hidden_size=self._hidden_size,
            num_virtual=num_virtual,
            shards=tuple(shard_info(block, delta, shards[block]) for block, delta in deltas.items()),
        )
        with self._lock:
            new = Parameters(
                version=0 if latest is None else latest.version + 1,
                manifest=manifest,
                shards=shards,
                num_elements={block: sum(it.numel() for it in delta.tensors()) for block, delta in deltas.items()},
            )
            self._latest, self._numbers = new, [tensor.detach().clone() for tensor in tensors]
            is_stale = latest is not None and not self._users[latest.version]
        if latest is not None and is_stale:
            self.training.forget(latest.version)
        return new

    def use(self, parameters: Parameters | None) -> None:
        """A graph has come to need this version."""
        if parameters is not None:
            with self._lock:
                self._users[parameters.version] += 1

    def unuse(self, call: Any, parameters: Parameters | None) -> None:
        """A graph is gone: nobody will go back through its call."""
        self.training.drop(call)
        if parameters is None:
            return
        version = parameters.version
        with self._lock:
            self._users[version] -= 1
            is_stale = not self._users[version] and parameters is not self._latest
        if is_stale:
            self.training.forget(version)


class _Graph:
    """What a node of the graph holds on to; its end is the graph's end."""

    def __init__(self, blocks: TrainedBlocks, call: Any, parameters: Parameters | None):
        self.call = call
        blocks.use(parameters)
        weakref.finalize(self, blocks.unuse, call, parameters).atexit = False


class _RemoteBlocks(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, blocks: TrainedBlocks, lengths: tuple[int, ...], parameters: Parameters | None,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        call, outputs = blocks.training.forth(
            rows.detach().to("cpu"), lengths, parameters=parameters, wants_gradients=True
        )
        ctx.blocks, ctx.graph = blocks, _Graph(blocks, call, parameters)
        ctx.shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return outputs.to(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_rows, sums = ctx.blocks.training.back(
            ctx.graph.call, gradient.to("cpu"), wants_inputs=ctx.needs_input_grad[0]
        )
        numbers = torch.cat([sums[block] for block in sorted(sums)]) if sums else torch.empty(0)
        parts = numbers.split([shape.numel() for shape, _, _ in ctx.shapes])
        of_tensors = [
            part.view(shape).to(device, dtype) for part, (shape, dtype, device) in zip(parts, ctx.shapes, strict=True)
        ]
        return None if of_rows is None else of_rows.to(gradient), None, None, None, *of_tensors
