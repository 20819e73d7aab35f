"""Hops that go from one server to another while their session goes on, because the server asks for it, or we want it.

    MoveAway ─► Moves.start ─ who else? ─► replica ─► open an empty session there, the heir
                   old server ◄── HandOver: peer, key ──┘
                   old server ~~~~ the session ~~~~► heir ── StateTaken ──┐
                   old server ── HandedOver ─────────────────────────────┴─► Session.moved, Hops.adopt

The old server goes on until it has the heir's key, so a session stands still only while it travels. Whatever fails, the
old server goes on, another heir is tried, and in the end the old one is told that there is nobody; when it leaves then,
its blocks are replayed elsewhere like those of any lost server. No session needs any of this to be right. Where we want
the move (`swarm.client.rerouting`), we know to whom, and one try is all.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from swarm.client.hop_stream import HopStream
from swarm.client.hops import NO_KEY, Hops
from swarm.errors import PeerBusy, PeerDisconnected, PeerError, PeerMisbehaved, PeerTimeout, RouteNotFound, SwarmError
from swarm.protocol import (
    AdapterLoading,
    AdapterRequest,
    HandedOver,
    HandOver,
    Message,
    MoveAway,
    SessionOpened,
    StateTaken,
    Waiting,
    printable,
)
from swarm.rates import Rate, Rates
from swarm.session import Session
from swarm.types import Hop

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_TRIES = 3
"""Servers that are asked to take a session."""
MAX_ASKED = 8
"""Times in a row that a server may ask for that: each opens sessions at others, in our name ..."""
ASKED_PER_S = 1 / 30.0
"""... and how often in the long run."""
MOVE_TIMEOUT_S = 60.0
"""How long one of them may take, to the end ..."""
OWN_TIMEOUT_S = 20.0
"""How long, where nobody needs it ..."""
TAKEN_TIMEOUT_S = 5.0
"""... and to say so, once the old server has: nobody serves the session meanwhile."""


class Owner(Protocol):
    """The session whose hops move; see `swarm.client.session`."""

    async def replica(self, hop: Hop, tried: frozenset[str]) -> Hop:
        """Another server of the same blocks that was not tried; raises RouteNotFound where there is none."""

    def on_message(self, hop: HopStream, message: Message, body: memoryview) -> None:
        """A server wants parts of an adapter."""

    def on_refused(self, hop: Hop, error: SwarmError) -> None:
        """A server let no empty session in, or lost it."""

    def on_moved(self, old: HopStream, seconds: float) -> None:
        """A hop has another server now, after it stood still for so long."""

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """The old server has given the session away, and nobody has it."""


class Moves:
    """The moves of one session.

    Args:
        machine: the session.
        hops: its streams.
        owner: is told what comes of it.
    """

    def __init__(self, machine: Session, hops: Hops, owner: Owner):
        self.num_moves = 0
        self._machine, self._hops, self._owner = machine, hops, owner
        self._running: dict[HopStream, _Move] = {}
        self._asked = Rates(Rate(burst=MAX_ASKED, per_s=ASKED_PER_S))
        self._asked_meanwhile: dict[HopStream, float] = {}
        """Until when servers wanted a session moved that was on its way already."""
        self._num_tries = 0

    def is_moving(self, *hops: HopStream) -> bool:
        """Whether the server of one of these may have frozen the session, to send it to another."""
        return any(hop in self._running for hop in hops)

    def start(self, hop: HopStream, within_s: float = MOVE_TIMEOUT_S) -> None:
        """Have a hop's part of the session moved to another server, unless that is under way; nobody waits for it.

        Args:
            hop: whose server has it.
            within_s: for how long that makes sense.

        Raises:
            PeerMisbehaved: that was asked for too often.
        """
        if not self._asked.charge(str(hop.link), time.monotonic()):
            raise PeerMisbehaved(f"asked {MAX_ASKED} times to have a session moved", peer_id=hop.hop.peer_id)
        if hop.move is None or hop.move.done():
            hop.move = self._hops.spawn(self._move(hop, within_s), name=f"move from {hop.hop.peer_id}")
        else:
            self._asked_meanwhile[hop] = time.monotonic() + within_s

    async def better(self, hop: Hop, target: Hop) -> bool | None:
        """Have a hop's part moved to this very server, which nobody has asked for.

        Returns:
            Whether it has moved; None if that was not tried, since it is on its way for another reason.
        """
        stream = next((it for it in self._hops if it.hop == hop and it.is_open), None)
        if stream is None or (stream.move is not None and not stream.move.done()):
            return None
        stream.move = move = self._hops.spawn(self._better(stream, target), name=f"move from {hop.peer_id}")
        await asyncio.wait([move])
        return target in self._machine.route

    async def _better(self, hop: HopStream, target: Hop) -> None:
        self._asked_meanwhile.pop(hop, None)
        has_moved = await self._try(hop, target, OWN_TIMEOUT_S)
        if (until := self._asked_meanwhile.pop(hop, None)) is not None and not has_moved:
            await self._move(hop, until - time.monotonic())

    def handed_over(self, hop: HopStream, message: HandedOver) -> None:
        """An old server says what became of its HandOver."""
        move = self._running.get(hop)
        if move is not None and move.nonce == message.nonce:
            move.on_handed_over(message)
        elif message.is_done:
            reason = "gave the session to a server that we had given up"
            self._owner.on_failure(hop, PeerDisconnected(reason, peer_id=hop.hop.peer_id))

    async def _move(self, hop: HopStream, within_s: float) -> None:
        tried, until = frozenset({hop.hop.peer_id}), time.monotonic() + within_s
        for _ in range(MAX_TRIES):
            if time.monotonic() >= until:
                break
            try:
                target = await self._owner.replica(hop.hop, tried)
            except (RouteNotFound, PeerError) as error:
                logger.info("nobody can take over from %s: %s", hop.hop.peer_id, error)
                break
            tried |= {target.peer_id}
            if await self._try(hop, target, min(MOVE_TIMEOUT_S, until - time.monotonic())):
                return
        hop.post(HandOver(nonce=self._num_tries, peer_id="", push_key=NO_KEY))

    async def _try(self, hop: HopStream, target: Hop, timeout_s: float) -> bool:
        """Move a hop to this server; false if the old one goes on."""
        self._num_tries += 1
        move = self._running[hop] = _Move(self._num_tries, self._owner)
        heir = self._hops.open_heir(hop, target, self._machine.new_link(), listener=move)
        try:
            async with asyncio.timeout(timeout_s):
                await self._hand_over(hop, heir, move)
            return True
        except TimeoutError:
            error: SwarmError = PeerTimeout(f"took no session within {timeout_s:.1f} s", peer_id=target.peer_id)
        except SwarmError as caught:
            error = caught
        finally:
            del self._running[hop]
            if self._hops.get(heir.link) is not heir:
                heir.close()
        logger.info("server %s did not take over from %s: %s", target.peer_id, hop.hop.peer_id, error)
        if move.has_failed:  # else it is the old server's word alone
            self._owner.on_refused(target, error)
        if move.is_given:
            self._owner.on_failure(hop, PeerMisbehaved(f"gave the session away: {error}", peer_id=hop.hop.peer_id))
        return move.is_given

    async def _hand_over(self, hop: HopStream, heir: HopStream, move: "_Move") -> None:
        """Have the old server send the session to the heir, and put the heir in its place.

        Raises:
            SwarmError: why that failed.
        """
        opened = await move.wait(lambda: move.opened)
        if move.asked_to_leave() is not None:
            raise PeerBusy("it is about to leave itself", peer_id=heir.hop.peer_id)
        hop.post(HandOver(nonce=move.nonce, peer_id=heir.hop.peer_id, push_key=heir.push_key))
        started = time.monotonic()
        await move.wait(lambda: move.handed_over)
        async with asyncio.timeout(TAKEN_TIMEOUT_S):  # it has been said that the heir has it
            taken = await move.wait(lambda: move.taken)
        is_moved = self._machine.moved(
            hop.link,
            heir.link,
            heir.hop,
            max_step_tokens=self._hops.step_tokens(opened),
            can_rollback=opened.can_rollback,
            step_id=taken.step_id,
            received=taken.received,
        )
        if not is_moved:
            raise PeerError("it has less than the session had", peer_id=heir.hop.peer_id)
        self._hops.adopt(heir)
        self.num_moves += 1
        self._owner.on_moved(hop, time.monotonic() - started)
        if (within_s := move.asked_to_leave()) is not None:
            self.start(heir, within_s)


class _Move:
    """One attempt: listens to the heir's stream."""

    def __init__(self, nonce: int, owner: Owner):
        self.nonce = nonce
        self.opened: SessionOpened | None = None
        self.taken: StateTaken | None = None
        self.handed_over: HandedOver | None = None
        self._leaves_within_s: float | None = None
        self.has_failed = False
        """Whether the heir's stream has ended with an error."""
        self._owner = owner
        self._error: SwarmError | None = None
        self._changed = asyncio.Event()

    @property
    def is_given(self) -> bool:
        """Whether the old server does nothing more."""
        return self.handed_over is not None and self.handed_over.is_done

    def asked_to_leave(self) -> float | None:
        """In which time the heir itself wants its sessions moved, if it does."""
        return self._leaves_within_s

    async def wait(self, what: Callable[[], T | None]) -> T:
        """Wait until something is there.

        Raises:
            SwarmError: the move has failed before.
        """
        while (found := what()) is None:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        return found

    def on_handed_over(self, message: HandedOver) -> None:
        """The old server's answer."""
        if message.is_done:
            self.handed_over = message
        else:
            self._error = PeerBusy(printable(message.text) or "the session was not handed over")
        self._changed.set()

    def on_opened(self, hop: HopStream, message: SessionOpened) -> None:
        """The heir is there."""
        self.opened = message
        self._changed.set()

    def on_message(self, hop: HopStream, message: Message, body: memoryview) -> None:
        """The heir has the session, or wants its adapters.

        Raises:
            PeerMisbehaved: it says what an empty session has no reason to.
        """
        if isinstance(message, StateTaken):
            self.taken = message
            self._changed.set()
        elif isinstance(message, AdapterRequest):
            self._owner.on_message(hop, message, body)
        elif isinstance(message, MoveAway):
            self._leaves_within_s = message.within_s
        elif not isinstance(message, AdapterLoading | Waiting):
            raise PeerMisbehaved(f"{type(message).__name__} of an empty session", peer_id=hop.hop.peer_id)

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """The heir is lost."""
        self.has_failed = True
        self._error = self._error or error
        self._changed.set()
