"""What one session does about moving: asks its client to, gives itself to another server, or becomes what comes.

    ask ─► MoveAway ~~► client ~~HandOver~~► hand_over ─► MoveDesk.give ─► HandedOver ~~► client, which then leaves
     ▲                         └~~HandOver to nobody~~► has_nowhere
     └── urge, as long as the server drains ───────────────┘
    receive ─► MoveDesk.take ─► StateTaken ~~► client

It knows what the session may do; how one travels is `server.moving`'s.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf

from swarm.errors import InvalidRequest, PeerDisconnected, SwarmError
from swarm.protocol import HandedOver, HandOver, MoveAway
from swarm.server.control import Control
from swarm.server.limits import HandlerLimits
from swarm.server.moving import Movable, MoveDesk
from swarm.server.push import PushStream, for_the_client
from swarm.server.relief import RETRY_S, SETTLE_S

logger = logging.getLogger(__name__)

FIRST_URGE_S = 2.0
"""A session whose client found nobody while the server drains is asked again so long after the last time; then after
twice as long each time, up to RETRY_S. Clients put up with that: `swarm.client.moves.MAX_ASKED`, `ASKED_PER_S`."""
PROMISE_S = 10.0
"""So long pages are kept for a session that has come and takes no step: a client could keep all others out by that."""


class SessionMoves:
    """The moves of one session.

    Args:
        session: that moves.
        desk: moves it.
        client: who pays.
        control: tells the client.
        limits: how long a client may stay that was handed over.
        on_end: ends the session.
    """

    def __init__(
        self,
        session: Movable,
        desk: MoveDesk,
        *,
        client: str,
        control: Control,
        limits: HandlerLimits,
        on_end: Callable[[], None],
    ):
        self.is_gone = False
        """Whether another server has the session."""
        self.has_nowhere = False
        """Whether the client knows nobody who would take it."""
        self.stays_until = -inf
        """Before, by the monotonic clock, it is not asked to make room: it has come, or was asked, lately."""
        self._session, self._desk, self._client, self._control = session, desk, client, control
        self._limits, self._on_end = limits, on_end
        self._leaving: asyncio.Task[None] | None = None
        self._arriving: PushStream | None = None
        """Brings the session that this one becomes."""
        self._urges_at, self._pause_s = -inf, FIRST_URGE_S
        self._promised_pages = 0
        self._timer: asyncio.TimerHandle | None = None
        """Ends a session that has gone, or what was promised to one that has come."""
        self._has_arrived = False

    def ask(self, within_s: float) -> None:
        """Ask the client to have the session moved; nothing more is asked of one that has moved."""
        if not self.is_gone:
            self.has_nowhere, self.stays_until = False, time.monotonic() + SETTLE_S
            self._control.tell(MoveAway(within_s=min(max(within_s, 0.0), 86400.0)))

    def urge(self, within_s: float) -> None:
        """Ask, and when this is called again, ask again if the client has found nobody and that is a while ago."""
        now, is_first = time.monotonic(), self._urges_at == -inf
        if is_first or (self.has_nowhere and now >= self._urges_at):
            self._urges_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, RETRY_S)
            self.ask(within_s)

    def hand_over(self, message: HandOver, group: asyncio.TaskGroup) -> None:
        """The client says to whom the session goes."""
        if not message.peer_id:
            self.has_nowhere, self.stays_until = True, time.monotonic() + RETRY_S
        elif self._leaving is not None or self._arriving is not None or self.is_gone:
            self._answer(message, "the session is on its way already")
        else:
            self._leaving = group.create_task(self._leave(message))

    async def _leave(self, message: HandOver) -> None:
        try:
            await self._desk.give(self._session, message, self._client)
        except SwarmError as error:
            logger.info("can't give a session to %s: %s", message.peer_id, error)
            self._session.thaw()
            self._answer(message, for_the_client(error))
        else:
            self.is_gone = True
            self.use_room()
            self._answer(message)
            if self._timer is not None:
                self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._limits.gone_timeout_s, self._on_end)
        finally:
            self._leaving = None

    def _answer(self, message: HandOver, why_not: str = "") -> None:
        self._control.tell(HandedOver(nonce=message.nonce, is_done=not why_not, text=why_not[:1024]))

    async def receive(self, stream: PushStream) -> None:
        """Become the session that comes on this stream; the client is told when it has come.

        Raises:
            SwarmError: why not; the session is as it was then.
        """
        is_begun = self._has_arrived or self._session.taken.step_id >= 0
        if is_begun or self._leaving is not None or self._arriving is not None:
            raise InvalidRequest("the session has begun: it can't become another one")
        self._arriving = stream
        try:
            self._promised_pages = await self._desk.take(self._session, stream, self._client)
        finally:
            self._arriving = None
        self._has_arrived = True
        self._timer = asyncio.get_running_loop().call_later(PROMISE_S, self.use_room)
        self.stays_until = time.monotonic() + SETTLE_S
        self._control.tell(self._session.taken)

    def use_room(self) -> None:
        """The session has work, or has been idle: it gets pages like any other, and none are kept for it."""
        if self._promised_pages:
            self._desk.release(self._promised_pages)
            self._promised_pages = 0

    async def close(self) -> None:
        """The session is over."""
        self.use_room()
        if self._timer is not None:
            self._timer.cancel()
        if self._arriving is not None:
            await self._arriving.abort(PeerDisconnected("the session has ended"))
