"""One module that stands where a transformers model has its list of decoder layers, and runs them all remotely.

    model.forward ──hidden_states [B, T, H]──► RemoteBlocks ──[tokens, H], row after row──► session.step ~~► servers
                  ◄──[B, T, H], zeros where nobody looks───┘◄────── the outputs wanted ───┘

Only real tokens travel (no padding), and only the outputs whose logits are needed come back. What the layer list is
called with (masks, rotary tables, ...) depends on the model and is ignored; what matters is put into a `Pass` by the
model's own __call__. Knows nothing of tokens, logits or networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarm.client.cache import BlockService, BlockSession, RemoteCache
from swarm.client.row_adapters import RowAdapters
from swarm.errors import InvalidRequest


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


_current: ContextVar[Pass | None] = ContextVar("swarm_client_pass", default=None)


@contextmanager
def model_pass(values: Pass) -> Iterator[None]:
    """Let RemoteBlocks know how the model was called, in this thread."""
    token = _current.set(values)
    try:
        yield
    finally:
        _current.reset(token)


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

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """Run hidden_states [B, T, H] through all blocks; the result has the same shape.

        Raises:
            InvalidRequest: for a batch that does not fit the session, or when gradients are wanted.
        """
        outputs = self._forward(hidden_states)
        return (outputs,) if self.returns_tuple else outputs

    def extra_repr(self) -> str:
        return "local dry run" if self.service is None else f"{self.service.num_blocks} blocks"

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise InvalidRequest("gradients through remote blocks are not available yet; call under torch.no_grad()")
        if self.service is None:
            return hidden_states
        values = _current.get() or Pass()
        if values.cache is not None:
            return run(values.cache, hidden_states, mask=values.mask, outputs=values.outputs)
        rows, columns, _ = hidden_states.shape
        session = open_session(self.service, rows, columns, values.adapters)
        with RemoteCache(session, max_length=columns, adapters=values.adapters) as cache:
            return run(cache, hidden_states, mask=values.mask, outputs=values.outputs)


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
