"""The device thread: the only one that touches the device, the cache and the scheduler.

    loop thread                                   device thread
    open/submit/close ──commands (queue)──►  schedule ─► run ─► finish
    await future      ◄──call_soon_threadsafe──┘

It knows nothing of messages on the wire or of peers. Errors of one batch fail the jobs of that batch; the thread lives
on. Should it die all the same, every waiting step fails and `died` is set, for the server to leave.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from swarm.errors import PeerBusy, PeerError, SwarmError
from swarm.protocol import Step
from swarm.server.blocks.span import BlockSpan
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.scheduler import Batch, CachedSequence, CachedSession, Job, Scheduler
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 2.0
"""How long stopping waits for the batch that runs now."""


class Executor:
    """Runs the steps of all sessions on one span of blocks.

    Args:
        span: the loaded blocks.
        loop: the event loop on which futures are resolved.
        token_budget: most tokens in one batch; None takes the scheduler's default.
    """

    def __init__(self, span: BlockSpan, loop: asyncio.AbstractEventLoop, *, token_budget: int | None = None):
        self.span = span
        self._loop = loop
        self._allocator = PageAllocator(span.num_pages)
        self._scheduler = Scheduler(self._allocator, **({} if token_budget is None else {"token_budget": token_budget}))
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: dict[int, asyncio.Future[Job]] = {}
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._stopping = False
        self.died = asyncio.Event()
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
    def queue_length(self) -> int:
        """Steps that wait or run (a snapshot)."""
        return self._scheduler.num_jobs

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    async def stop(self) -> None:
        """End the device thread after the batch that runs now, if that is soon; waiting steps fail."""
        self._stopping = True
        self._commands.put(None)
        self._fail_all(PeerBusy("the server is stopping", retry_after_s=60.0))
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)

    def open(self, blocks: BlockRange, batch_size: int) -> CachedSession:
        """A new session with empty rows."""
        rows = [
            CachedSequence(table=PageTable(self._allocator), state=self.span.new_state()) for _ in range(batch_size)
        ]
        return CachedSession(blocks=blocks, rows=rows)

    async def run(self, session: CachedSession, step: Step, hidden_states: torch.Tensor) -> Job:
        """Run one step and return its finished job.

        Args:
            session: one from `open`, with no other step under way.
            step: checked against the session by the caller.
            hidden_states: [sum(step.num_tokens), hidden] on the host.

        Raises:
            PeerBusy: the cache stayed full for PAGE_WAIT_S, or the server is stopping.
            PeerError: the blocks failed on this batch.
        """
        if self._stopping:
            raise PeerBusy("the server is stopping", retry_after_s=60.0)
        job = Job(session=session, step=step, hidden_states=hidden_states, arrived=time.monotonic())
        future: asyncio.Future[Job] = self._loop.create_future()
        self._futures[id(job)] = future
        self._commands.put(lambda: self._scheduler.submit(job))
        try:
            return await future
        finally:
            self._futures.pop(id(job), None)

    def close(self, session: CachedSession) -> None:
        """Free a session's pages and drop its waiting steps."""
        self._commands.put(lambda: self._scheduler.cancel(session))

    async def pages_in_use(self) -> int:
        """Pages held by sessions, after all commands given so far."""
        future: asyncio.Future[int] = self._loop.create_future()

        def report() -> None:
            self._loop.call_soon_threadsafe(future.set_result, self._allocator.num_used)

        self._commands.put(report)
        return await future

    # -- device thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._read_commands():
                batch = self._scheduler.schedule(time.monotonic())
                self._refuse(batch)
                if batch.rows:
                    self._run(batch)
        except Exception:  # the outermost loop of this thread
            logger.exception("the device thread failed")
            self._loop.call_soon_threadsafe(self._die)

    def _read_commands(self) -> bool:
        """Carry out what the loop asked for, waiting for the first command when there is nothing to run."""
        block, timeout = self._patience()
        while True:
            try:
                command = self._commands.get(block, timeout)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _patience(self) -> tuple[bool, float | None]:
        """Whether to wait for a command, and how long: a job without pages is looked at again when one may be free."""
        deadline = self._scheduler.next_deadline()
        if deadline is None:
            return True, None
        if self._scheduler.can_progress:
            return False, None
        return True, max(0.0, deadline - time.monotonic())

    def _run(self, batch: Batch) -> None:
        started = time.monotonic()
        try:
            if batch.copies:
                self.span.copy_pages(batch.copies)
            outputs = self.span.run(batch.chunks)
        except SwarmError as error:
            self._fail(batch, error)
        except Exception:
            logger.exception("a batch of %d rows failed", len(batch.rows))
            self._fail(batch, PeerError("the blocks failed on this batch"))
        else:
            done = self._scheduler.finish(batch, outputs, time.monotonic() - started)
            for job in done:
                self._resolve(job, None)

    def _die(self) -> None:
        """On the loop: nothing will run any more."""
        self._stopping = True
        self.died.set()
        self._fail_all(PeerError("the device thread of the server failed"))

    def _fail_all(self, error: SwarmError) -> None:
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)

    def _fail(self, batch: Batch, error: SwarmError) -> None:
        for job in {id(row.job): row.job for row in batch.rows}.values():
            self._scheduler.drop(job)
            self._resolve(job, error)

    def _refuse(self, batch: Batch) -> None:
        for job, error in batch.refused:
            self._resolve(job, error)

    def _resolve(self, job: Job, error: SwarmError | None) -> None:
        def resolve() -> None:
            future = self._futures.get(id(job))
            if future is not None and not future.done():
                future.set_exception(error) if error is not None else future.set_result(job)

        self._loop.call_soon_threadsafe(resolve)
