"""One session on a server: steps come in from the client or the server before, outputs go to the next or the client.

    session stream (Step, Forward, Probe) ─┐                                       ┌─► push stream to the next server
    push streams (Step) ───────────────────┴► Intake ─► executor ─produced─► Sender ┴─► session stream to the client

The session stream is the session's life: when it ends, everything is freed. Both kinds of readers stop while the
session has work enough; the session stream is read a little further, because what stands behind the steps (Probe,
Forward, HandOver) must be answered whatever happens. Every step is checked here; behind this module steps are trusted.
A session may go to another server, or come from one: `server.session_moves`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from swarm.codec import decode_tensor
from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected, PeerTimeout, SwarmError
from swarm.intake import Accepted, Intake
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
from swarm.server.backlog import Backlog, StepStart
from swarm.server.control import Control
from swarm.server.executor import Executor
from swarm.server.history import HistoryBudget
from swarm.server.limits import HandlerLimits
from swarm.server.meters import SessionMeter
from swarm.server.moving import MoveDesk
from swarm.server.pages import PAGE_SIZE
from swarm.server.push import PushStream
from swarm.server.sender import Sender
from swarm.server.session_moves import SessionMoves
from swarm.server.session_state import SavedSession
from swarm.server.work import Produced, Work
from swarm.step_chunk import StepChunk
from swarm.transport import EndOfStream, Stream
from swarm.transport.limits import Budget

STEP_BYTES = 1 << 10
"""Memory that a step takes besides its tensor, about."""
END_CHECK_S = 0.5
"""How often it is looked whether the client has gone while its stream is not read."""


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
        self._intake = Intake(opened.batch_size, max_length=opened.max_length, adapter_of=opened.adapter_of)
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
        self._cached = executor.open(
            opened.blocks,
            opened.batch_size,
            client=stream.account,
            listener=self,
            adapters=opened.row_adapters,
        )
        self._lease: AdapterLease | None = None
        if adapters is not None and opened.adapters:
            self._lease = adapters.lease(opened, stream.account, self._control.tell)
        self._backlog = Backlog()
        self._was_reordered = self._is_waiting = False
        self._pending: deque[tuple[Step, memoryview]] = deque()
        self._pending_bytes, self._all_pending = 0, pending
        self._pushes: deque[PushStream] = deque()
        self._room = asyncio.Event()
        self._over = asyncio.Event()
        self._stalled: asyncio.TimerHandle | None = None
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
            self._room.set()

    async def _until_end(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            await coroutine
        except SwarmError as error:
            self.end(error)

    async def _free(self) -> None:
        self._over.set()
        self._room.set()
        if self._stalled is not None:
            self._stalled.cancel()
        self._executor.close(self._cached)
        if self._lease is not None:
            self._lease.close()
        self._budget.forget(self, self._stream.account)
        self._pending.clear()
        self._count_pending(-self._pending_bytes)
        await self.moves.close()
        for stream in list(self._pushes):
            await stream.abort(PeerDisconnected("the session has ended"))

    async def _bring_adapters(self) -> None:
        """Let work run once the session's adapters are here; until then it waits, and others go on."""
        if self._lease is not None:
            await self._lease.load()
            self._executor.adapters_ready(self._cached)

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
                await self._queue_step(message, body)
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
                await self._wait_for_turn()
                try:
                    self._take(message, body)
                except PeerBusy as error:
                    return self.end(error)  # the client should look elsewhere
        finally:
            self._pushes.remove(stream)

    def _silence_left_s(self) -> float:
        return self.last_active + self._limits.idle_timeout_s - time.monotonic()

    async def _queue_step(self, step: Step, body: memoryview) -> None:
        """Take a step of the client's now or when there is room; returns when more may be read.

        While it waits, nobody reads the stream, so it is looked now and then whether the client is still there.
        """
        if not self._pending and self._has_room:
            return self._take(step, body)
        self._pending.append((step, body))
        self._count_pending(len(body) + STEP_BYTES)
        while self._must_wait and not self._over.is_set():
            self._room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(END_CHECK_S):
                    await self._room.wait()
            if self._stream.is_over:
                return self.end()

    def _count_pending(self, num_bytes: int) -> None:
        self._pending_bytes += num_bytes
        self._all_pending.used += num_bytes

    @property
    def _must_wait(self) -> bool:
        """Whether so much of what was read waits that no more may be read."""
        is_full = self._all_pending.used > self._all_pending.limit
        return self._pending_bytes > (0 if is_full else self._limits.max_pending_bytes)

    async def _wait_for_turn(self) -> None:
        """Wait until a pushed step may be taken.

        Raises:
            PeerDisconnected: the session has ended.
        """
        while not self._over.is_set() and (self._pending or not self._has_room):
            self._room.clear()
            await self._room.wait()
        if self._over.is_set():
            raise PeerDisconnected("the session has ended")

    @property
    def _has_room(self) -> bool:
        """Whether more work is wanted now: not while outputs wait for a receiver that does not keep up.

        Outputs that nobody takes (the next server is lost, or not named yet) are kept anyway, as history; they hold the
        session up only when they fill the memory for it. A session that moves takes nothing more.
        """
        if self.moves.is_frozen:
            return False
        num_tokens = self._backlog.num_tokens
        if self._sender.is_blocked or self._budget.is_full:
            num_tokens += self._sender.link.num_unsent
        return num_tokens < 2 * self._max_step_tokens

    def _on_room(self) -> None:
        """Something was done or sent: take what waits, and let readers read on."""
        self._room.set()
        if self._stalled is None and self._is_stalled:
            self._stalled = asyncio.get_running_loop().call_later(self._limits.forward_timeout_s, self._end_stalled)
        elif self._stalled is not None and not self._is_stalled:
            self._stalled.cancel()
            self._stalled = None
        try:
            while self._pending and self._has_room and not self._over.is_set():
                step, body = self._pending.popleft()
                self._count_pending(-len(body) - STEP_BYTES)
                self._take(step, body)
        except SwarmError as error:
            self.end(error)

    @property
    def _is_stalled(self) -> bool:
        """Whether only a new Forward can set the session going: it may keep no more outputs, and nobody takes them."""
        return not self._sender.has_receiver and self._budget.is_full and not self._has_room

    def _end_stalled(self) -> None:
        if self._is_stalled:
            waited_s = self._limits.forward_timeout_s
            self.end(PeerBusy(f"no receiver for {waited_s:g} s, no memory to keep more: no Forward came"))
        self._stalled = None

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
        chunk = self._check(step, body)
        if self._intake.step_id < 0 < step.step_id:
            self._meter.replayed(sum(step.num_tokens))
        self._sender.trace = step.trace
        accepted = self._intake.accept(chunk)
        if accepted is None:
            return
        self._submit(step, accepted)

    def _check(self, step: Step, body: memoryview) -> StepChunk:
        expected = (sum(step.num_tokens), self._executor.span.hidden_size)
        if step.hidden_states.shape != expected or not 1 <= expected[0] <= self._max_step_tokens:
            raise InvalidRequest(
                f"hidden states of shape {step.hidden_states.shape}, expected {expected} and 1 to"
                f" {self._max_step_tokens} tokens"
            )
        chunk = StepChunk.of(step, decode_tensor(step.hidden_states, body))
        self._intake.check(chunk)
        if self._executor.span.stateful and self._intake.rolls_back(chunk):
            raise InvalidRequest("this model keeps a recurrent state: its rows can't be rolled back")
        self._check_room(chunk)
        return chunk

    def _check_room(self, chunk: StepChunk) -> None:
        """Refuse what the cache could never hold; rows that were reordered may share pages, so they are let through."""
        self._was_reordered |= chunk.order is not None
        lengths = [position + count for position, count in zip(chunk.positions, chunk.num_tokens, strict=True)]
        pages = [-(-length // PAGE_SIZE) for length in lengths]
        needed = (max(pages) if self._was_reordered else sum(pages)) * PAGE_SIZE
        if needed > self._executor.total_tokens:
            raise PeerBusy(
                f"the session needs {needed} tokens of KV cache, the server has {self._executor.total_tokens}",
                retry_after_s=600.0,
            )

    def _submit(self, step: Step, accepted: Accepted) -> None:
        """Give the executor what is new; a step that takes back all that is queued makes it drop that."""
        base, start = accepted.base, None
        if base is not None:
            kept = self._backlog.take_back(accepted.step_id, accepted.order, base)
            if kept is not None:
                self._executor.drop_queued(self._cached)
                self._is_waiting = False
                base = kept
            start = StepStart(
                step_id=accepted.step_id,
                order=accepted.order,
                base=base,
                outputs_from=accepted.outputs_from,
                spec=step.hidden_states,
            )
        work = Work(
            step_id=accepted.step_id,
            order=accepted.order,
            base=base,
            num_tokens=accepted.num_tokens,
            outputs_from=accepted.outputs_from if self.opened.is_last else (0,) * self.opened.batch_size,
            hidden_states=accepted.hidden_states,
        )
        starts = tuple(end - count for end, count in zip(self._intake.lengths, work.num_tokens, strict=True))
        self._backlog.add(work, starts, start)
        self.moves.use_room()
        self._executor.submit(self._cached, work)

    def _answer(self, probe: Probe) -> ProbeResult:
        return ProbeResult(
            nonce=probe.nonce,
            step_id=self._intake.step_id,
            received=tuple(self._intake.lengths),
            produced=self._sender.link.lengths,
            is_waiting=self._is_waiting,
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
        return sum(-(-length // PAGE_SIZE) for length in self._intake.lengths)

    @property
    def taken(self) -> StateTaken:
        """How far this session is."""
        return StateTaken(step_id=self._intake.step_id, received=tuple(self._intake.lengths))

    def freeze(self) -> None:
        """Take no more steps."""
        self.moves.is_frozen = True

    def thaw(self) -> None:
        """Take steps again, those first that came meanwhile."""
        self.moves.is_frozen = False
        self._on_room()

    async def settle(self) -> None:
        """Wait until what was taken is done, and the client has what it is to get of it.

        Raises:
            PeerDisconnected: the session has ended.
        """
        while not self._over.is_set() and (self._backlog.num_tokens or not self._sender.is_settled):
            self._room.clear()
            await self._room.wait()
        if self._over.is_set():
            raise PeerDisconnected("the session has ended")

    async def save(self) -> SavedSession:
        """What another server needs to go on, while nothing is taken and nothing runs."""
        image = await self._executor.take_image(self._cached)
        return SavedSession(intake=self._intake.save(), image=image, sent=self._sender.save())

    async def resume(self, saved: SavedSession) -> None:
        """Go on, before the first step, where another server was."""
        await self._executor.put_image(self._cached, saved.image)
        if self._over.is_set():
            raise PeerDisconnected("the session has ended")
        self._intake.resume(saved.intake)
        self._sender.resume(saved.sent)
        self._was_reordered = True  # rows may share pages
        self._budget.use(self, self._stream.account, self._sender.link)

    # -- the executor tells us ----------------------------------------------------------------------------------

    def produced(self, produced: Produced) -> None:
        """One batch has run: its outputs go on at once."""
        if self._over.is_set() or self._backlog.is_void(produced.step_id):
            return
        self.last_active = time.monotonic()
        self._is_waiting = False
        for start in self._backlog.done(produced.step_id, produced.num_tokens):
            self._sender.begin(start)
        self._sender.append(produced)
        self._sender.pump()
        self._budget.use(self, self._stream.account, self._sender.link)
        self._meter.record(self.last_active, produced)
        self._on_room()

    def failed(self, step_id: int, error: SwarmError) -> None:
        """Work can't be done: the session ends."""
        if not self._backlog.is_void(step_id):
            self.end(error)

    def waiting(self, step_id: int, expected_s: float) -> None:
        """Work waits for room in the cache."""
        if not self._over.is_set():
            self._is_waiting = True
            self._control.tell(Waiting(step_id=step_id, expected_s=min(max(expected_s, 0.0), 86400.0)))


class _Over(Exception):
    """Ends the tasks of a session."""
