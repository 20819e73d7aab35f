"""Lets one task sleep until something has happened, or for so long; whoever sees it happen rings.

Nothing is remembered: the sleeper looks around before it sleeps, on the same loop, so it misses nothing.
"""

import asyncio


class Alarm:
    """One sleeper's alarm."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self, timeout_s: float) -> None:
        """Sleep until it rings, but no longer than this."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(max(timeout_s, 0.0), self.ring)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def ring(self) -> None:
        """Something has happened."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
