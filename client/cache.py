"""What a session's servers hold, as transformers' generation loop sees it: a cache without tensors.

    generate ──crop, reorder_cache──► RemoteCache ──Move (positions, order)──► RemoteBlocks ──► session.step

transformers drops tokens (assisted decoding) and permutes rows (beam search) between forward passes; both travel with
the next step. Rows that start as copies of one prompt (beams, several answers) are run once, until they differ.

Knows nothing of networks or tensors of hidden states. Meets transformers' `Cache` interface of 5.17 to 5.23, where
`crop(n)` takes a negative n: the number of tokens to drop.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from transformers import Cache

from swarm.adapters.layout import ModelLayout
from swarm.client.autograd import BlockTraining
from swarm.client.row_adapters import ClientAdapter, RowAdapters
from swarm.errors import InvalidRequest
from swarm.types import BlockRange


class BlockSession(Protocol):
    """One inference session through all remote blocks, for synchronous callers."""

    batch_size: int

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run one step.

        Args:
            hidden_states: [sum(num_tokens), hidden], row after row.
            positions: tokens that each row keeps; fewer than it holds is a rollback.
            num_tokens: new tokens of each row, 0 allowed.
            num_outputs: trailing outputs wanted of each row; all by default.
            order: which old row each row continues; applied first.

        Returns:
            [sum(num_outputs), hidden], row after row.
        """
        ...

    def close(self) -> None:
        """Free what the servers hold; may be called twice."""
        ...

    @property
    def route(self) -> Sequence[Any]:
        """The hops in use, in order, each with .peer_id and .blocks."""
        ...


class BlockService(Protocol):
    """The remote blocks of one model."""

    num_blocks: int
    hidden_size: int

    def open_session(self, *, batch_size: int, max_length: int, adapters: RowAdapters | None = None) -> BlockSession:
        """A new session of `batch_size` rows of at most `max_length` tokens, each with its own adapter or none."""
        ...

    def fetch_adapter(self, digest: str, layout: ModelLayout) -> ClientAdapter:
        """An adapter of which only the digest is known, from whoever has it.

        Raises:
            AdapterError: nobody has it, or it does not fit a model laid out so.
        """
        ...

    def open_training(self, blocks: BlockRange) -> BlockTraining:
        """A new training run through some of the blocks."""
        ...

    def close(self) -> None:
        """Close all sessions and leave; may be called twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Which rows take part in the next step, and where they continue."""

    leaders: tuple[int, ...]
    """Rows to run; every other row is a copy of the leader before it."""
    positions: tuple[int, ...]
    """Per row: tokens that the servers keep."""
    order: tuple[int, ...] | None
    """Per row: which old row it continues, or None for itself."""


class RemoteCache(Cache):
    """A session's state on the client: lengths of the rows, and what the servers must still be told.

    It can be passed to `generate` as `session=` or `past_key_values=`, again and again with the growing sequence; only
    new tokens are sent. Use it as a context manager, or close it.

    Args:
        session: the remote side.
        max_length: most tokens that a row may hold, padding included, virtual positions of adapters not.
        copies: rows [i * copies, (i + 1) * copies) begin with equal content.
        adapters: of the rows, where any has one.
    """

    def __init__(self, session: BlockSession, *, max_length: int, copies: int = 1, adapters: RowAdapters | None = None):
        super().__init__(layers=[])
        self.session = session
        self.adapters = adapters
        self.max_length = max_length
        self.length = 0
        """Columns of the padded batch that went through the blocks, without those of virtual positions."""
        self.lengths = [0] * session.batch_size
        """What the servers hold of each row: its virtual positions and its real tokens."""
        self._copies = copies
        self._shows_virtual = False
        self._order: list[int] | None = None
        self._closed = False

    # -- used by RemoteBlocks -----------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def num_columns(self) -> int:
        """All columns that went through the blocks: virtual positions, padding and tokens."""
        return self.length + (self.adapters.num_columns if self.adapters is not None and not self.is_new else 0)

    @property
    def is_new(self) -> bool:
        """Whether the servers hold nothing of any row."""
        return not any(self.lengths)

    @property
    def copies(self) -> int:
        """Group size of rows that are still equal; 1 when every row stands for itself."""
        return self._copies

    def move(self, *, rows_are_equal: bool) -> Move:
        """What the next step must tell the servers.

        Args:
            rows_are_equal: whether the new tokens are equal within each group of `copies` rows.
        """
        rows = range(self.rows)
        if self._copies == 1:
            return Move(leaders=tuple(rows), positions=tuple(self.lengths), order=self._pending_order())
        if rows_are_equal and all(self._leader(old) == self._leader(row) for row, old in self._sources()):
            positions = tuple(self.lengths[row] if row == self._leader(row) else 0 for row in rows)
            return Move(leaders=tuple(rows[:: self._copies]), positions=positions, order=None)
        order = tuple(self._leader(old) for _, old in self._sources()) if max(self.lengths) else None
        return Move(leaders=tuple(rows), positions=tuple(self.lengths), order=order)

    def moved(self, move: Move, *, columns: int, num_tokens: Sequence[int]) -> None:
        """The step is done: every row took `num_tokens` more, in `columns` columns of the padded batch."""
        if self.adapters is not None and self.is_new:
            columns -= self.adapters.num_columns
        self.length += columns
        self.lengths = [length + count for length, count in zip(self.lengths, num_tokens, strict=True)]
        self._order = None
        if len(move.leaders) == self.rows:
            self._copies = 1

    @contextmanager
    def virtual_shown(self) -> Iterator[None]:
        """While the model itself runs, virtual positions count like any other."""
        self._shows_virtual = True
        try:
            yield
        finally:
            self._shows_virtual = False

    # -- used by callers ----------------------------------------------------------------------------------------

    @property
    def route(self) -> tuple[Any, ...]:
        """The hops in use, in order; empty before the first step."""
        return tuple(self.session.route)

    @property
    def is_closed(self) -> bool:
        """Whether the servers were told to forget it."""
        return self._closed

    def require_open(self) -> None:
        """Raise InvalidRequest when the session is closed."""
        if self._closed:
            raise InvalidRequest("this session is closed; to continue later, use one of model.inference_session()")

    def close(self) -> None:
        """Free the session on its servers; may be called twice."""
        if not self._closed:
            self._closed = True
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.route)} hops"
        return f"<RemoteCache {state} | {self.rows} rows | position {self.length}/{self.max_length}>"

    def __bool__(self) -> bool:
        return True

    # -- used by transformers -----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch so far; for the model itself with those of virtual positions."""
        return self.num_columns if self._shows_virtual else self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit that transformers should act on (ours is checked with each step)."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over everything."""
        return self.num_columns + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the next tokens begin."""
        return self.num_columns

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything went through the blocks."""
        return self.length > 0

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """No: the servers can go back by themselves."""
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i will continue what row beam_idx[i] is now."""
        indices = [int(index) for index in beam_idx.tolist()]
        if len(indices) != self.rows:
            raise InvalidRequest(f"an order of {len(indices)} rows for a session of {self.rows}")
        self._order = [old if self._order is None else self._order[old] for old in indices]
        self.lengths = [self.lengths[old] for old in indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row."""
        dropped = -int(tokens_to_remove)  # a tensor in 5.17
        virtual = self.adapters.num_virtual if self.adapters is not None else (0,) * self.rows
        most = min(length - own for length, own in zip(self.lengths, virtual, strict=True))
        if not 0 <= dropped <= max(most, 0):
            raise InvalidRequest(f"crop({tokens_to_remove}): need a number between {-most} and 0")
        self.length -= dropped
        self.lengths = [length - dropped for length in self.lengths]

    def reset(self) -> None:
        """Forget everything, but keep the session."""
        self.length, self.lengths, self._order = 0, [0] * self.rows, None

    def update(self, *_: Any, **__: Any) -> Any:
        """Nothing can be stored here."""
        raise InvalidRequest("a local layer wrote to the cache of a remote session")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible: a session has the rows that it was opened with."""
        raise InvalidRequest(f"a session of {self.rows} rows can't become one of {self.rows * repeats}; open another")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not possible: a session has the rows that it was opened with."""
        raise InvalidRequest(f"a session of {self.rows} rows can't become one of {len(indices)}; open another")

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.rows

    @property
    def is_compileable(self) -> bool:
        """No."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Always."""
        return True

    @property
    def is_croppable(self) -> bool:
        """Yes: a rollback travels with the next step."""
        return True

    # -- helpers ------------------------------------------------------------------------------------------------

    def _leader(self, row: int) -> int:
        return row - row % self._copies

    def _sources(self) -> list[tuple[int, int]]:
        return list(enumerate(self._order if self._order is not None else range(self.rows)))

    def _pending_order(self) -> tuple[int, ...] | None:
        if self._order is None or self._order == list(range(self.rows)) or not max(self.lengths):
            return None
        return tuple(self._order)
