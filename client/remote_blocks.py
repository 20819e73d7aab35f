"""One module that stands where a transformers model has its list of decoder layers, and runs them all remotely.

    model.forward ──hidden_states [B, T, H]──► RemoteBlocks ──[tokens, H], row after row──► session.step ~~► servers
                  ◄──[B, T, H], zeros where nobody looks───┘◄────── the outputs wanted ───┘
                                   where gradients are recorded: ──► TrainedBlocks ~~► servers, forth and back

Only real tokens travel (no padding), and only the outputs whose logits are needed come back. What the layer list is
called with (masks, rotary tables, ...) depends on the model and is ignored; what matters is put into a `Pass` by the
model's own __call__. Knows nothing of tokens, logits or networks.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarm.adapters.delta import BlockDelta
from swarm.client.autograd import TrainedBlocks
from swarm.client.cache import BlockService, BlockSession, RemoteCache
from swarm.client.row_adapters import RowAdapters
from swarm.errors import InvalidRequest
from swarm.types import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One call of the whole model."""

    cache: RemoteCache | None = None
    """The session to continue; None opens one for this call only."""
    adapters: RowAdapters | None = None
    """Of the rows of such a session."""
    mask: torch.Tensor | None = None
    """[B, cache.num_columns + T], nonzero where there is a token; None where all are."""
    outputs: int = 0
    """Trailing positions whose outputs are wanted; 0 means all."""
    deltas: Mapping[int, BlockDelta] | None = None
    """What is trained in the blocks, for a call without a session; differentiable."""
    num_virtual: int = 0
    """Tokens at the beginning of every row that stand for what is trained."""
    positions: torch.Tensor | None = None
    """[B or 1, T] as the caller gave them: where they start anew within a row, another sequence begins."""


_current: ContextVar[Pass | None] = ContextVar("swarm_client_pass", default=None)


@contextmanager
def model_pass(values: Pass) -> Iterator[None]:
    """Let RemoteBlocks know how the model was called, in this thread."""
    token = _current.set(values)
    try:
        yield
    finally:
        _current.reset(token)


def is_driven() -> bool:
    """Whether RemoteBlocks know how the model was called, in this thread."""
    return _current.get() is not None


class RemoteBlocks(nn.Module):
    """All decoder layers of a model at once, on other machines.

    Args:
        service: where the blocks are.
        returns_tuple: whether the model takes [0] of what a layer returns.
    """

    def __init__(self, service: BlockService | None, *, returns_tuple: bool = False):
        super().__init__()
        self.service = service
        self.returns_tuple = returns_tuple
        self._trained: dict[BlockRange, TrainedBlocks] = {}

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """Run hidden_states [B, T, H] through all blocks; the result has the same shape.

        Raises:
            InvalidRequest: for a batch that does not fit the session, or when gradients are wanted of a session.
        """
        outputs = self._forward(hidden_states)
        return (outputs,) if self.returns_tuple else outputs

    def extra_repr(self) -> str:
        return "local dry run" if self.service is None else f"{self.service.num_blocks} blocks"

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.service is None:
            return hidden_states
        values = _current.get() or Pass()
        rows, columns, _ = hidden_states.shape
        wants_gradients = torch.is_grad_enabled() and hidden_states.requires_grad
        before = values.cache.num_columns if values.cache is not None else 0
        is_packed = has_packed_rows(values.positions, values.mask, rows, columns, before=before)
        if values.cache is not None:
            if wants_gradients:
                raise InvalidRequest("gradients don't go through a session; call without one, or under torch.no_grad()")
            if is_packed:
                raise InvalidRequest("position_ids that start anew within a row can't be used in a session")
            return run(values.cache, hidden_states, mask=values.mask, outputs=values.outputs)
        if wants_gradients or values.deltas is not None or is_packed:
            if values.adapters is not None:
                raise InvalidRequest("gradients don't go through served adapters; call without, or under no_grad()")
            return run_trained(
                self.trained(BlockRange(0, self.service.num_blocks)),
                hidden_states,
                mask=values.mask,
                deltas=values.deltas,
                num_virtual=values.num_virtual,
                positions=values.positions if is_packed else None,
            )
        session = open_session(self.service, rows, columns, values.adapters)
        with RemoteCache(session, max_length=columns, adapters=values.adapters) as cache:
            return run(cache, hidden_states, mask=values.mask, outputs=values.outputs)

    def trained(self, blocks: BlockRange) -> TrainedBlocks:
        """The training run through some of the blocks; one per range for as long as the model lives."""
        if self.service is None:
            raise InvalidRequest("there are no remote blocks in a dry run")
        known = self._trained.get(blocks)
        if known is None:
            training = self.service.open_training(blocks)
            known = self._trained[blocks] = TrainedBlocks(
                training, num_blocks=self.service.num_blocks, hidden_size=self.service.hidden_size
            )
        return known


class BlockSlice:
    """Some consecutive blocks of a model, to be called like a module: `model.blocks[4:12](hidden_states)`.

    Differentiable in the hidden states and in prompts; what is in between, or around it, is the caller's.
    """

    def __init__(self, remote: RemoteBlocks, blocks: BlockRange):
        self._remote, self.blocks = remote, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, key: int | slice) -> "BlockSlice":
        """Some of these blocks, counted from the first of these.

        Raises:
            InvalidRequest: it is no range of blocks.
        """
        if isinstance(key, int):
            index = range(len(self))[key]  # as a list counts, and fails
            return BlockSlice(self._remote, BlockRange(self.blocks.start + index, self.blocks.start + index + 1))
        start, end, step = key.indices(len(self))
        if step != 1:
            raise InvalidRequest(f"a slice of blocks has step 1, not {step}")
        return BlockSlice(self._remote, BlockRange(self.blocks.start + start, self.blocks.start + end))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run whole sequences through the blocks.

        Args:
            hidden_states: [B, T, H], as they enter the first of the blocks.
            attention_mask: [B, T], nonzero where there is a token; None where all are.
            prompts: [blocks, P, H], added at each block to the hidden states of the first P tokens of every row.

        Returns:
            [B, T, H] with zeros where there is no token.

        Raises:
            InvalidRequest: shapes that don't fit.
        """
        deltas, num_virtual = None, 0
        if prompts is not None:
            expected = (len(self), hidden_states.shape[-1])
            if prompts.ndim != 3 or (prompts.shape[0], prompts.shape[2]) != expected:
                raise InvalidRequest(
                    f"prompts have shape {tuple(prompts.shape)}, need ({expected[0]}, P, {expected[1]})"
                )
            num_virtual = prompts.shape[1]
            deltas = {
                block: BlockDelta(prompt_PH=prompt) for block, prompt in zip(self.blocks, prompts.unbind(), strict=True)
            }
        trained = self._remote.trained(self.blocks)
        return run_trained(trained, hidden_states, mask=attention_mask, deltas=deltas, num_virtual=num_virtual)

    @property
    def route(self) -> Sequence[Any]:
        """The hops that training goes through, in order, with .peer_id and .blocks; none before its first use."""
        return self._remote.trained(self.blocks).training.route

    def __repr__(self) -> str:
        return f"<BlockSlice {self.blocks}>"


def run_trained(
    trained: TrainedBlocks,
    hidden_states: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    deltas: Mapping[int, BlockDelta] | None = None,
    num_virtual: int = 0,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Send the tokens of a padded batch through blocks, differentiably.

    Args:
        hidden_states: [B, T, H].
        mask: [B, T], nonzero where there is a token; None where all are.
        deltas: what changes in which block.
        num_virtual: tokens at the beginning of every row at which the deltas' prompts and prefixes stand.
        positions: [B or 1, T]; where one is not above the one before, another sequence begins, which sees nothing of
            the row before it. None: each row is one sequence.

    Returns:
        [B, T, H] with zeros where there is no token.

    Raises:
        InvalidRequest: a sequence is shorter than what stands at its beginning, or something stands at the beginning of
            rows that hold several.
    """
    if positions is not None and num_virtual:
        raise InvalidRequest(f"rows that hold several sequences can't begin with {num_virtual} virtual positions")
    rows, columns, width = hidden_states.shape
    new = _new_columns(mask, 0, rows, columns)
    lengths = [columns] * rows if new is None else [int(count) for count in new.sum(1).tolist()]
    if positions is not None:
        lengths = _sequences(positions.expand(rows, columns), new)
    if min(lengths) < max(1, num_virtual):
        raise InvalidRequest(f"row {lengths.index(min(lengths))} has {min(lengths)} tokens, need {max(1, num_virtual)}")
    picked = hidden_states.reshape(-1, width) if new is None else hidden_states[new]
    return _scatter(trained(picked, lengths, deltas, num_virtual), hidden_states.shape, new, 0)


def has_packed_rows(
    positions: torch.Tensor | None, mask: torch.Tensor | None, rows: int, columns: int, *, before: int = 0
) -> bool:
    """Whether a row holds several sequences: positions [B or 1, T] start anew within it, padding aside.

    Args:
        mask: [B, before + T], nonzero where there is a token; None where all are.
        before: columns that went before these.
    """
    if positions is None or positions.ndim != 2 or columns < 2 or positions.shape[1] != columns:
        return False
    new = _new_columns(mask, before, rows, columns)
    return len(_sequences(positions.expand(rows, columns), new)) > rows


def _sequences(positions: torch.Tensor, new: torch.Tensor | None) -> list[int]:
    """Lengths of the sequences in all rows [B, T], one after another; padding belongs to none."""
    lengths = []
    for row, own in enumerate(positions.cpu()):
        real = own if new is None else own[new[row].cpu()]
        starts = [0, *((real[1:] <= real[:-1]).nonzero().flatten() + 1).tolist(), len(real)]
        lengths += [end - start for start, end in itertools.pairwise(starts)]
    return lengths


def open_session(service: BlockService, rows: int, max_length: int, adapters: RowAdapters | None) -> BlockSession:
    """A new session; services that know no adapters need not know the argument."""
    if adapters is None:
        return service.open_session(batch_size=rows, max_length=max_length)
    return service.open_session(batch_size=rows, max_length=max_length, adapters=adapters)


def run(
    cache: RemoteCache, hidden_states: torch.Tensor, *, mask: torch.Tensor | None = None, outputs: int = 0
) -> torch.Tensor:
    """Send the new tokens of a padded batch through a session.

    Args:
        cache: the session; advanced when the step succeeded. When it failed, unchanged, or empty if rows were permuted.
        hidden_states: [B, T, H].
        mask: [B, cache.num_columns + T], nonzero where there is a token; None where all are.
        outputs: trailing positions whose outputs are wanted; 0 means all.

    Returns:
        [B, T, H] with zeros where there is no token or no output was wanted.
    """
    rows, columns, _ = hidden_states.shape
    _check(cache, rows, columns)
    new = _new_columns(mask, cache.num_columns, rows, columns)
    move = cache.move(rows_are_equal=cache.copies > 1 and _groups_are_equal(hidden_states, new, cache.copies))
    taken = [columns] * rows if new is None else [int(count) for count in new.sum(1).tolist()]
    skipped = columns - (outputs or columns)
    wanted = [columns - skipped] * rows if new is None else [int(count) for count in new[:, skipped:].sum(1).tolist()]
    leads = set(move.leaders)
    picked = hidden_states if len(leads) == rows else hidden_states[list(move.leaders)]
    picked_new = new if new is None or len(leads) == rows else new[list(move.leaders)]
    if not any(wanted):
        raise InvalidRequest(
            f"none of the last {columns - skipped} columns holds a token (is the padding on the left?)"
        )
    try:
        answer = cache.session.step(
            (picked.reshape(-1, picked.shape[-1]) if picked_new is None else picked[picked_new]).detach().to("cpu"),
            positions=move.positions,
            num_tokens=[count if row in leads else 0 for row, count in enumerate(taken)],
            num_outputs=[count if row in leads else 0 for row, count in enumerate(wanted)],
            order=move.order,
        )
    except BaseException:
        if move.order is not None:  # nobody knows whether the rows were permuted: all is sent anew
            cache.reset()
        raise
    result = _scatter(answer.to(hidden_states), picked.shape, picked_new, skipped)
    cache.moved(move, columns=columns, num_tokens=taken)
    return result if len(leads) == rows else result.repeat_interleave(rows // len(leads), dim=0)


def _check(cache: RemoteCache, rows: int, columns: int) -> None:
    cache.require_open()
    if rows != cache.rows:
        raise InvalidRequest(f"the batch has {rows} rows, the session {cache.rows}")
    limit = cache.max_length + (cache.adapters.num_columns if cache.adapters is not None else 0)
    if cache.num_columns + columns > limit:
        raise InvalidRequest(
            f"{columns} more tokens after {cache.num_columns} would exceed the session's max_length of {limit}"
        )


def _new_columns(mask: torch.Tensor | None, length: int, rows: int, columns: int) -> torch.Tensor | None:
    """The part of the mask over the new tokens as bool [B, T], or None where all are real."""
    if mask is None:
        return None
    if mask.shape != (rows, length + columns):
        raise InvalidRequest(
            f"attention_mask is {tuple(mask.shape)}, need {(rows, length + columns)}: past and new tokens"
        )
    new = mask[:, length:].bool()
    return None if bool(new.all()) else new


def _groups_are_equal(hidden_states: torch.Tensor, new: torch.Tensor | None, copies: int) -> bool:
    for tensor in (hidden_states, new):
        if tensor is not None:
            groups = tensor.reshape(-1, copies, *tensor.shape[1:])
            if not bool((groups == groups[:, :1]).all()):
                return False
    return True


def _scatter(answer: torch.Tensor, shape: torch.Size, new: torch.Tensor | None, skipped: int) -> torch.Tensor:
    """Put outputs, row after row, back to where their tokens stand in the padded batch."""
    if new is None and not skipped:
        return answer.view(shape)
    result = answer.new_zeros(shape)
    if new is None:
        result[:, skipped:] = answer.view(shape[0], -1, shape[-1])
    else:
        result[:, skipped:][new[:, skipped:]] = answer
    return result
