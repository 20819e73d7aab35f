"""Drives a `swarm.session.Session` over the network: opens streams, sends steps, fails over, waits.

    step() ─begin─► Session ─next_action─► FindRoute ─► Peers.route
                       ▲                   Open, Connect, Send ─► HopStream (one per hop) ~~► server
                       │                   Wait ◄─ wake ─┐        Done ─► outputs
                       └── received, failed, link_down ──┴─ on_message, on_failure ◄~~ server

The hops' readers tell the machine at once what has come, also between steps; the task of the step only carries out
actions. So nothing that one server does or fails to do keeps the others waiting.

Policy: what a server answers to a step of ours is believed when it blames the request; anything else that goes wrong
blames the server, which is then replaced, until `max_wait_s` has passed without progress. A step that is late makes us
ask every server how far it is: those that are silent are replaced at once, one that lives but does nothing much later.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from swarm.client.deadlines import Pace, Patience, Watch
from swarm.client.hop_stream import HopStream
from swarm.client.peers import Peers
from swarm.client.progress import Progress, StepShape, find_stuck, progress_of
from swarm.client.timings import HopTiming, attribute
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import (
    InvalidRequest,
    PeerBusy,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    RequestError,
    RouteNotFound,
    SwarmError,
)
from swarm.network.tasks import TaskSet
from swarm.protocol import (
    Encoding,
    Forward,
    Forwarding,
    HopTrace,
    LinkDown,
    LinkFault,
    Message,
    OpenSession,
    ProbeResult,
    SessionOpened,
    Step,
    StepResult,
    Waiting,
)
from swarm.session import Connect, Done, FindRoute, Hop, Open, Send, Session, Wait
from swarm.transport import Transport
from swarm.types import BlockRange

__all__ = ["HopTiming", "RemoteSession", "SessionConfig", "WaitingFor"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
NO_KEY = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """How patient a session is, and how it talks."""

    open_timeout_s: float = 10.0
    """To connect to a server and open the session there."""
    step_timeout_s: float = 120.0
    """For a server that lives to get further with a step; less where steps like it were measured."""
    max_wait_s: float = 30.0
    """To wait for missing blocks or busy servers before giving up; the session can go on later."""
    late_s: float = 0.5
    """A step that is quiet for so long, and for four times what it should take, makes us ask the servers."""
    probe_timeout_s: float = 1.0
    """For a server to answer that; a dead or stopped one is noticed by the transport's heartbeat, too."""
    chunk_tokens: int = 512
    """Most tokens in one message, so that hops work on a long prompt at the same time."""
    push: bool = True
    """Whether servers send to each other; if not, everything goes through the client."""
    encoding: Encoding = Encoding.RAW
    """How hidden states cross the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingFor:
    """A server has no room for the step at present."""

    peer_id: str
    expected_s: float
    """Its own estimate of how much longer it takes."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """The step under way."""

    shape: StepShape
    hidden_size: int
    dtype: torch.dtype
    started: float
    watch: Watch
    patience: Patience
    error: SwarmError | None = None
    """Why the step must end."""
    trouble: SwarmError | None = None
    """The last failure."""
    sent: dict[int, list[float]] = field(default_factory=dict)
    """By link that the client feeds: when each message was sent."""
    answers: dict[int, tuple[tuple[HopTrace, ...], float]] = field(default_factory=dict)
    """By link: trace of its last result, and when that came."""
    progress: dict[int, Progress] = field(default_factory=dict)
    """By link: the furthest that its server has said."""


class RemoteSession:
    """One inference session through the swarm. All methods run on the client's event loop.

    Args:
        peers: who serves the model.
        transport: how to reach them.
        batch_size: rows.
        max_length: most tokens in a row.
        config: patience and encoding.
    """

    def __init__(self, peers: Peers, transport: Transport, *, batch_size: int, max_length: int, config: SessionConfig):
        blocks = BlockRange(0, peers.num_blocks)
        self.machine = Session(blocks, batch_size=batch_size, max_length=max_length, push=config.push)
        self.timings: deque[HopTiming] = deque(maxlen=8192)
        self.waiting: WaitingFor | None = None
        """Which server has no room for the step under way, as far as known."""
        self._peers, self._transport, self._config = peers, transport, config
        self._session_id = os.urandom(16)
        self._hops: dict[int, HopStream] = {}
        self._tasks = TaskSet()
        self._pace = Pace()
        self._step: _Running | None = None
        self._turn = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._num_probes = 0
        self._logged_waiting_at = float("-inf")
        self._is_closed = False

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order."""
        return self.machine.route

    def __repr__(self) -> str:
        waiting = self.waiting
        state = f" | waits {waiting.expected_s:.0f} s for {self._peers.name_of(waiting.peer_id)}" if waiting else ""
        return f"<RemoteSession {repr(self.machine).removeprefix('<Session ').removesuffix('>')}{state}>"

    async def step(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run one step through all blocks; see `swarm.session.Session.begin` for the arguments.

        After an error or a cancellation the session can go on with another step, or with the same one.

        Raises:
            RequestError: the request can't be served by anyone.
            RouteNotFound: blocks stayed missing for `max_wait_s`.
            PeerError: servers kept failing for `max_wait_s`, or had no room.
        """
        async with self._turn:
            if self._is_closed:
                raise InvalidRequest("the session is closed")
            self.machine.begin(
                hidden_states, positions=positions, num_tokens=num_tokens, num_outputs=num_outputs, order=order
            )
            shape = StepShape(
                step_id=self.machine.step_id,
                order=tuple(order) if order is not None else None,
                base=tuple(positions),
                num_tokens=tuple(num_tokens),
            )
            self._step = step = self._running(shape, hidden_states)
            self._close_stale()
            try:
                outputs = await self._run(step)
            except BaseException:
                self._abandon()
                raise
            finally:
                self._step = self.waiting = None
            self._learn(step)
            return outputs

    async def close(self) -> None:
        """End the session on all its servers, without waiting for any of them; a step under way fails."""
        self._is_closed = True
        for hop in self._hops.values():
            hop.close()
        self._hops.clear()
        self._end_step(InvalidRequest("the session was closed"))
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._tasks.close()

    # -- carrying out actions -----------------------------------------------------------------------------------

    async def _run(self, step: _Running) -> torch.Tensor:
        while True:
            if step.error is not None:
                raise step.error
            action = self.machine.next_action()
            if isinstance(action, Send):
                self._send(action, step)
            elif isinstance(action, Wait):
                await self._wait(step)
            elif isinstance(action, Done):
                return action.outputs
            elif isinstance(action, Connect):
                self._connect(action)
            elif isinstance(action, Open):
                self._open_all()
                await self._wait(step, is_sent=False)
            else:
                await self._find_route(action, step)

    async def _find_route(self, action: FindRoute, step: _Running) -> None:
        await self._pause(step.patience.pause_s(step.trouble), step)
        try:
            hops = await self._peers.route(action.blocks)
        except (RouteNotFound, PeerError) as error:
            step.trouble = error
            if (last := step.patience.failed(time.monotonic(), error)) is not None:
                raise last from None
            return
        if self.machine.next_action() == action:  # no neighbour was lost meanwhile
            self.machine.fallbacks |= self._peers.pairs_without_push
            self.machine.routed(hops)
            step.watch = self._watch(sum(self.machine.lengths))  # somebody has to catch up with everything

    def _open_all(self) -> None:
        """Begin to open all sessions that are not open; those that fail lose their server."""
        for action in self.machine.pending_opens:
            if action.link in self._hops:
                continue
            hop = self._hops[action.link] = HopStream(action.link, action.hop, listener=self, tasks=self._tasks)
            request = OpenSession(
                session_id=self._session_id,
                push_key=hop.push_key,
                model=self._peers.model,
                start=action.hop.blocks.start,
                end=action.hop.blocks.end,
                batch_size=self.machine.batch_size,
                max_length=self.machine.max_length,
                is_last=action.is_last,
            )
            hop.open(self._transport, request, timeout_s=self._config.open_timeout_s)

    def _connect(self, action: Connect) -> None:
        hop = self._hops[action.link]
        target = self._hops[action.target] if action.target is not None else None
        hop.forward = (action.epoch, action.target)
        hop.num_received = 0
        hop.post(
            Forward(
                epoch=action.epoch,
                peer_id=target.hop.peer_id if target is not None else "",
                push_key=target.push_key if target is not None else NO_KEY,
                held=action.held,
                as_of=action.as_of,
                max_step_tokens=action.max_step_tokens,
            )
        )

    def _send(self, action: Send, step: _Running) -> None:
        hop, chunk = self._hops[action.link], action.chunk
        spec, payload = encode_tensor(chunk.hidden_states, self._config.encoding)
        hop.fed_in_step = chunk.step_id
        step.sent.setdefault(action.link, []).append(time.monotonic())
        hop.post(
            Step(
                step_id=chunk.step_id,
                order=chunk.order,
                base=chunk.base,
                positions=chunk.positions,
                num_tokens=chunk.num_tokens,
                outputs_from=chunk.outputs_from,
                hidden_states=spec,
            ),
            payload,
        )

    async def _wait(self, step: _Running, *, is_sent: bool = True) -> None:
        """Wait until something happens, and look after the servers while nothing does."""
        until = step.watch.next_check
        for hop in self._hops.values():
            if hop.probe_sent_at is not None:
                until = min(until, hop.probe_sent_at + self._config.probe_timeout_s)
        await self._woken(until - time.monotonic())
        now = time.monotonic()
        if now < until:
            return
        self._lose_silent(now)
        if not is_sent:
            step.watch.heard(now)
        elif step.watch.is_stuck(now):
            self._lose_stuck(step, now)
        elif step.watch.is_late(now):
            self._probe_all(now)
            step.watch.asked(now)

    async def _pause(self, seconds: float, step: _Running) -> None:
        """Wait before another attempt, unless the step ends."""
        until = time.monotonic() + seconds
        while step.error is None and (left_s := until - time.monotonic()) > 0:
            await self._woken(left_s)

    async def _woken(self, timeout_s: float) -> None:
        """Wait until a hop has told something, but no longer than this."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(max(timeout_s, 0.0), self._wake)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the hops tell -------------------------------------------------------------------------------------

    def on_opened(self, hop: HopStream, message: SessionOpened) -> None:
        """A server has opened the session."""
        max_step_tokens = min(message.max_step_tokens, self._config.chunk_tokens)
        self.machine.opened(hop.link, max_step_tokens=max_step_tokens, can_rollback=message.can_rollback)
        self._wake()

    def on_message(self, hop: HopStream, message: Message, body: memoryview) -> None:
        """A server sent something.

        Raises:
            PeerMisbehaved: something that it must not.
        """
        if isinstance(message, StepResult):
            self._on_result(hop, message, body)
        elif isinstance(message, ProbeResult):
            self._on_progress(hop, message)
        elif isinstance(message, Waiting):
            self._on_waiting(hop, message)
        elif isinstance(message, LinkDown):
            self._on_link_down(hop, message)
        elif not isinstance(message, Forwarding):
            raise PeerMisbehaved(f"unexpected {type(message).__name__}", peer_id=hop.hop.peer_id)
        self._wake()

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """A server is lost: its blocks need another. What it says of a step of ours may be our own fault."""
        if self._hops.pop(hop.link, None) is None:
            return
        hop.close()
        self.machine.failed(hop.link)
        self._close_stale()
        step = self._step
        if step is not None and isinstance(error, RequestError) and hop.fed_in_step == step.shape.step_id:
            return self._end_step(error)
        self._peers.failed(hop.hop.peer_id, error)
        if step is not None:
            step.trouble = error
            if (last := step.patience.failed(time.monotonic(), error)) is not None:
                self._end_step(last)
        self._wake()

    def _on_result(self, hop: HopStream, message: StepResult, body: memoryview) -> None:
        step, peer_id = self._step, hop.hop.peer_id
        if step is None or message.step_id < step.shape.step_id:
            return
        outputs = self._outputs(message, body, step, peer_id)
        self.machine.received(
            hop.link,
            step_id=message.step_id,
            positions=message.positions,
            num_tokens=message.num_tokens,
            hidden_states=outputs,
        )
        now = time.monotonic()
        step.answers[hop.link] = (message.trace, now)
        hop.num_received = len(outputs) + (hop.num_received if hop.received_in_step == message.step_id else 0)
        hop.received_in_step = message.step_id
        if len(outputs) and hop.num_received <= sum(self.machine.lengths):  # not the same again and again
            self.waiting = None
            step.watch.heard(now)
            step.patience.progressed()

    def _outputs(self, message: StepResult, body: memoryview, step: _Running, peer_id: str) -> torch.Tensor:
        """The hidden states of a result, if they can be what was asked for."""
        spec = message.hidden_states
        if message.step_id > step.shape.step_id:
            raise PeerMisbehaved(f"result of step {message.step_id}, not begun yet", peer_id=peer_id)
        if spec.shape != (sum(message.num_tokens), step.hidden_size):
            raise PeerMisbehaved(
                f"outputs of shape {spec.shape}, expected {(sum(message.num_tokens), step.hidden_size)}",
                peer_id=peer_id,
            )
        outputs = decode_tensor(spec, body)
        if outputs.dtype != step.dtype:
            raise PeerMisbehaved(f"outputs in {outputs.dtype}, expected {step.dtype}", peer_id=peer_id)
        return outputs

    def _on_waiting(self, hop: HopStream, message: Waiting) -> None:
        step = self._step
        if step is None or message.step_id != step.shape.step_id:
            return
        now, peer_id = time.monotonic(), hop.hop.peer_id
        self.waiting = WaitingFor(peer_id=peer_id, expected_s=message.expected_s)
        if now - self._logged_waiting_at >= 1.0:
            self._logged_waiting_at = now
            logger.info(
                "server %s has no room yet, expected in %.0f s", self._peers.name_of(peer_id), message.expected_s
            )
        step.watch.heard(now)
        step.patience.waits(now)
        if step.patience.is_over(now):
            reason = f"no room within {self._config.max_wait_s:g} s, expected in {message.expected_s:.0f} s"
            self._end_step(PeerBusy(reason, peer_id=peer_id, retry_after_s=message.expected_s))

    def _on_link_down(self, hop: HopStream, message: LinkDown) -> None:
        """A server can't send on. If the next one is lost, it is replaced; if it lives, we stand between the two."""
        epoch, target = hop.forward
        if message.epoch != epoch:
            return
        logger.info("server %s can't send on: %s", self._peers.name_of(hop.hop.peer_id), message.text)
        if message.fault is LinkFault.HISTORY_LOST:
            self._link_down(hop.link, epoch, message.fault)
        elif target is not None and (following := self._hops.get(target)) is not None:
            following.doubts.append((hop.link, epoch))
            self._num_probes += 1
            following.probe(time.monotonic(), self._num_probes)

    def _on_progress(self, hop: HopStream, message: ProbeResult) -> None:
        if hop.probe_sent_at is None:
            return
        hop.probe_sent_at = None
        doubts, hop.doubts = hop.doubts, []
        for link, epoch in doubts:
            self._link_down(link, epoch, LinkFault.UNREACHABLE)
        if (step := self._step) is None:
            return
        progress = progress_of(message, step.shape)
        if message.is_waiting or progress.is_beyond(step.progress.get(hop.link, Progress())):
            step.progress[hop.link] = progress
            step.watch.advanced(time.monotonic())

    # -- policy -------------------------------------------------------------------------------------------------

    def _link_down(self, link: int, epoch: int, fault: LinkFault) -> None:
        known = set(self.machine.fallbacks)
        self.machine.link_down(link, epoch, fault)
        for pair in self.machine.fallbacks - known:
            self._peers.cannot_push(*pair)
        self._close_stale()

    def _probe_all(self, now: float) -> None:
        self._num_probes += 1
        for hop in self._hops.values():
            hop.probe(now, self._num_probes)

    def _lose_silent(self, now: float) -> None:
        """Replace the servers that were asked and do not answer."""
        timeout_s = self._config.probe_timeout_s
        for hop in list(self._hops.values()):
            if hop.probe_sent_at is None or now < hop.probe_sent_at + timeout_s:
                continue
            if hop.is_sending:
                hop.probe_sent_at = now  # the question is behind what is still being sent: heartbeats tell
            else:
                peer_id = hop.hop.peer_id
                self.on_failure(hop, PeerTimeout(f"does not answer within {timeout_s:g} s", peer_id=peer_id))

    def _lose_stuck(self, step: _Running, now: float) -> None:
        """All servers live, yet the step does not advance: replace one of them, or the way between two."""
        step.watch.heard(now)
        hops = [self._hops[link] for link in self.machine.hops]
        index, is_hop = find_stuck([step.progress.get(hop.link, Progress()) for hop in hops], step.shape.expected)
        culprit = hops[max(index, 0)]
        epoch, target = culprit.forward
        if not is_hop and 0 <= index < len(hops) - 1 and target is not None:
            self._link_down(culprit.link, epoch, LinkFault.UNREACHABLE)
        else:
            waited_s = now - step.started
            self.on_failure(
                culprit, PeerTimeout(f"gets no further after {waited_s:.1f} s", peer_id=culprit.hop.peer_id)
            )

    def _end_step(self, error: SwarmError) -> None:
        """Let the step under way raise this."""
        if self._step is not None and self._step.error is None:
            self._step.error = error
        self._wake()

    def _abandon(self) -> None:
        """Make the session ready for another step after one that did not end."""
        self.machine.abandon()
        for hop in list(self._hops.values()):
            if not hop.is_open or hop.is_sending:
                hop.close()
                del self._hops[hop.link]
                if hop.is_open:
                    self.machine.failed(hop.link)
        self._close_stale()

    def _close_stale(self) -> None:
        """Close the streams of links that the session no longer uses."""
        used = self.machine.hops
        for link in [link for link in self._hops if link not in used]:
            self._hops.pop(link).close()

    def _running(self, shape: StepShape, hidden_states: torch.Tensor) -> _Running:
        return _Running(
            shape=shape,
            hidden_size=hidden_states.shape[1],
            dtype=hidden_states.dtype,
            started=time.monotonic(),
            watch=self._watch(sum(shape.num_tokens)),
            patience=Patience(self._config.max_wait_s),
        )

    def _watch(self, num_tokens: int) -> Watch:
        return Watch(
            time.monotonic(),
            expected_s=self._pace.expected_s(num_tokens),
            late_s=self._config.late_s,
            stuck_s=self._config.step_timeout_s,
        )

    def _learn(self, step: _Running) -> None:
        """Remember what the step took and what each hop had of it."""
        num_tokens = sum(step.shape.num_tokens)
        if step.trouble is None:
            self._pace.measured(num_tokens, time.monotonic() - step.started)
        first, hops = 0, self.machine.hops
        links = list(hops)
        for index, link in enumerate(links):
            if link in step.sent:
                first = index
            sent = step.sent.get(links[first])
            if sent is None or link not in step.answers:
                continue
            trace, at = step.answers[link]
            segment = [hops[other] for other in links[first : index + 1]]
            timings = attribute(segment, trace, total_s=at - sent[-1], num_tokens=num_tokens)
            self.timings.extend(timings)
            if len(sent) == 1 and step.trouble is None:
                for timing in timings:
                    self._peers.measured(timing.peer_id, timing.overhead_s)
