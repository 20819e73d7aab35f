"""The pages of one span and the sessions that hold them: shared prefixes, adapters, moves to host memory and back.

    begin(session)    what of its first job is known already: hits         preempt(victims) ─► SwapOut
    remember(row)     a prompt's full pages, for others to find            swap_in(session) ─► SwapIn
    adapters          who needs which, see `server.residency`              grow(session)    ─► CopyPage
A session that has got pages keeps them for a turn, some tokens long, before another may have them, so that moving pages
takes a small part of the time. Who gets pages is decided in `server.admission`; what is decided is executed by
`server.host_pages.carry_out`. Pure.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from swarm.errors import PeerError, SwarmError
from swarm.server.host_pages import CopyPage, HostBudget, Move, SwapIn, SwapOut
from swarm.server.pages import PAGE_SIZE, PageAllocator
from swarm.server.prefix_cache import PrefixCache
from swarm.server.residency import AdapterMeter, Residency
from swarm.server.sequences import CachedSequence, CachedSession, Job, pages_to_grow

MIN_TURN_TOKENS = 32
"""Shortest turn; a session with more tokens has a longer one, since moving it takes longer."""
TURN_PART = 8
"""A turn lasts for one token per so many that the session holds, or that would find room in its adapters' pages."""
RELEASE_WINDOW_S = 30.0
"""Pages freed so long ago count 1/e in the rate at which pages become free."""
UNKNOWN_WAIT_S = 10.0
"""Wait that is expected as long as no page has ever been freed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """Consecutive pages of one row of a job that need no computing: they were known."""

    session: CachedSession
    job: Job
    row: int
    position: int
    outputs: tuple[torch.Tensor | None, ...]
    """Per page, [PAGE_SIZE, hidden] on the host; None where nobody wants them."""


class ReleaseRate:
    """At which rate sessions give pages back, from which a wait is estimated."""

    def __init__(self) -> None:
        self._now = 0.0
        self._pages = 0.0

    def record(self, now: float, num_pages: int) -> None:
        """So many pages became free."""
        self._fade(now)
        self._pages += num_pages

    def expected_s(self, now: float, num_pages: int) -> float:
        """How long until so many are free."""
        self._fade(now)
        return num_pages * RELEASE_WINDOW_S / self._pages if self._pages > 1e-3 else UNKNOWN_WAIT_S

    def _fade(self, now: float) -> None:
        self._pages *= math.exp(min(0.0, self._now - now) / RELEASE_WINDOW_S)
        self._now = max(self._now, now)


class KvMemory:
    """The pages of one span and the sessions that hold them.

    Args:
        allocator: of the pages.
        page_bytes: memory of one page in all blocks of the span.
        host: memory for swapped sessions.
        prefixes: pages that are found by content; None where prefixes can't be shared.
        min_turn_tokens: shortest turn.
        meter: says what adapters take; None where there are none.
        own_bytes: memory of the device for what of adapters does not lie in pages.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_bytes: int,
        host: HostBudget,
        prefixes: PrefixCache | None,
        min_turn_tokens: int = MIN_TURN_TOKENS,
        meter: AdapterMeter | None = None,
        own_bytes: int = 0,
    ):
        self.allocator = allocator
        self.prefixes = prefixes
        self.host = host
        self.moves: list[Move] = []
        """What is to be moved before the next batch runs, in order."""
        self.adapters = Residency(
            allocator, lambda move: self.moves.append(move), meter, own_bytes=own_bytes, relocate=self._relocate
        )
        self.hits: list[Hit] = []
        """What was found in the cache since the last batch."""
        self.failures: list[tuple[CachedSession, SwarmError]] = []
        """Sessions whose job could not begin."""
        self.rate = ReleaseRate()
        self._page_bytes = page_bytes
        self._min_turn_tokens = min_turn_tokens
        self._sessions: dict[CachedSession, None] = {}

    # -- sessions -----------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> Iterable[CachedSession]:
        """All that may hold pages."""
        return self._sessions

    def add(self, session: CachedSession) -> None:
        """This session may want pages from now on."""
        self._sessions[session] = None

    def free(self, session: CachedSession, now: float) -> None:
        """Free all that a session holds."""
        self._sessions.pop(session, None)
        if session.swapped is not None:
            self.host.give_back(session.swapped.num_bytes)
        before = self.allocator.num_free
        session.free()
        self.adapters.release(session)
        self.rate.record(now, self.allocator.num_free - before)
        if self.prefixes is not None:
            self.prefixes.trim()

    def pages_wanted(self, session: CachedSession) -> int:
        """Pages that a session needs for the rest of its first job, and to be back in the cache."""
        if session.swapped is not None:
            return session.swapped.num_pages + -(-session.job.num_left // PAGE_SIZE)
        return sum(pages_to_grow(row, left) for row, left in zip(session.rows, session.job.left, strict=True))

    def grow(self, session: CachedSession, row: int, count: int) -> None:
        """Make room for `count` more tokens of a row, within what `admit` allowed."""
        table = session.rows[row].table
        if copies := table.grow(table.length + count):
            self.moves += [CopyPage(source=source, destination=destination) for source, destination in copies]

    # -- before and after a batch ------------------------------------------------------------------------------

    def begin(self, session: CachedSession, budget: int, room: int) -> bool:
        """Begin the first job and skip what is known already; whether there is something of it left to be run."""
        job = session.job
        try:
            session.start()
        except (RuntimeError, MemoryError) as error:  # no memory for the copies of a recurrent state
            self.failures.append((session, PeerError(f"the step's rows can't be set up: {error}")))
            return False
        if self.prefixes is not None and not job.is_decode:
            self._share_prefix(session, job, room)
        job.allowance = budget
        session.starved_since = None
        return job.num_left > 0

    def _share_prefix(self, session: CachedSession, job: Job, room: int) -> None:
        """Let rows whose next full pages are known take them, but no more than `room` idle ones."""
        for index, row in enumerate(session.rows):
            first = row.table.length
            outputs: list[torch.Tensor | None] = []
            while (found := self._known_page(row, job, index)) is not None:
                page, page_outputs = found
                if not self.allocator.references(page):
                    if not room:
                        break
                    room -= 1
                row.table.adopt([page])
                row.tail = None
                job.take(index, PAGE_SIZE)
                outputs.append(page_outputs)
            if outputs:
                self.hits.append(Hit(session=session, job=job, row=index, position=first, outputs=tuple(outputs)))

    def _known_page(self, row: CachedSequence, job: Job, index: int) -> tuple[int, torch.Tensor | None] | None:
        number, rest = divmod(row.table.length, PAGE_SIZE)
        if rest or row.keys is None or number >= len(row.keys) or job.left[index] < PAGE_SIZE:
            return None
        assert self.prefixes is not None
        is_wanted = job.work.outputs_from[index] < row.table.length + PAGE_SIZE
        return self.prefixes.find(row.keys[number], with_outputs=is_wanted)

    def remember(self, row: CachedSequence, position: int, count: int, outputs: torch.Tensor | None) -> None:
        """Tokens [position, position + count) of a row were run; let others find the pages that they filled.

        Args:
            outputs: theirs [count, hidden] on the host; None where they were not wanted.
        """
        keys, first = row.keys, position // PAGE_SIZE
        if self.prefixes is None or keys is None or first >= len(keys):
            row.tail = None
            return
        if outputs is not None and position % PAGE_SIZE:
            has_rest = row.tail is not None and len(row.tail) == position % PAGE_SIZE
            outputs = torch.cat([row.tail, outputs]) if row.tail is not None and has_rest else None
        last = (position + count) // PAGE_SIZE
        for number in range(first, min(last, len(keys))):
            start = (number - first) * PAGE_SIZE
            own = None if outputs is None else outputs[start : start + PAGE_SIZE].clone()
            self.prefixes.insert(keys[number], row.table.pages[number], own)
        rest = None if outputs is None else outputs[(last - first) * PAGE_SIZE :]
        row.tail = rest.clone() if rest is not None and len(rest) else None

    # -- preemption ---------------------------------------------------------------------------------------------

    def is_in_turn(self, session: CachedSession) -> bool:
        """Whether its pages are its own for some tokens more."""
        size = session.num_tokens + PAGE_SIZE * self.adapters.num_pages(session)
        turn = max(self._min_turn_tokens, size // TURN_PART)
        return session.has_pages and session.starved_since is None and session.turn_tokens < turn

    def swap_in(self, session: CachedSession) -> None:
        """Give a session its pages back."""
        swapped = session.swapped
        assert swapped is not None
        pages = session.swap_in(self.allocator)
        self.host.give_back(swapped.num_bytes)
        self.moves.append(SwapIn(session=session, swapped=swapped, pages=tuple(pages)))

    def preempt(self, session: CachedSession, victims: Iterable[CachedSession], *, target: int, least: int) -> None:
        """Swap out victims until `target` pages are free for a session; none if not even `least` would be.

        A session that comes back itself makes room for them: two can change places when host memory is full.
        """
        chosen: list[tuple[CachedSession, int]] = []
        gone: Counter[str] = Counter()
        expected, num_bytes = self.allocator.num_free, 0 if session.swapped is None else -session.swapped.num_bytes
        for victim in victims:
            if expected >= target:
                break
            own = victim.num_own_pages(self.allocator) + self.adapters.pages_released(victim, gone, session)
            size = self._num_bytes(victim)
            if own and self.host.has_room(num_bytes + size):
                chosen.append((victim, size))
                if victim.holds_adapters:
                    gone.update({digest for digest in victim.adapters if digest is not None})
                expected += own
                num_bytes += size
        if expected < least:
            return
        for victim, size in chosen:
            self.host.take(size)
            pages = victim.swap_out(size)
            self.adapters.release(victim)
            assert victim.swapped is not None
            self.moves.append(SwapOut(session=victim, swapped=victim.swapped, pages=tuple(pages)))

    def _relocate(self, moved: Sequence[tuple[int, int]]) -> None:
        """Pages of sequences, (old, new), have made room for something that needs a run."""
        self.moves += [CopyPage(source=old, destination=new) for old, new in moved]
        places = dict(moved)
        for session in self._sessions:
            for row in session.rows:
                row.table.relocate(places)

    def _num_bytes(self, session: CachedSession) -> int:
        states: int = sum(row.state.num_bytes for row in session.rows if row.state is not None)
        return int(len(session.pages()) * self._page_bytes * session.share) + states
