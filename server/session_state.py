"""A session at rest as one message and its bytes, and the check of both where they arrive.

    Intake, Sender's Link, CacheImage ─ SavedSession ─ pack ─► SessionState, bytes ~~► Arrival: check, take parts
                                                                        ─► SavedSession ─► Intake, Link, Executor

What comes from another server is believed in one thing only: that these numbers belong to the session's rows. Counts,
lengths, order and size are checked against the session that the client opened here, before a byte is allocated. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swarm.codec import torch_dtype
from swarm.errors import InvalidRequest
from swarm.intake import IntakeState
from swarm.link import LinkState
from swarm.protocol import DType, Encoding, OpenSession, SentState, SessionState, StatePart
from swarm.rows import check_order
from swarm.server.blocks.parcel import Layout
from swarm.server.cache_image import CacheImage
from swarm.server.pages import PAGE_SIZE

_PAGE_NUMBER = np.dtype("<u4")
_WIRE_DTYPES = {torch_dtype(dtype): dtype for dtype in DType}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a session sends on, and in which form."""

    link: LinkState
    dtype: DType
    encoding: Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A session between two pieces of work."""

    intake: IntakeState
    image: CacheImage
    sent: Sent | None
    """None before the first output."""


def pack(saved: SavedSession, opened: OpenSession, layout: Layout) -> tuple[SessionState, bytearray]:
    """The message and the bytes that follow it.

    Args:
        saved: the session.
        opened: how its client has opened it.
        layout: of its cache.
    """
    intake, image = saved.intake, saved.image
    state = SessionState(
        start=opened.start,
        end=opened.end,
        dtype=_WIRE_DTYPES[layout.dtype],
        lengths=image.lengths,
        num_pages=image.num_pages,
        cache_bytes=len(image.content),
        step_id=intake.step_id,
        received=intake.lengths,
        outputs_from=intake.outputs_from,
        order=intake.order,
        base=intake.base,
        sent=None if saved.sent is None else _describe(saved.sent),
    )
    body = bytearray()
    for pages in image.layouts:
        body += np.asarray(pages, _PAGE_NUMBER).tobytes()
    body += image.content
    if saved.sent is not None:
        for piece in (piece for row in saved.sent.link.kept for piece in row):
            raw = piece.to(torch_dtype(saved.sent.dtype)).contiguous().view(-1).view(torch.uint8)
            body += raw.numpy().data
    return state, body


def _describe(sent: Sent) -> SentState:
    link = sent.link
    lengths = [sum(len(piece) for piece in row) for row in link.kept]
    return SentState(
        step_id=max(0, link.step_id),
        order=link.order,
        base=link.base,
        outputs_from=link.outputs_from,
        starts=link.starts,
        ends=tuple(start + length for start, length in zip(link.starts, lengths, strict=True)),
        dtype=sent.dtype,
        encoding=sent.encoding,
    )


class Arrival:
    """The state of a session that comes in.

    Args:
        state: what the other server says.
        opened: how the client has opened the session here.
        layout: of the cache in its blocks here.
        hidden_size: width of hidden states.

    Raises:
        InvalidRequest: it can't be this session's.
    """

    def __init__(self, state: SessionState, opened: OpenSession, layout: Layout, hidden_size: int):
        self._state, self._hidden_size = state, hidden_size
        if (state.start, state.end) != (opened.start, opened.end):
            raise InvalidRequest(f"state of blocks {state.start}:{state.end}, the session has {opened.blocks}")
        if torch_dtype(state.dtype) != layout.dtype:
            raise InvalidRequest(f"keys and values in {state.dtype.name}, this server keeps them in {layout.dtype}")
        self._check_rows(opened.batch_size, opened.max_length)
        self._check_order(opened)
        num_states = sum(length > 0 for length in state.lengths)
        expected = layout.num_bytes(state.num_pages, num_states)
        if state.cache_bytes != expected:
            raise InvalidRequest(
                f"{state.cache_bytes} bytes of {state.num_pages} pages and {num_states} states, expected {expected}"
            )
        self._page_counts = [-(-length // PAGE_SIZE) for length in state.lengths]
        if not max(self._page_counts) <= state.num_pages <= sum(self._page_counts):
            raise InvalidRequest(f"{state.num_pages} pages for rows of {self._page_counts}")
        self.num_bytes = 4 * sum(self._page_counts) + expected + self._sent_bytes
        """Of all parts together."""
        self._body = bytearray()
        self._at = 0

    def allocate(self) -> None:
        """Make room for the parts."""
        self._body = bytearray(self.num_bytes)

    @property
    def is_whole(self) -> bool:
        """Whether all parts are here."""
        return self._at == self.num_bytes

    def take(self, part: StatePart, body: memoryview) -> None:
        """The next part.

        Raises:
            InvalidRequest: it is not, or there is more than there should be.
        """
        if part.offset != self._at or not len(body) or self._at + len(body) > self.num_bytes:
            raise InvalidRequest(
                f"{len(body)} bytes of the state at {part.offset}, expected some at {self._at} of {self.num_bytes}"
            )
        self._body[self._at : self._at + len(body)] = body
        self._at += len(body)

    def finish(self) -> SavedSession:
        """What has come, all parts being here.

        Raises:
            InvalidRequest: a row has a page that there isn't.
        """
        state, body = self._state, memoryview(self._body)
        numbers = np.frombuffer(body, _PAGE_NUMBER, sum(self._page_counts))
        if len(numbers) and int(numbers.max()) >= state.num_pages:
            raise InvalidRequest(f"page {int(numbers.max())} of {state.num_pages}")
        layouts, at = [], 0
        for count in self._page_counts:
            layouts.append(tuple(map(int, numbers[at : at + count])))
            at += count
        end = 4 * at + state.cache_bytes
        image = CacheImage(
            lengths=state.lengths, num_pages=state.num_pages, layouts=tuple(layouts), content=body[4 * at : end]
        )
        return SavedSession(intake=self._intake, image=image, sent=self._sent(body[end:]))

    # -- details ------------------------------------------------------------------------------------------------

    @property
    def _intake(self) -> IntakeState:
        state = self._state
        return IntakeState(
            step_id=state.step_id,
            lengths=state.received,
            outputs_from=state.outputs_from,
            order=state.order,
            base=state.base,
        )

    @property
    def _sent_bytes(self) -> int:
        sent = self._state.sent
        if sent is None:
            return 0
        count = sum(end - start for start, end in zip(sent.starts, sent.ends, strict=True))
        return count * self._hidden_size * sent.dtype.num_bytes

    def _sent(self, body: memoryview) -> Sent | None:
        sent = self._state.sent
        if sent is None:
            return None
        dtype, width = torch_dtype(sent.dtype), self._hidden_size
        kept: list[tuple[torch.Tensor, ...]] = []
        at = 0
        for start, end in zip(sent.starts, sent.ends, strict=True):
            size = (end - start) * width * dtype.itemsize
            # of its own memory: histories are cut and dropped piece by piece
            piece = torch.frombuffer(bytearray(body[at : at + size]), dtype=dtype).view(-1, width) if size else None
            kept.append(() if piece is None else (piece,))
            at += size
        link = LinkState(
            step_id=sent.step_id,
            order=sent.order,
            base=sent.base,
            outputs_from=sent.outputs_from,
            starts=sent.starts,
            kept=tuple(kept),
        )
        return Sent(link=link, dtype=sent.dtype, encoding=sent.encoding)

    def _check_rows(self, num_rows: int, max_length: int) -> None:
        """As many rows everywhere as the session has, none longer than it may be."""
        state, sent = self._state, self._state.sent
        given: list[Sequence[int] | None] = [state.lengths, state.received, state.outputs_from, state.order, state.base]
        lengths = [*state.lengths, *state.received]
        if sent is not None:
            given += [sent.order, sent.base, sent.outputs_from, sent.starts, sent.ends]
            lengths += sent.ends
        if counts := {len(it) for it in given if it is not None} - {num_rows}:
            raise InvalidRequest(f"the session has {num_rows} rows, its state speaks of {sorted(counts)}")
        if max(lengths) > max_length:
            raise InvalidRequest(f"a row of {max(lengths)} tokens, session limit {max_length}")
        if sent is None:
            return
        if any(start > end for start, end in zip(sent.starts, sent.ends, strict=True)):
            raise InvalidRequest(f"outputs from {sent.starts} to {sent.ends}")
        if any(end > length for end, length in zip(sent.ends, state.lengths, strict=True)):
            raise InvalidRequest(f"outputs up to {sent.ends} of {state.lengths} tokens")

    def _check_order(self, opened: OpenSession) -> None:
        """Orders name rows that there are, with the same adapter; and what came in is what the cache has."""
        state = self._state
        orders = [state.order] if state.sent is None else [state.order, state.sent.order]
        for order in orders:
            if order is not None and max(order) >= opened.batch_size:
                raise InvalidRequest(f"order names row {max(order)} of {opened.batch_size}")
            check_order(order, opened.adapter_of)
        if state.order is not None and state.base is None:
            raise InvalidRequest("an order without a rollback")
        if self._intake.lengths_after(state.lengths) != state.received:
            raise InvalidRequest(f"rows of {state.lengths} tokens in the cache, {state.received} received")
