"""Unary calls that peers make to us: whose handler, how many at a time, how often. Whatever carries them.

    carrier ──call(peer, name, data)──► UnaryDesk ──► handler ──► answer, or why not

Limits are per account: the peer, or in a private swarm the member, however many processes it has.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from swarm.network.tasks import TaskSet
from swarm.rates import Rate, Rates

log = logging.getLogger(__name__)

Handler = Callable[[bytes, Any], Awaitable[bytes]]
"""Given the request and the peer's id as hivemind has it."""

MAX_CALLS = 512
"""Handled at once; more are refused."""
MAX_CALLS_PER_ACCOUNT = 64
CALLS = Rate(burst=500, per_s=100)
"""Of one account. A look into the DHT takes a few, a health page that looks everywhere some dozens."""
BYTES = Rate(burst=8 << 20, per_s=64 << 10)
"""Requests of one account: each record to be stored costs a signature check."""
MAX_ERROR_CHARS = 1024


class UnaryDesk:
    """The handlers of a process, and who uses them."""

    def __init__(self, *, rate: Rate = CALLS, bytes_rate: Rate = BYTES) -> None:
        self.handlers: dict[str, Handler] = {}
        self._rates = Rates(rate)
        self._bytes = Rates(bytes_rate)
        self._num_of: Counter[str] = Counter()
        self._tasks = TaskSet()

    @property
    def num_calls(self) -> int:
        """Calls that are being handled."""
        return len(self._tasks)

    def handle(
        self, name: str, data: bytes, *, peer_id: Any, account: str, reply: Callable[[bytes, str], None]
    ) -> asyncio.Task[None] | None:
        """Start to answer a call; `reply(answer, error)` is called once, unless the task is cancelled."""
        handler, now = self.handlers.get(name), asyncio.get_running_loop().time()
        if handler is None:
            reply(b"", "not served here")
        elif len(self._tasks) >= MAX_CALLS or self._num_of[account] >= MAX_CALLS_PER_ACCOUNT:
            reply(b"", f"too many requests: {self._num_of[account]} of yours and {len(self._tasks)} in all are running")
        elif not self._rates.charge(account, now):
            reply(b"", f"too many requests: over {self._rates.rate.per_s:g} per second")
        elif not self._bytes.charge(account, now, len(data)):
            reply(b"", f"too many bytes of requests: over {self._bytes.rate.per_s:g} per second")
        else:
            task = self._tasks.spawn(_handle(handler, name, data, peer_id, reply), name=f"unary {name}")
            self._num_of[account] += 1
            task.add_done_callback(lambda _: self._done(account))
            return task
        return None

    async def close(self) -> None:
        """End the handlers."""
        await self._tasks.close()

    def _done(self, account: str) -> None:
        self._num_of[account] -= 1
        if not self._num_of[account]:
            del self._num_of[account]


async def _handle(handler: Handler, name: str, data: bytes, peer_id: Any, reply: Callable[[bytes, str], None]) -> None:
    try:
        answer = await handler(data, peer_id)
    except Exception as error:  # whatever a request does to its handler is the answer to that request
        log.debug("unary handler %s failed", name, exc_info=True)
        reply(b"", repr(error)[:MAX_ERROR_CHARS])
    else:
        reply(answer, "")
