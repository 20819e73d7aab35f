"""Whether one session wants more work now, and when it is stalled for good.

    SessionWork: tokens to be run ────────────────────┐
    Sender: outputs that nobody takes ─ if it matters ┴─► has_room          no receiver, no memory: stalled, then ended

Outputs that nobody takes (the next server is lost, or not named yet) are kept anyway, as history; they hold the session
up only when they fill the memory for it. Knows no steps: what waits for room is `server.step_queue`'s.
"""

import asyncio
from collections.abc import Callable

from swarm.errors import PeerBusy, SwarmError
from swarm.server.history import HistoryBudget
from swarm.server.sender import Sender
from swarm.server.session_work import SessionWork


class SessionRoom:
    """See the module.

    Args:
        work: of the session.
        sender: of the session.
        budget: memory for histories, shared by all sessions.
        max_tokens: no more work is wanted while there is so much.
        patience_s: how long a stalled session lives.
        on_stalled: ends it.
    """

    def __init__(
        self,
        work: SessionWork,
        sender: Sender,
        budget: HistoryBudget,
        *,
        max_tokens: int,
        patience_s: float,
        on_stalled: Callable[[SwarmError], None],
    ):
        self.is_frozen = False
        """A session that moves takes nothing more."""
        self._work, self._sender, self._budget = work, sender, budget
        self._max_tokens, self._patience_s, self._on_stalled = max_tokens, patience_s, on_stalled
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_room(self) -> bool:
        """Whether more work is wanted now: not while outputs wait for a receiver that does not keep up."""
        if self.is_frozen:
            return False
        num_tokens = self._work.num_tokens
        if self._sender.is_blocked or self._budget.is_full:
            num_tokens += self._sender.link.num_unsent
        return num_tokens < self._max_tokens

    @property
    def is_stalled(self) -> bool:
        """Whether only a new Forward can set the session going: it may keep no more outputs, and nobody takes them."""
        return not self._sender.has_receiver and self._budget.is_full and not self.has_room

    def watch(self) -> None:
        """Something was done or sent: see whether the session is stalled now, or no more."""
        if self._timer is None and self.is_stalled:
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self._end_if_stalled)
        elif self._timer is not None and not self.is_stalled:
            self.close()

    def close(self) -> None:
        """Wait for nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_if_stalled(self) -> None:
        self._timer = None
        if self.is_stalled:
            text = f"no receiver for {self._patience_s:g} s, no memory to keep more: no Forward came"
            self._on_stalled(PeerBusy(text))
