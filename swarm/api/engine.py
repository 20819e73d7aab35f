"""Runs the jobs of one request at a time in threads, and hands their pieces to the event loop.

    serve(jobs, account) ─ a turn (admission) ─ a client of the swarm (identities) ─► a thread per job: Generation.run
         Running.pieces ◄────────────────── call_soon_threadsafe ◄── Piece ──────────┘

Leaving `serve` early (the HTTP client is gone, an error) cancels what still runs and waits for it, so that a turn is
given away only when its rows are free. Requests share the swarm's batches on the servers, and the head's product here
(`swarm.client.sharing`); so a thread per job is all there is to do.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from swarm.api.admission import Admission
from swarm.api.generation import Generation, Job, Piece, RouteHop
from swarm.client.cache import BlockService
from swarm.errors import SwarmError

logger = logging.getLogger(__name__)

NUM_CLOSERS = 4
"""Threads that cancel; not those of everybody, which may be busy with long prompts."""
ServiceOf = Callable[[str], AbstractAsyncContextManager[BlockService]]
"""The remote blocks as the client of an account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPiece:
    """A piece, and which job of the request it belongs to."""

    job: int
    piece: Piece


class Engine:
    """Everything that generates in this process.

    Args:
        admission: who may generate.
        service_of: whose client of the swarm does it.
    """

    def __init__(self, admission: Admission, service_of: ServiceOf):
        self._admission, self._service_of = admission, service_of
        self._threads = ThreadPoolExecutor(admission.queue.max_rows, thread_name_prefix="generate")
        self._closers = ThreadPoolExecutor(NUM_CLOSERS, thread_name_prefix="cancel")

    @asynccontextmanager
    async def serve(self, jobs: Sequence[Job], account: str) -> AsyncIterator["Running"]:
        """Generate all jobs at once, as soon as it is this account's turn.

        Raises:
            ApiError: too much at once.
            SwarmError: the swarm can't be joined.
        """
        rows = sum(job.rows for job in jobs)
        async with self._admission.hold(account, rows), self._service_of(account) as service:
            running = Running(jobs, service, self._threads, self._closers)
            try:
                yield running
            finally:
                await running.end()

    def close(self) -> None:
        """Let the threads end, once nothing runs; the closers stay, for requests that are being cancelled just now."""
        self._threads.shutdown(wait=False)


class Running:
    """The jobs of one request, in threads.

    Args:
        jobs: at least one.
        service: the remote blocks.
        threads: with a free thread for each.
        closers: threads to cancel in.
    """

    def __init__(
        self, jobs: Sequence[Job], service: BlockService, threads: ThreadPoolExecutor, closers: ThreadPoolExecutor
    ):
        self._loop = asyncio.get_running_loop()
        self._closers = closers
        self._news: asyncio.Queue[JobPiece | None] = asyncio.Queue()
        """None: a thread has ended."""
        self._generations = [Generation(job, service, self._emitter(index)) for index, job in enumerate(jobs)]
        self._threads = [self._loop.run_in_executor(threads, it.run) for it in self._generations]
        for thread in self._threads:
            thread.add_done_callback(lambda _: self._news.put_nowait(None))

    @property
    def prompt_tokens(self) -> int:
        """Of all jobs."""
        return sum(len(it.job.prompt) for it in self._generations)

    @property
    def completion_tokens(self) -> int:
        """Generated so far, the marks that end answers included."""
        return sum(it.num_tokens for it in self._generations)

    @property
    def route(self) -> tuple[RouteHop, ...]:
        """The servers that the first job went through; known at the end."""
        return self._generations[0].route

    async def pieces(self) -> AsyncIterator[JobPiece]:
        """What comes, in order, until all jobs are done.

        Raises:
            SwarmError: a job failed.
        """
        num_ended = 0
        while num_ended < len(self._threads):
            news = await self._news.get()
            if news is not None:
                yield news
                continue
            num_ended += 1
            for thread in self._threads:
                if thread.done():
                    thread.result()

    async def end(self) -> None:
        """Cancel what still runs, and wait until its threads are free; a second cancellation doesn't hurry it."""
        unfinished = [it for it, thread in zip(self._generations, self._threads, strict=True) if not thread.done()]
        closing = [self._loop.run_in_executor(self._closers, _cancel, generation) for generation in unfinished]
        pending: set[asyncio.Future[None]] = {*closing, *(thread for thread in self._threads if not thread.done())}
        was_cancelled = False
        while pending:
            try:
                _, pending = await asyncio.wait(pending)
            except asyncio.CancelledError:
                was_cancelled = True
        for thread in self._threads:
            thread.exception()  # whoever waited for pieces has had it
        if was_cancelled:
            raise asyncio.CancelledError

    def _emitter(self, job: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._news.put_nowait, JobPiece(job=job, piece=piece))

        return emit


def _cancel(generation: Generation) -> None:
    try:
        generation.cancel()
    except (SwarmError, TimeoutError) as error:
        logger.warning("a session did not close: %s", error)
