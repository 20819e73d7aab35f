"""What a server that starts does about a DHT that does not answer: it waits, and says what for.

    patiently(ask) ─► ask ─ PeerTimeout ─► a line for the owner ─► a pause, twice as long each time ─► ask again

Machines that have much to do answer late, and the swarm needs servers most when it is slow. What trying again would
not mend (other content under our model's name, a swarm that does not let us in) ends it at once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from swarm.errors import PeerTimeout

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 30.0
PATIENCE_S = 300.0
"""After so long it ends."""


async def patiently(
    ask: Callable[[], Awaitable[T]],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """What `ask` returns, once the DHT answers.

    Args:
        ask: asks it.
        now: a monotonic clock in seconds.
        sleep: waits for so many seconds.

    Raises:
        PeerTimeout: it did not answer for PATIENCE_S.
    """
    started, pause_s = now(), FIRST_PAUSE_S
    while True:
        try:
            return await ask()
        except PeerTimeout as error:
            if now() + pause_s - started > PATIENCE_S:
                raise PeerTimeout(f"gave up after {now() - started:.0f} s: {error}") from error
            logger.warning("the DHT does not answer yet (%s): trying again in %.0f s", error, pause_s)
        await sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
