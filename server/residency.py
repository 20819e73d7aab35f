"""Which adapters lie on the device: in pages of the same pool as keys and values, so that the two trade memory.

    add ─ its bytes are in host memory ─► prefetch: blank pages ─┐
    hold(sessions) ─ they are about to run ──────────────────────┴► Attach(seat, deltas, pages)
    release(session) ─► idle: kept as long as nobody needs the pages ─ evicted ─► Detach(seat)

An adapter is held by the sessions that are in the cache; one that moves to host memory lets go of it. What nobody
holds is idle like a cached prefix: it counts as free, and the least recently used goes first, whole. An adapter's pages
must be in a run; where the pool is in pieces, pages of sequences move out of the way. For what does not lie in pages
(vectors, prefixes), and where adapters stand in each other's way, there is some memory beside the pool. Pure; what is
decided is executed by `server.host_pages.carry_out`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarm.adapters.delta import BlockDelta
from swarm.server.host_pages import Attach, Detach, Move, Seat
from swarm.server.pages import PageAllocator

ALIGNMENT_PAGES = 2
"""Pages that an adapter may need more than estimated, by where its run begins."""

Deltas = Mapping[int, BlockDelta]


class AdapterMeter(Protocol):
    """Says what adapters take: `swarm.server.blocks.BlockSpan`."""

    def adapter_pages(self, deltas: Deltas, pages: Sequence[int] = ()) -> int:
        """Pages that are missing beside these."""

    def adapter_bytes(self, deltas: Deltas, *, paged: bool) -> int:
        """Memory that it takes outside of pages."""


@dataclass(slots=True, kw_only=True)
class _Adapter:
    digest: str
    client: str
    """For whom it came."""
    deltas: Deltas
    num_pages: int
    """About."""
    num_ranks: int
    seat: Seat | None = None
    pages: list[int] = field(default_factory=list)
    own_bytes: int = 0
    """Outside of pages, while it is attached."""
    num_holders: int = 0

    @property
    def is_held(self) -> bool:
        """Whether what it takes on the device is in use."""
        return self.seat is not None and self.num_holders > 0

    @property
    def most_pages(self) -> int:
        """Pages that it takes, or will take at most."""
        return len(self.pages) if self.seat is not None else self.num_pages + ALIGNMENT_PAGES * (self.num_pages > 0)


class Residency:
    """See the module.

    Args:
        allocator: of the pages.
        move: is given what is to be moved, in order.
        meter: says what adapters take.
        own_bytes: memory beside the pages.
        relocate: is told which pages of sequences, (old, new), made room.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        move: Callable[[Move], None],
        meter: AdapterMeter | None,
        *,
        own_bytes: int,
        relocate: Callable[[Sequence[tuple[int, int]]], None] = lambda moved: None,
    ):
        self.num_attached = 0
        """Times that an adapter was brought to the device."""
        self.attached: tuple[str, ...] = ()
        """Adapters on the device; other threads may look at it."""
        self.brought: list[str] = []
        """For which client each adapter was brought to the device since somebody took this list."""
        self._allocator, self._move, self._meter, self._relocate = allocator, move, meter, relocate
        self._own_limit, self._own_used = own_bytes, 0
        self._adapters: dict[str, _Adapter] = {}
        self._soon: dict[str, None] = {}
        self._seated: dict[str, _Adapter] = {}
        """Those on the device, the least recently used first."""
        self._by_page: dict[int, _Adapter] = {}

    # -- what is there ------------------------------------------------------------------------------------------

    def add(self, digest: str, deltas: Deltas, *, client: str = "") -> None:
        """Sessions may use this adapter from now on, and one of this client is about to."""
        if digest not in self._adapters:
            assert self._meter is not None
            ranks = sum(linear.rank for delta in deltas.values() for linear in delta.linears.values())
            pages = self._meter.adapter_pages(deltas)
            self._adapters[digest] = _Adapter(
                digest=digest, client=client, deltas=deltas, num_pages=pages, num_ranks=ranks
            )
        self._adapters[digest].client = client
        self._soon[digest] = None

    def prefetch(self, limit: int, may_load: Callable[[str], bool] = lambda client: True) -> bool:
        """Bring some adapters that were added to the device, where nothing has to go for them.

        Args:
            limit: of how many.
            may_load: whether any may come for a client now; others are kept in mind.

        Returns:
            Whether any came.
        """
        before, refused = self.num_attached, set[str]()
        for adapter in [self._adapters[digest] for digest in self._soon]:
            if self.num_attached - before >= limit:
                break
            if adapter.client in refused:
                continue
            if adapter.seat is None and not may_load(adapter.client):
                refused.add(adapter.client)
                continue
            del self._soon[adapter.digest]
            is_free = adapter.seat is None and not adapter.num_holders  # after a failure its holders have to go first
            if is_free and self._attach(adapter, adapter.client, may_evict=False):
                self._allocator.free(adapter.pages)
        return self.num_attached > before

    def forget(self, digest: str) -> None:
        """No session uses it any more, and its bytes in host memory are gone."""
        self._soon.pop(digest, None)
        adapter = self._adapters.pop(digest, None)
        if adapter is not None and adapter.seat is not None:
            self._detach(adapter)

    def failed(self, digest: str) -> None:
        """It could not be brought to the device; those who hold it get nothing from it."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.seat is not None:
            pages = adapter.pages if adapter.num_holders else []
            self._detach(adapter)
            self._allocator.free(pages)

    def seat(self, digest: str | None) -> Seat | None:
        """Where an adapter that is held is; None for none."""
        return None if digest is None else self._adapters[digest].seat

    def num_ranks(self, digest: str) -> int:
        """Rank rows of an adapter in all blocks of the span: what a step reads of it."""
        return self._adapters[digest].num_ranks

    # -- who uses it --------------------------------------------------------------------------------------------

    def to_attach(self, session: Any) -> set[str]:
        """Adapters that must be brought to the device before a session can run."""
        return {adapter.digest for adapter in self._of([session]) if adapter.seat is None}

    def num_pages(self, session: Any) -> int:
        """Pages of the adapters that a session holds."""
        return sum(len(adapter.pages) for adapter in self._of([session])) if session.holds_adapters else 0

    def pages_wanted(self, sessions: Iterable[Any]) -> int:
        """Pages that count as free and will not any more once all these sessions hold their adapters."""
        return sum(adapter.most_pages for adapter in self._of(sessions) if not adapter.is_held)

    def pages_released(self, session: Any, gone: Counter[str], wanted: Any) -> int:
        """Pages that become free when a session lets go of its adapters, for another that wants some.

        Args:
            session: lets go.
            gone: how many others let go of each adapter as well.
            wanted: the session that wants pages.
        """
        if not session.holds_adapters:
            return 0
        alone = (it for it in self._of([session]) if it.num_holders == 1 + gone[it.digest])
        return sum(len(adapter.pages) for adapter in alone if adapter.digest not in wanted.adapters)

    def hold(self, sessions: Collection[Any]) -> list[Any]:
        """These sessions run next: bring their adapters to the device, and keep them there.

        Returns:
            Those for whom there is no room, in one place or beside the pages.
        """
        new = [session for session in sessions if session.adapters and not session.holds_adapters]
        guarded = [adapter for adapter in self._of(new) if adapter.seat is not None]
        for adapter in guarded:
            self._take(adapter)  # or it could have to go for another one of these
        left_out = [session for session in new if not self._hold(session)]
        for adapter in guarded:
            self._let_go(adapter)
        return left_out

    def release(self, session: Any) -> None:
        """A session has left the cache."""
        if session.holds_adapters:
            session.holds_adapters = False
            for adapter in self._of([session]):
                self._let_go(adapter)

    def touch(self, sessions: Iterable[Any]) -> None:
        """These sessions wait: what is idle of their adapters goes last."""
        for adapter in self._of(sessions):
            if adapter.seat is not None and not adapter.num_holders:
                self._take(adapter)
                self._let_go(adapter)

    # -- pages --------------------------------------------------------------------------------------------------

    def evicted(self, page: int) -> None:
        """The allocator has taken a page of an adapter that nobody holds: the others are worthless without it."""
        adapter = self._by_page.pop(page)
        adapter.pages.remove(page)
        self._detach(adapter)

    def moved(self, page: int, new: int) -> None:
        """Pages of an adapter in use are never moved."""
        raise AssertionError(f"page {page} of an adapter was moved to {new}")

    def _of(self, sessions: Iterable[Any]) -> list[_Adapter]:
        """The different adapters of these sessions."""
        digests = dict.fromkeys(digest for session in sessions for digest in session.adapters if digest is not None)
        return [self._adapters[digest] for digest in digests]

    def _hold(self, session: Any) -> bool:
        taken: list[_Adapter] = []
        for adapter in self._of([session]):
            if adapter.seat is not None:
                self._take(adapter)
            elif self._attach(adapter, session.client):
                adapter.num_holders += 1
            else:
                for other in taken:
                    self._let_go(other)
                return False
            taken.append(adapter)
        session.holds_adapters = True
        return True

    def _take(self, adapter: _Adapter) -> None:
        if not adapter.num_holders:
            self._allocator.share(adapter.pages)
        adapter.num_holders += 1
        self._seated[adapter.digest] = self._seated.pop(adapter.digest)

    def _let_go(self, adapter: _Adapter) -> None:
        adapter.num_holders -= 1
        if not adapter.num_holders:
            self._allocator.free(adapter.pages)

    def _attach(self, adapter: _Adapter, client: str, *, may_evict: bool = True) -> bool:
        """Give an adapter pages in a run, or memory beside them; they are owned once then."""
        assert self._meter is not None
        pages = self._place(adapter, may_evict)
        own_bytes = self._meter.adapter_bytes(adapter.deltas, paged=pages is not None)
        if not self._make_own_room(own_bytes, may_evict):
            self._allocator.free(pages or ())
            return False
        adapter.pages, adapter.own_bytes = pages or [], own_bytes
        adapter.seat = Seat(digest=adapter.digest)
        self._own_used += own_bytes
        self._seated[adapter.digest] = adapter
        for page in adapter.pages:
            self._by_page[page] = adapter
            self._allocator.keep(page, self)
        self.attached = tuple(self._seated)
        self.num_attached += 1
        self.brought.append(client)
        self._move(Attach(seat=adapter.seat, deltas=adapter.deltas, pages=None if pages is None else tuple(pages)))
        return True

    def _place(self, adapter: _Adapter, may_evict: bool) -> list[int] | None:
        """Pages in a run that have room for it; how many it takes depends on where they are."""
        assert self._meter is not None
        count = adapter.num_pages
        if not count:
            return []
        while count <= adapter.most_pages:
            pages = self._allocator.allocate_run(count, may_evict=may_evict)
            if pages is None:
                return self._clear(adapter) if may_evict else None
            missing = self._meter.adapter_pages(adapter.deltas, pages)
            if not missing:
                return pages
            self._allocator.free(pages)
            count += missing
        return None

    def _clear(self, adapter: _Adapter) -> list[int] | None:
        """A run where sequences had pages, which make room; as many as it takes at most, wherever the run begins."""
        found = self._allocator.clear_run(adapter.most_pages, lambda page: page in self._by_page)
        if found is None:
            return None
        pages, moved = found
        self._relocate(moved)
        return pages

    def _make_own_room(self, num_bytes: int, may_evict: bool) -> bool:
        if num_bytes > self._own_limit:
            return False
        idle = [adapter for adapter in self._seated.values() if adapter.own_bytes and not adapter.num_holders]
        while self._own_used + num_bytes > self._own_limit:
            if not may_evict or not idle:
                return False
            self._detach(idle.pop(0))
        return True

    def _detach(self, adapter: _Adapter) -> None:
        """It is on the device no longer, and nobody wants what its pages hold."""
        assert adapter.seat is not None
        self._move(Detach(seat=adapter.seat))
        del self._seated[adapter.digest]
        self._own_used -= adapter.own_bytes
        self.attached = tuple(self._seated)
        pages, adapter.pages, adapter.seat, adapter.own_bytes = adapter.pages, [], None, 0
        for page in pages:
            del self._by_page[page]
            self._allocator.discard(page)
