"""Which adapters lie on the device: in pages of the same pool as keys and values, so that the two trade memory.

    add ─ its bytes are in host memory ─► prefetch: blank pages ─┐
    hold(sessions) ─ they are about to run ──────────────────────┴► Attach(slot, deltas, pages)
    release(session) ─► idle: kept as long as nobody needs the pages ─ evicted ─► Detach(slot)

An adapter is held by the sessions that have pages in the cache; a session that moves to host memory lets go of it. What
nobody holds is idle like a cached prefix: it counts as free, and the least recently used goes first, whole. Pure; what
is decided is executed by `server.host_pages.carry_out`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swarm.adapters.delta import BlockDelta
from swarm.server.host_pages import Attach, Detach, Move
from swarm.server.pages import PageAllocator

NO_SLOT = -1
"""Of rows without an adapter."""


@dataclass(slots=True, kw_only=True)
class _Adapter:
    digest: str
    deltas: Mapping[int, BlockDelta]
    num_pages: int
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)
    num_holders: int = 0

    @property
    def is_attached(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def is_held(self) -> bool:
        """Whether its pages are in use."""
        return self.is_attached and self.num_holders > 0


class Residency:
    """See the module.

    Args:
        allocator: of the pages.
        move: is given what is to be moved, in order.
    """

    def __init__(self, allocator: PageAllocator, move: Callable[[Move], None]):
        self.num_attached = 0
        """Times that an adapter was brought to the device."""
        self.attached: tuple[str, ...] = ()
        """Adapters on the device; other threads may look at it."""
        self._allocator, self._move = allocator, move
        self._adapters: dict[str, _Adapter] = {}
        self._soon: dict[str, None] = {}
        self._by_page: dict[int, _Adapter] = {}
        self._slots: dict[int, _Adapter] = {}

    # -- what is there ------------------------------------------------------------------------------------------

    def add(self, digest: str, deltas: Mapping[int, BlockDelta], num_pages: int) -> None:
        """Sessions may use this adapter from now on, and one is about to."""
        if digest not in self._adapters:
            self._adapters[digest] = _Adapter(digest=digest, deltas=deltas, num_pages=num_pages)
        self._soon[digest] = None

    def prefetch(self, limit: int) -> bool:
        """Bring some adapters that were added to the device, where nothing has to go for them; whether any came."""
        before = self.num_attached
        while self._soon and self.num_attached - before < limit:
            digest = next(iter(self._soon))
            del self._soon[digest]
            adapter = self._adapters[digest]
            if not adapter.is_attached and adapter.num_pages <= self._allocator.num_free - self._allocator.num_idle:
                self._attach(adapter)
                self._allocator.free(adapter.pages)
        return self.num_attached > before

    def forget(self, digest: str) -> None:
        """No session uses it any more, and its bytes in host memory are gone."""
        self._soon.pop(digest, None)
        adapter = self._adapters.pop(digest, None)
        if adapter is not None and adapter.is_attached:
            self._detach(adapter)
            self._discard(adapter)

    def failed(self, digest: str) -> None:
        """It could not be brought to the device; those who hold it get nothing from it."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.is_attached:
            pages = adapter.pages
            self._detach(adapter)
            self._discard(adapter)
            if adapter.num_holders:
                self._allocator.free(pages)

    def slot(self, digest: str | None) -> int:
        """Under which number the span knows an adapter that is held; NO_SLOT for none."""
        return NO_SLOT if digest is None else self._adapters[digest].slot

    @property
    def num_held_pages(self) -> int:
        """Pages of adapters that some session holds."""
        return sum(len(adapter.pages) for adapter in self._slots.values() if adapter.num_holders)

    # -- who uses it --------------------------------------------------------------------------------------------

    def pages_wanted(self, sessions: Iterable[Any]) -> int:
        """Pages that count as free and will not any more once all these sessions hold their adapters."""
        return sum(adapter.num_pages for adapter in self._of(sessions) if not adapter.is_held)

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
        return sum(adapter.num_pages for adapter in alone if adapter.digest not in wanted.adapters)

    def hold(self, sessions: Iterable[Any]) -> None:
        """These sessions run next: bring their adapters to the device, and keep them there. There is room for them."""
        new = [session for session in sessions if session.adapters and not session.holds_adapters]
        wanted = self._of(new)
        for adapter in wanted:
            if adapter.is_attached and not adapter.num_holders:
                self._allocator.share(adapter.pages)  # before any page is taken: or one would go for another
        for adapter in wanted:
            if not adapter.is_attached:
                self._attach(adapter)
        for session in new:
            session.holds_adapters = True
            for adapter in self._of([session]):
                adapter.num_holders += 1

    def release(self, session: Any) -> None:
        """A session has left the cache."""
        if session.holds_adapters:
            session.holds_adapters = False
            for adapter in self._of([session]):
                adapter.num_holders -= 1
                if not adapter.num_holders:
                    self._allocator.free(adapter.pages)

    def to_attach(self, session: Any) -> set[str]:
        """Adapters that must be brought to the device before a session can run."""
        return {adapter.digest for adapter in self._of([session]) if not adapter.is_attached}

    def touch(self, sessions: Iterable[Any]) -> None:
        """These sessions wait: what is idle of their adapters goes last."""
        for adapter in self._of(sessions):
            if adapter.is_attached and not adapter.num_holders:
                self._allocator.share(adapter.pages)
                self._allocator.free(adapter.pages)

    # -- pages --------------------------------------------------------------------------------------------------

    def evicted(self, page: int) -> None:
        """The allocator has taken a page of an adapter that nobody holds: the others are worthless without it."""
        adapter = self._by_page[page]
        self._detach(adapter)
        adapter.pages.remove(page)
        self._discard(adapter)

    def _of(self, sessions: Iterable[Any]) -> list[_Adapter]:
        """The different adapters of these sessions."""
        digests = dict.fromkeys(digest for session in sessions for digest in session.adapters if digest is not None)
        return [self._adapters[digest] for digest in digests]

    def _attach(self, adapter: _Adapter) -> None:
        adapter.pages = self._allocator.allocate(adapter.num_pages)
        adapter.slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._slots[adapter.slot] = adapter
        for page in adapter.pages:
            self._by_page[page] = adapter
            self._allocator.keep(page, self)
        self._changed()
        self.num_attached += 1
        self._move(Attach(digest=adapter.digest, slot=adapter.slot, deltas=adapter.deltas, pages=tuple(adapter.pages)))

    def _detach(self, adapter: _Adapter) -> None:
        self._move(Detach(slot=adapter.slot))
        del self._slots[adapter.slot]
        adapter.slot = NO_SLOT
        for page in adapter.pages:
            del self._by_page[page]
        self._changed()

    def _discard(self, adapter: _Adapter) -> None:
        """Its pages hold nothing that is wanted any more."""
        pages, adapter.pages = adapter.pages, []
        for page in pages:
            self._allocator.discard(page)

    def _changed(self) -> None:
        self.attached = tuple(adapter.digest for adapter in self._slots.values())
