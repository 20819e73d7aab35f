"""An HTTP answer that is generated while it is sent, as one object or as server-sent events.

    Engine.serve ─JobPiece─► Form ─► "data: {...}\\n\\n" ... "data: [DONE]\\n\\n"   |   {...}

The status is sent with the first piece, so that whatever fails before has a status of its own. When the client hangs
up, the work is cancelled, and the answer ends when its threads have.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from swarm.api.engine import Engine, JobPiece, Running
from swarm.api.errors import as_api_error
from swarm.api.generation import Job
from swarm.api.replies import Form, Reply, Usage, Whole, usage
from swarm.errors import SwarmError

_encoder = msgspec.json.Encoder()
_DONE = b"data: [DONE]\n\n"


class GeneratedResponse(Response):
    """Generates when it is called.

    Args:
        engine: runs the jobs.
        jobs: one per prompt.
        account: who asks.
        form: how answers are written.
        stream: events as they come, or all at once.
        include_usage: whether a stream ends with counts.
        send_timeout_s: for the client to take a chunk.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        account: str,
        form: Form,
        *,
        stream: bool,
        include_usage: bool,
        send_timeout_s: float,
    ):
        super().__init__(media_type="text/event-stream" if stream else "application/json")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache" if stream else "no-store"
        self.headers["x-accel-buffering"] = "no"
        self._engine, self._jobs, self._account, self._form = engine, jobs, account, form
        self._stream, self._include_usage, self._send_timeout_s = stream, include_usage, send_timeout_s
        self._is_answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client hangs up."""
        work = asyncio.ensure_future(self._answer(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not self._is_answered:  # or else it is gone because it has its answer
                work.cancel()
            await asyncio.wait({work})
        if not work.cancelled():
            _raise_unless_gone(work.exception())

    async def _answer(self, send: Send) -> None:
        async with self._engine.serve(self._jobs, self._account) as running:
            if self._stream:
                await self._send_events(running, send)
            else:
                await self._send_whole(running, send)

    async def _send_whole(self, running: Running, send: Send) -> None:
        answers = [Whole() for job in self._jobs for _ in range(job.rows)]
        async for news in running.pieces():
            answers[self._index(news)].add(news.piece)
        body = _encoder.encode(self._form.whole(answers, _usage(running), running.route))
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await self._send(send, body, more=False)

    async def _send_events(self, running: Running, send: Send) -> None:
        """Events of all answers; a failure after the first one is an event, too."""
        pieces = running.pieces()
        first = await anext(pieces)
        await self._start(send)
        try:
            async for event in self._events(first, pieces):
                await self._send(send, event)
            if self._include_usage:
                await self._send(send, _event(self._form.counts(_usage(running), running.route)))
            await self._send(send, _DONE, more=False)
        except SwarmError as error:
            failure = _encoder.encode({"error": as_api_error(error).details})
            await self._send(send, b"data: " + failure + b"\n\n", more=False)

    async def _events(self, first: JobPiece, rest: AsyncIterator[JobPiece]) -> AsyncIterator[bytes]:
        started: set[int] = set()
        news: JobPiece | None = first
        while news is not None:
            index = self._index(news)
            start = self._form.start(index) if index not in started else None
            started.add(index)
            chunk = _event(self._form.chunk(index, news.piece))
            yield chunk if start is None else _event(start) + chunk
            news = await anext(rest, None)

    def _index(self, news: JobPiece) -> int:
        return sum(job.rows for job in self._jobs[: news.job]) + news.piece.row

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body.

        Raises:
            ClientDisconnect: the client doesn't take it.
        """
        self._is_answered = not more
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise ClientDisconnect from error


def _raise_unless_gone(error: BaseException | None) -> None:
    if error is not None and not isinstance(error, ClientDisconnect):
        raise error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(reply: Reply) -> bytes:
    return b"data: " + _encoder.encode(reply) + b"\n\n"


def _usage(running: Running) -> Usage:
    return usage(running.prompt_tokens, running.completion_tokens)
