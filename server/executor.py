"""The device thread: the only one that touches the device, the cache and the scheduler.

    loop thread                                   device thread
    open/submit/close ──commands (queue)──►  schedule ─► move ─► run ─► finish
    SessionListener   ◄──call_soon_threadsafe, once per batch──────────────┘

It knows nothing of messages on the wire or of peers. Errors of one batch fail the sessions of that batch; the thread
lives on. Should it die all the same, every open session is told so and `died` is set, for the server to leave.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TypeVar, cast

import torch

from swarm.adapters.delta import BlockDelta
from swarm.errors import PeerBusy, PeerError, SwarmError
from swarm.server.adapter_store import ADAPTER_BYTES
from swarm.server.blocks.parcel import Layout
from swarm.server.blocks.span import BlockSpan
from swarm.server.cache_image import CacheImage, put_image, take_image
from swarm.server.chooser import BatchRow
from swarm.server.host_pages import HOST_BYTES, HostBudget, carry_out
from swarm.server.memory import KvMemory
from swarm.server.meters import BatchMeter
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.prefix_cache import PrefixCache
from swarm.server.scheduler import TOKEN_BUDGET, Batch, Failed, Notice, Scheduler, Waits
from swarm.server.sequences import CachedSequence, CachedSession
from swarm.server.trainer import KEPT_BYTES, Trainer
from swarm.server.work import Produced, SessionListener, Work
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

T = TypeVar("T")
STOP_TIMEOUT_S = 2.0
"""How long stopping waits for the batch that runs now."""


class Executor:
    """Runs the work of all sessions on one span of blocks.

    Args:
        span: the loaded blocks.
        loop: the event loop on which listeners are called.
        token_budget: most tokens in one batch.
        host_bytes: memory for sessions that were swapped out.
        kept_bytes: memory for what training keeps between forward and backward.
        adapter_bytes: memory of the device for what of adapters does not lie in pages of the cache.
        died: is set when the device thread has failed.
    """

    def __init__(
        self,
        span: BlockSpan,
        loop: asyncio.AbstractEventLoop,
        *,
        token_budget: int = TOKEN_BUDGET,
        host_bytes: int = HOST_BYTES,
        kept_bytes: int = KEPT_BYTES,
        adapter_bytes: int = ADAPTER_BYTES,
        died: asyncio.Event | None = None,
    ):
        self.span = span
        self.meter = BatchMeter()
        self._loop = loop
        self._allocator = PageAllocator(span.num_pages)
        self._prefixes = PrefixCache(self._allocator) if span.shares_prefixes else None
        self._memory = KvMemory(
            self._allocator,
            page_bytes=span.page_bytes,
            host=HostBudget(host_bytes),
            prefixes=self._prefixes,
            meter=span,
            own_bytes=adapter_bytes,
        )
        self._scheduler = Scheduler(self._memory, token_budget=token_budget)
        self.trainer = Trainer(span, loop.call_soon_threadsafe, kept_bytes=kept_bytes)
        """Training beside the sessions; only functions given to `train` may call it."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sessions: set[CachedSession] = set()
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._ending: SwarmError | None = None
        self.died = died or asyncio.Event()
        """Set when the device thread has failed; nothing can run any more."""

    # -- called from the loop thread ----------------------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Tokens that still fit into the cache (a snapshot)."""
        return self._allocator.num_free * PAGE_SIZE

    @property
    def total_tokens(self) -> int:
        """Tokens that the cache holds in all."""
        return self._allocator.num_pages * PAGE_SIZE

    @property
    def num_ready(self) -> int:
        """Sessions with work that runs or waits for its turn (a snapshot)."""
        return self._scheduler.num_ready

    @property
    def num_waiting(self) -> int:
        """Sessions whose work waits for room in the cache (a snapshot)."""
        return self._scheduler.num_waiting

    @property
    def attached_adapters(self) -> tuple[str, ...]:
        """Adapters on the device (a snapshot)."""
        return self._memory.adapters.attached

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    async def stop(self) -> None:
        """End the device thread after the batch that runs now, if that is soon; all work fails."""
        self._commands.put(None)
        self._end(PeerBusy("the server is stopping", retry_after_s=60.0))
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)

    def open(
        self,
        blocks: BlockRange,
        batch_size: int,
        *,
        client: str,
        listener: SessionListener,
        adapters: Sequence[str | None] = (),
    ) -> CachedSession:
        """A new session with empty rows.

        Args:
            blocks: which ones it runs through.
            batch_size: its rows.
            client: who is served with it, for fairness.
            listener: is told what becomes of its work, on the loop, until the session is closed.
            adapters: of each row; where there are any, work waits for `adapters_ready`.
        """
        has_adapters = any(adapters)
        session = CachedSession(
            blocks=blocks,
            client=client,
            listener=listener,
            rows=[self._new_row(blocks, adapters[row] if has_adapters else None) for row in range(batch_size)],
            adapters=tuple(adapters) if has_adapters else (),
            share=len(blocks) / len(self.span.blocks),
            held_back=[] if has_adapters else None,
        )
        self._sessions.add(session)
        return session

    def submit(self, session: CachedSession, work: Work) -> None:
        """Queue work; it runs after what the session has queued before. The caller has checked it."""
        session.last_step = work.step_id
        if self._ending is not None:
            self._loop.call_soon(self._tell, session, Failed(step_id=work.step_id, error=self._ending))
        elif session.held_back is not None:
            session.held_back.append(work)
        else:
            now = time.monotonic()
            self._commands.put(lambda: self._submit(session, work, now))

    def adapters_ready(self, session: CachedSession) -> None:
        """The adapters of a session have been added: its work may run."""
        works, session.held_back = session.held_back or [], None
        for work in works:
            self.submit(session, work)

    def drop_queued(self, session: CachedSession) -> None:
        """Forget the work that a session has queued; rows that run now finish."""
        if session.held_back is not None:
            session.held_back = []
        self._commands.put(lambda: self._scheduler.drop_queued(session))

    def add_adapter(self, digest: str, deltas: Mapping[int, BlockDelta], *, client: str) -> None:
        """Rows may use this adapter from now on; it is brought to the device as soon as there is room.

        Args:
            digest: its name.
            deltas: what it does to the blocks of the span.
            client: for whom, which pays for the time that it takes.

        Raises:
            PeerBusy: the device could never hold it.
        """
        needed, num_pages = self.span.adapter_pages(deltas), self._allocator.num_pages
        if needed >= num_pages:
            raise PeerBusy(f"the adapter takes {needed} pages, the server has {num_pages}", retry_after_s=3600.0)
        self._commands.put(lambda: self._memory.adapters.add(digest, deltas, client=client))

    def charge(self, client: str, seconds: float) -> None:
        """An adapter has been taken in for a client, which took so long."""
        self._commands.put(lambda: self._scheduler.worked(client, seconds, time.monotonic()))

    def forget_adapter(self, digest: str) -> None:
        """No row uses this adapter any more; its tensors may go."""
        self._commands.put(lambda: self._memory.adapters.forget(digest))

    def close(self, session: CachedSession) -> None:
        """Forget a session, its work and what it holds; its listener hears nothing more."""
        session.is_closed = True
        self._sessions.discard(session)
        self._commands.put(lambda: self._scheduler.close(session, time.monotonic()))

    def train(self, command: Callable[[Trainer], None]) -> None:
        """Let the device thread call this with the trainer."""
        self._commands.put(lambda: command(self.trainer))

    async def pages_in_use(self) -> int:
        """Pages held by sessions, after all commands given so far."""
        return await self._ask(lambda: self._allocator.num_used)

    # -- sessions that come from another server, or go to one ---------------------------------------------------

    async def layout(self, blocks: BlockRange) -> Layout:
        """How what sessions have in these blocks travels.

        Raises:
            PeerBusy: the cache is full, and what its recurrent states look like is not known yet.
        """
        return await self._ask(lambda: self._layout(blocks))

    async def take_image(self, session: CachedSession) -> CacheImage:
        """What a session without work has in the cache, which it keeps.

        Raises:
            SwarmError: it has work, or has failed.
        """
        return await self._ask(lambda: self._charged(session, lambda: take_image(session, self.span)))

    async def put_image(self, session: CachedSession, image: CacheImage) -> None:
        """Let a session that did nothing yet go on from an image.

        Raises:
            SwarmError: there is no room, or the session has had work.
        """
        if session.is_closed or session.held_back:
            raise PeerBusy("the session is over" if session.is_closed else "the session has work")
        await self._ask(lambda: self._charged(session, lambda: put_image(session, image, self.span, self._memory.host)))

    def _charged(self, session: CachedSession, command: Callable[[], T]) -> T:
        """Do this, and charge the session's client for the time that it takes."""
        started = time.monotonic()
        try:
            return command()
        finally:
            self._scheduler.used(session.client, time.monotonic() - started)

    def _layout(self, blocks: BlockRange) -> Layout:
        if self.span.stateful:
            (page,) = self._allocator.allocate(1)
            try:
                self.span.learn_state(page)
            finally:
                self._allocator.free([page])
        return self.span.layout(blocks)

    async def _ask(self, command: Callable[[], T]) -> T:
        """Let the device thread call this, after all commands given so far.

        Raises:
            SwarmError: as raised, or in place of what else was raised.
        """
        if self._ending is not None:
            raise self._ending
        future: asyncio.Future[T] = self._loop.create_future()

        def answer(result: T | None, error: SwarmError | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast("T", result))

        def run() -> None:
            result: T | None = None
            failure: SwarmError | None = None
            try:
                result = command()
            except SwarmError as error:
                failure = error
            except (RuntimeError, MemoryError, ValueError) as error:
                logger.exception("a command failed")
                failure = PeerError(f"the device refused: {type(error).__name__}")
            self._loop.call_soon_threadsafe(answer, result, failure)

        self._commands.put(run)
        return await future

    def _new_row(self, blocks: BlockRange, adapter: str | None) -> CachedSequence:
        keys = None if self._prefixes is None else self._prefixes.keys(blocks.start, blocks.end, adapter or "")
        return CachedSequence(table=PageTable(self._allocator), state=self.span.new_state(), keys=keys)

    def _deliver(self, notices: list[Notice]) -> None:
        for session, notice in notices[1:]:
            self._loop.call_soon(self._tell, session, notice)  # one by one: a listener that raises harms no other
        if notices:
            self._tell(*notices[0])

    def _tell(self, session: CachedSession, notice: Produced | Failed | Waits) -> None:
        if session.is_closed:
            return
        if isinstance(notice, Produced):
            session.listener.produced(notice)
        elif isinstance(notice, Failed):
            session.listener.failed(notice.step_id, notice.error)
        else:
            session.listener.waiting(notice.step_id, notice.expected_s)

    def _end(self, error: SwarmError) -> None:
        """Nothing will run any more."""
        self._ending = error
        self._deliver([(session, Failed(step_id=session.last_step, error=error)) for session in self._sessions])

    def _die(self) -> None:
        self.died.set()
        self._end(PeerError("the device thread of the server failed"))

    # -- device thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._read_commands():
                batch = self._scheduler.schedule(time.monotonic())
                self.meter.scheduled(batch)
                self._notify(batch.notices)
                if batch.rows or batch.moves:
                    self._notify(self._run(batch))
                    self.trainer.inference_at = time.monotonic()
                if self.trainer.wait_s(time.monotonic()) == 0:
                    self.trainer.advance()
        except Exception:  # the outermost loop of this thread
            logger.exception("the device thread failed")
            self._loop.call_soon_threadsafe(self._die)

    def _run(self, batch: Batch) -> list[Notice]:
        notices: list[Notice] = []
        try:
            began = time.monotonic()
            if failures := carry_out(batch.moves, self.span):
                notices = self._scheduler.drop_adapters(batch, failures)
            started = time.monotonic()
            self._scheduler.moved(batch, started - began, started)
            outputs = to_host(batch.rows, self.span.run(batch.chunks)) if batch.rows else []
        except SwarmError as error:
            return notices + self._fail(batch, error)
        except Exception:
            logger.exception("a batch of %d rows failed", len(batch.rows))
            return notices + self._fail(batch, PeerError("the blocks failed on this batch"))
        now = time.monotonic()
        self.meter.ran(batch, now - started)
        return notices + self._scheduler.finish(batch, outputs, now - started, now)

    def _fail(self, batch: Batch, error: SwarmError) -> list[Notice]:
        self.meter.failed()
        return self._scheduler.fail(batch, error)

    def _notify(self, notices: list[Notice]) -> None:
        if notices:
            self._loop.call_soon_threadsafe(self._deliver, notices)

    def _submit(self, session: CachedSession, work: Work, now: float) -> None:
        refusal = self._scheduler.submit(session, work, now)
        if refusal is not None:
            self._notify([refusal])

    def _read_commands(self) -> bool:
        """Carry out what the loop asked for, until it is time for a batch; false when it is time to end."""
        until = -inf
        while True:
            timeout_s = until - time.monotonic()
            try:
                command = self._commands.get(timeout_s > 0, timeout_s if timeout_s < inf else None)
            except queue.Empty:
                now = time.monotonic()
                until = self._scheduler.wait_until(now)
                if not self._scheduler.can_progress:  # else training would keep a batch waiting
                    until = min(until, now + self.trainer.wait_s(now))
                if until <= now:
                    return True
                continue
            if command is None:
                return False
            command()
            until = -inf  # there may be more


def to_host(rows: Sequence[BatchRow], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The wanted outputs of each row on the host, each in memory of its own; None where none are wanted."""
    wanted = [output[row.skip :] if row.skip < len(output) else None for row, output in zip(rows, outputs, strict=True)]
    present = [piece for piece in wanted if piece is not None]
    if present and present[0].is_cuda:  # one copy for all
        joined = (torch.cat(present) if len(present) > 1 else present[0]).cpu()
        present = list(joined.split([len(piece) for piece in present]))
    own = iter([piece.clone() if piece.nbytes < piece.untyped_storage().nbytes() else piece for piece in present])
    return [None if piece is None else next(own) for piece in wanted]
