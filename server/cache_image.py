"""The cache of a session at rest, as another server can go on with it: pages, lengths of rows, recurrent states.

    take_image: CachedSession ─ its pages, or where it lies in host memory ─► CacheImage ~~► another server
    put_image:  CacheImage ─► an empty CachedSession, which lies in host memory from then on: its turn brings it back

So what arrives takes part in admission like any session that had to give its pages up, and what leaves is read the way
a swap reads it. Called on the device thread; nothing is changed where a session is only read.
"""

from dataclasses import dataclass
from typing import Any

from swarm.errors import InvalidRequest, PeerBusy
from swarm.server.host_pages import HostBudget, Swapped
from swarm.server.sequences import CachedSession

HOST_SHARE = 0.5
"""Part of the memory for swapped sessions that may be full when one comes: the rest is for those that are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheImage:
    """See the module."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    num_pages: int
    """Different pages of all rows; beams share some."""
    layouts: tuple[tuple[int, ...], ...]
    """For each row, which of these its pages are, in token order."""
    content: bytearray | memoryview
    """What `BlockSpan.pack_cache` gave."""

    @property
    def num_states(self) -> int:
        """Rows that have a recurrent state, where the model has any."""
        return sum(length > 0 for length in self.lengths)


def take_image(session: CachedSession, span: Any) -> CacheImage:
    """What a session without work has in the cache of a `swarm.server.blocks.BlockSpan`.

    Raises:
        PeerBusy: it has work.
        SwarmError: why its cache can't be used any more.
    """
    if session.error is not None:
        raise session.error
    if session.jobs:
        raise PeerBusy(f"the session has {len(session.jobs)} pieces of work")
    if session.swapped is not None:
        num_pages, layouts, saved = session.swapped.num_pages, session.swapped.layouts, session.swapped.content
    else:
        pages = session.pages()
        index = {page: number for number, page in enumerate(pages)}
        num_pages, layouts = len(pages), tuple(tuple(index[it] for it in row.table.pages) for row in session.rows)
        saved = span.read_pages(pages, session.blocks)
    states = [row.state for row in session.rows if row.state is not None and row.table.length]
    return CacheImage(
        lengths=tuple(row.table.length for row in session.rows),
        num_pages=num_pages,
        layouts=layouts,
        content=span.pack_cache(saved, states, session.blocks),
    )


def put_image(session: CachedSession, image: CacheImage, span: Any, host: HostBudget) -> None:
    """Let an empty session have what is in an image that was checked against it.

    Raises:
        InvalidRequest: it is not empty, or the content has another size.
        PeerBusy: no host memory.
    """
    if session.jobs or session.swapped is not None or session.num_tokens:
        raise InvalidRequest(f"the session holds {session.num_tokens} tokens: it can't become another one")
    if not any(image.lengths):
        return
    free = int(host.capacity * HOST_SHARE) - host.used
    if len(image.content) > free:
        raise PeerBusy(f"{len(image.content)} bytes of host memory needed, {max(0, free)} free")
    saved, states = span.unpack_cache(image.content, image.num_pages, image.num_states, session.blocks)
    left = iter(states)
    for row, length in zip(session.rows, image.lengths, strict=True):
        row.table.expect(length)
        row.keys = None  # nobody else may find what a stranger says is in its pages
        if row.state is not None and length:
            row.state = next(left)
            row.state.position = length
    host.take(len(image.content))
    session.swapped = Swapped(
        num_pages=image.num_pages, layouts=image.layouts, num_bytes=len(image.content), content=saved
    )
