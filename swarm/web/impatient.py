"""HTTP/1.1 that does not wait for ever: uvicorn's, with deadlines and limits that strangers can't exceed.

    uvicorn.Config(http=ImpatientProtocol, h11_max_incomplete_event_size=MAX_HEAD_BYTES, ...)

uvicorn lets a client take as long as it likes for a request's head, and to read its answers, so connections that say a
byte now and then or read nothing could fill a server. How long a body may take is the application's business.

uvicorn also logs a traceback for each answer that it cancels itself when it stops; importing this module ends that.
"""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_SOCKETS = 512
"""Those beyond uvicorn's `limit_concurrency` are told 503, those beyond this nothing at all."""
MAX_HEAD_BYTES = 16384
HEAD_TIMEOUT_S = 10.0
"""For the head of a request, from the connection or its first byte on."""
READ_TIMEOUT_S = 30.0
"""How long a client may leave everything unread that waits for it, what is left over when we hang up included."""


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


logging.getLogger("uvicorn.error").addFilter(_is_news)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 whose clients must send a request's head in time, and read its answer."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any byte that the client doesn't take starts the clock
        if len(self.connections) > MAX_SOCKETS:
            transport.abort()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._is_read()
        super().connection_lost(exc)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._hang_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self.transport.close()
