"""One session on a server: steps come in from the client or the server before, outputs go to the next or the client.

    session stream ─ StepQueue ─┐                                           ┌─► push stream to the next server
    push streams ───────────────┴► StepIntake ─► SessionWork ─► Sender ─────┴─► session stream to the client
                                    SessionRoom: while there is room for work

The session stream is the session's life: when it ends, everything is freed. Both kinds of readers stop while the
session has work enough; the session stream is read a little further, because what stands behind the steps (Probe,
Forward, HandOver) must be answered whatever happens. A session may go to another server, or come from one:
`server.session_moves`. This module knows who is told what, and when; how steps are checked, wait and run is its parts'.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected, PeerTimeout, SwarmError
from swarm.protocol import (
    Forward,
    HandOver,
    OpenSession,
    Probe,
    ProbeResult,
    PushAccepted,
    SessionOpened,
    StateTaken,
    Step,
    Waiting,
)
from swarm.server.adapter_desk import AdapterDesk, AdapterLease
from swarm.server.control import Control
from swarm.server.executor import Executor
from swarm.server.history import HistoryBudget
from swarm.server.limits import HandlerLimits
from swarm.server.meters import SessionMeter
from swarm.server.moving import MoveDesk
from swarm.server.push import PushStream
from swarm.server.sender import Sender
from swarm.server.session_moves import SessionMoves
from swarm.server.session_room import SessionRoom
from swarm.server.session_state import SavedSession
from swarm.server.session_work import SessionWork
from swarm.server.step_intake import StepIntake
from swarm.server.step_queue import StepQueue
from swarm.server.work import Produced
from swarm.transport import EndOfStream, Stream
from swarm.transport.limits import Budget


class ServedSession:
    """One client's session; see the module. It listens to the executor.

    Args:
        stream: the session stream, whose peer is the client.
        opened: what the client asked for, admitted.
        executor: runs the blocks.
        limits: sizes and patience.
        max_step_tokens: most tokens in one Step.
        budget: memory for histories, shared by all sessions.
        pending: memory for steps that wait for room, shared by all sessions.
        meter: counts what the session does.
        open_push: opens push streams to peers.
        move_desk: takes sessions to other servers, and from them.
        adapters: brings the session's adapters, where it uses any.
    """

    def __init__(
        self,
        stream: Stream,
        opened: OpenSession,
        *,
        executor: Executor,
        limits: HandlerLimits,
        max_step_tokens: int,
        budget: HistoryBudget,
        pending: Budget,
        meter: SessionMeter,
        open_push: Callable[[str], Awaitable[PushStream]],
        move_desk: MoveDesk,
        adapters: AdapterDesk | None = None,
    ):
        self.last_active = time.monotonic()
        self.opened = opened
        self._stream = stream
        self._executor, self._limits, self._max_step_tokens = executor, limits, max_step_tokens
        self._budget, self._meter = budget, meter
        self._intake = StepIntake(opened, executor, max_step_tokens=max_step_tokens, meter=meter)
        self._control = Control(stream, timeout_s=limits.send_timeout_s, on_lost=self.end, on_tell=meter.told)
        self._sender = Sender(
            opened.batch_size,
            stream,
            self._control,
            is_last=opened.is_last,
            max_tokens=max_step_tokens,
            open_push=open_push,
            limits=limits,
            on_progress=self._on_room,
            on_client_lost=self.end,
        )
        self.moves = SessionMoves(
            self, move_desk, client=stream.account, control=self._control, limits=limits, on_end=self.end
        )
        self._work = SessionWork(opened, executor, client=stream.account, listener=self)
        self._lease: AdapterLease | None = None
        if adapters is not None and opened.adapters:
            self._lease = adapters.lease(opened, stream.account, self._control.tell)
        max_tokens, patience_s = 2 * max_step_tokens, limits.forward_timeout_s
        self._room = SessionRoom(
            self._work, self._sender, budget, max_tokens=max_tokens, patience_s=patience_s, on_stalled=self.end
        )
        has_room, max_bytes = (lambda: self._room.has_room), limits.max_pending_bytes
        self._queue = StepQueue(stream, has_room=has_room, take=self._take, max_bytes=max_bytes, budget=pending)
        self._pushes: deque[PushStream] = deque()
        self._over = asyncio.Event()
        self._error: SwarmError | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the client ends the session, something fails, or nothing happens for too long.

        Raises:
            SwarmError: why the session ended, if not because the client wished so.
        """
        can_rollback = not self._executor.span.stateful
        try:
            async with asyncio.TaskGroup() as group:
                self._control.tell(SessionOpened(max_step_tokens=self._max_step_tokens, can_rollback=can_rollback))
                for coroutine in (self._read(group), self._sender.run(), self._control.run(), self._bring_adapters()):
                    group.create_task(self._until_end(coroutine))
                await self._over.wait()
                if self._error is not None:
                    await self._stream.abort(self._error)
                raise _Over
        except* _Over:
            pass
        finally:
            await self._free()
        if self._error is not None:
            raise self._error

    def end(self, error: SwarmError | None = None) -> None:
        """End the session; the client is told `error`."""
        if not self._over.is_set():
            self._error = error
            self._over.set()
            self._queue.close()

    async def _until_end(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            await coroutine
        except SwarmError as error:
            self.end(error)

    async def _free(self) -> None:
        self._over.set()
        self._room.close()
        self._work.close()
        if self._lease is not None:
            self._lease.close()
        self._budget.forget(self, self._stream.account)
        self._queue.close()
        await self.moves.close()
        for stream in list(self._pushes):
            await stream.abort(PeerDisconnected("the session has ended"))

    async def _bring_adapters(self) -> None:
        """Let work run once the session's adapters are here; until then it waits, and others go on."""
        if self._lease is not None:
            await self._lease.load()
            self._work.adapters_ready()

    # -- what comes in ------------------------------------------------------------------------------------------

    async def _read(self, group: asyncio.TaskGroup) -> None:
        """Read the session stream until the client ends it."""
        while True:
            try:
                message, body = await self._stream.receive(timeout_s=self._silence_left_s())
            except EndOfStream:
                return self.end()
            except PeerTimeout:
                if self._stream.is_over:
                    raise  # it has failed: the client did not keep up
                if self._silence_left_s() > 0:
                    continue  # others have pushed meanwhile
                raise PeerTimeout(f"session closed after {self._limits.idle_timeout_s:.0f} s of silence") from None
            self.last_active = time.monotonic()
            if isinstance(message, Step):
                if not await self._queue.put(message, body):
                    return self.end()
            elif isinstance(message, Probe):
                self._control.tell(self._answer(message))
            elif isinstance(message, Forward):
                self._sender.forward(message, group)
            elif isinstance(message, HandOver):
                self.moves.hand_over(message, group)
            else:
                raise InvalidRequest(f"expected Step, Forward, Probe or HandOver, got {type(message).__name__}")

    async def receive_pushes(self, stream: PushStream) -> None:
        """Take the steps that the server before sends; a bad one ends this stream, not the session.

        Raises:
            SwarmError: what was wrong, or that the session has ended.
        """
        if len(self._pushes) >= self._limits.max_pushes:
            await self._pushes[0].abort(PeerBusy(f"{len(self._pushes)} peers push into this session"))
        if self._over.is_set():
            raise PeerDisconnected("the session has ended")
        self._pushes.append(stream)
        try:
            await stream.send(PushAccepted(), timeout_s=self._limits.send_timeout_s)
            while True:
                message, body = await stream.receive()
                if not isinstance(message, Step):
                    raise InvalidRequest(f"expected Step, got {type(message).__name__}")
                await self._queue.turn()
                try:
                    self._take(message, body)
                except PeerBusy as error:
                    return self.end(error)  # the client should look elsewhere
        finally:
            self._pushes.remove(stream)

    def _silence_left_s(self) -> float:
        return self.last_active + self._limits.idle_timeout_s - time.monotonic()

    def _on_room(self) -> None:
        """Something was done or sent: take what waits, and let readers read on."""
        self._room.watch()
        try:
            self._queue.advance()
        except SwarmError as error:
            self.end(error)

    # -- steps --------------------------------------------------------------------------------------------------

    def _take(self, step: Step, body: memoryview) -> None:
        """Check a step and give the executor what is new in it.

        Raises:
            InvalidRequest: it does not fit the session.
            PeerMisbehaved: a body of another length than declared.
            PeerBusy: this server's cache could never hold it.
        """
        self.last_active = time.monotonic()
        if step.step_id < self._intake.step_id:
            return
        accepted = self._intake.take(step, body)
        self._sender.trace = step.trace
        if accepted is not None:
            self.moves.use_room()
            self._work.submit(accepted, step.hidden_states, self._intake.received)

    def _answer(self, probe: Probe) -> ProbeResult:
        return ProbeResult(
            nonce=probe.nonce,
            step_id=self._intake.step_id,
            received=self._intake.received,
            produced=self._sender.link.lengths,
            is_waiting=self._work.is_waiting,
        )

    # -- moving -------------------------------------------------------------------------------------------------

    async def receive_state(self, stream: PushStream) -> None:
        """Become the session that comes on this stream.

        Raises:
            SwarmError: what was wrong, or that the session has begun.
        """
        await self.moves.receive(stream)

    @property
    def num_pages(self) -> int:
        """Pages that its tokens fill, not counting that beams and prompts share some."""
        return self._intake.num_pages

    @property
    def taken(self) -> StateTaken:
        """How far this session is."""
        return StateTaken(step_id=self._intake.step_id, received=self._intake.received)

    def freeze(self) -> None:
        """Take no more steps."""
        self._room.is_frozen = True

    def thaw(self) -> None:
        """Take steps again, those first that came meanwhile."""
        self._room.is_frozen = False
        self._on_room()

    async def settle(self) -> None:
        """Wait until what was taken is done, and the client has what it is to get of it.

        Raises:
            PeerDisconnected: the session has ended.
        """
        await self._queue.until(lambda: not self._work.num_tokens and self._sender.is_settled)

    async def save(self) -> SavedSession:
        """What another server needs to go on, while nothing is taken and nothing runs."""
        image = await self._work.save()
        return SavedSession(intake=self._intake.save(), image=image, sent=self._sender.save())

    async def resume(self, saved: SavedSession) -> None:
        """Go on, before the first step, where another server was."""
        await self._work.resume(saved.image)
        if self._over.is_set():
            raise PeerDisconnected("the session has ended")
        self._intake.resume(saved.intake)
        self._sender.resume(saved.sent)
        self._budget.use(self, self._stream.account, self._sender.link)

    # -- the executor tells us ----------------------------------------------------------------------------------

    def produced(self, produced: Produced) -> None:
        """One batch has run: its outputs go on at once."""
        if self._over.is_set() or self._work.is_void(produced.step_id):
            return
        self.last_active = time.monotonic()
        for start in self._work.done(produced):
            self._sender.begin(start)
        self._sender.append(produced)
        self._sender.pump()
        self._budget.use(self, self._stream.account, self._sender.link)
        self._meter.record(self.last_active, produced)
        self._on_room()

    def failed(self, step_id: int, error: SwarmError) -> None:
        """Work can't be done: the session ends."""
        if not self._work.is_void(step_id):
            self.end(error)

    def waiting(self, step_id: int, expected_s: float) -> None:
        """Work waits for room in the cache."""
        if not self._over.is_set():
            self._work.is_waiting = True
            self._control.tell(Waiting(step_id=step_id, expected_s=min(max(expected_s, 0.0), 86400.0)))


class _Over(Exception):
    """Ends the tasks of a session."""
