"""Drives a `swarm.session.Session` over the network: carries out its actions, fails over, waits.

    step() ─begin─► Session ─next_action─► FindRoute ─► Peers.route
                       ▲                   Open, Connect, Send ─► Hops ~~► servers
                       │                   Wait ◄─ wake ─┐        Done ─► outputs
                       └── received, failed, link_down ──┴─ on_message, on_failure ◄~~ servers

The hops' readers tell the machine at once what has come, also between steps; the task of the step only carries out
actions. So nothing that one server does or fails to do keeps the others waiting.

Policy: what a server answers to a step of ours is believed when it blames the request, and what any server says of an
adapter when it blames that; anything else that goes wrong blames the server, which is then replaced, until `max_wait_s`
has passed without progress. A step that is late makes us ask every server how far it is: those that are silent are
replaced at once, one that lives but does nothing much later.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.client.config import SessionConfig
from swarm.client.deadlines import Pace, Patience, Watch
from swarm.client.hop_stream import HopStream
from swarm.client.hops import Hops
from swarm.client.moves import MOVE_TIMEOUT_S, Moves
from swarm.client.peers import Peers
from swarm.client.progress import StepShape, find_stuck
from swarm.client.rerouting import Rerouting
from swarm.client.row_adapters import RowAdapters
from swarm.client.running import RunningStep
from swarm.client.timings import HopTiming
from swarm.client.uploads import Uploads
from swarm.errors import (
    AccessDenied,
    AdapterError,
    InvalidRequest,
    PeerBusy,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    RequestError,
    RouteNotFound,
    SwarmError,
)
from swarm.protocol import (
    AdapterLoading,
    AdapterRequest,
    Forwarding,
    HandedOver,
    LinkDown,
    LinkFault,
    Message,
    MoveAway,
    ProbeResult,
    SessionOpened,
    StepResult,
    Waiting,
    printable,
)
from swarm.session import Session
from swarm.session_actions import Connect, Done, FindRoute, Open, Send, Wait
from swarm.transport import Transport
from swarm.types import BlockRange, Hop

__all__ = ["HopTiming", "RemoteSession", "SessionConfig", "WaitingFor"]

logger = logging.getLogger(__name__)

LOADING_PARTS = 256
"""So often, at most, a server that gets the session's adapters may say that there are more of them now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingFor:
    """A server has no room for the step at present."""

    peer_id: str
    expected_s: float
    """Its own estimate of how much longer it takes."""


class RemoteSession:
    """One inference session through the swarm. All methods run on the client's event loop.

    Args:
        peers: who serves the model.
        transport: how to reach them.
        batch_size: rows.
        max_length: most tokens in a row.
        config: patience and encoding.
        adapters: of the rows, where any has one.
    """

    def __init__(
        self,
        peers: Peers,
        transport: Transport,
        *,
        batch_size: int,
        max_length: int,
        config: SessionConfig,
        adapters: RowAdapters | None = None,
    ):
        blocks = BlockRange(0, peers.num_blocks)
        adapter_of = adapters.adapter_of if adapters is not None else ()
        self.machine = Session(
            blocks, batch_size=batch_size, max_length=max_length, push=config.push, adapter_of=adapter_of
        )
        self.timings: deque[HopTiming] = deque(maxlen=8192)
        self.waiting: WaitingFor | None = None
        """Which server has no room for the step under way, as far as known."""
        self._peers, self._config = peers, config
        self._adapters = peers.adapters_of(adapters) if adapters is not None else None
        self._uploads = Uploads(transport, adapters, listener=self) if adapters is not None else None
        self._hops = Hops(
            self.machine, transport, model=peers.model, config=config, listener=self, adapters=self._adapters
        )
        self.moves = Moves(self.machine, self._hops, self)
        """Hops that go to another server while the session goes on."""
        self._rerouting = Rerouting(self.machine, self._hops, self.moves, peers, config, self._adapters)
        self._pace = Pace()
        self._step: RunningStep | None = None
        self._turn = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
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
            self._hops.close_stale()
            self._peers.keep_fresh()
            shape = StepShape(
                step_id=self.machine.step_id,
                order=tuple(order) if order is not None else None,
                base=tuple(positions),
                num_tokens=tuple(num_tokens),
            )
            self._step = step = RunningStep(
                shape,
                hidden_states,
                now=time.monotonic(),
                watch=self._watch(sum(num_tokens)),
                patience=Patience(self._config.max_wait_s),
            )
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
        self._end_step(InvalidRequest("the session was closed"))
        if self._uploads is not None:
            await self._uploads.close()
        await self._hops.close()

    # -- carrying out actions -----------------------------------------------------------------------------------

    async def _run(self, step: RunningStep) -> torch.Tensor:
        while step.error is None:
            action = self.machine.next_action()
            if isinstance(action, Send):
                step.sent(action.link, time.monotonic())
                if not self._hops.send(action):
                    await asyncio.sleep(0)  # a long replay is being queued: heartbeats and other sessions have a turn
            elif isinstance(action, Wait):
                await self._wait(step)
            elif isinstance(action, Done):
                return action.outputs
            elif isinstance(action, Connect):
                step.redirected(action.link)
                self._hops.connect(action)
            elif isinstance(action, Open):
                self._hops.open_all()
                await self._wait(step, is_opening=True)
            else:
                await self._find_route(action, step)
        raise step.error

    async def _find_route(self, action: FindRoute, step: RunningStep) -> None:
        await self._pause(step.patience.pause_s(step.trouble), step)
        try:
            num_tokens, chain = sum(self.machine.lengths) + step.num_tokens, self.machine.route
            hops = await self._peers.route(action.blocks, num_tokens=num_tokens, chain=chain, adapters=self._adapters)
        except (RouteNotFound, PeerError) as error:
            self._had_trouble(step, error)
            return
        if self.machine.next_action() == action:  # no neighbour was lost meanwhile
            self.machine.fallbacks.update(self._peers.pairs_without_push)
            self.machine.routed(hops)
            step.watch = self._watch(sum(self.machine.lengths))  # somebody has to catch up with everything
            step.watch.asked(time.monotonic())  # ask often from now on: catching up counts as progress

    async def _wait(self, step: RunningStep, *, is_opening: bool = False) -> None:
        """Wait until something happens, and look after the servers while nothing does."""
        until = min(step.watch.next_check, self._hops.next_deadline)
        await self._woken(until - time.monotonic())
        now = time.monotonic()
        if now < until:
            return
        silent = self._hops.silent(now)
        for hop in silent:
            reason = f"does not answer within {self._config.probe_timeout_s:g} s"
            self.on_failure(hop, PeerTimeout(reason, peer_id=hop.hop.peer_id))
        if silent:
            return  # nobody else is to blame before they are replaced
        if is_opening:
            step.watch.asked(now)
            step.watch.advanced(now)
        elif step.watch.is_stuck(now):
            self._lose_stuck(step, now)
        elif step.watch.is_late(now):
            self._hops.probe(now)
            step.watch.asked(now)

    async def _pause(self, seconds: float, step: RunningStep) -> None:
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
        max_step_tokens = self._hops.step_tokens(message)
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
        elif isinstance(message, AdapterLoading):
            self._on_loading(hop, message)
        elif isinstance(message, MoveAway):
            self.moves.start(hop, message.within_s)
        elif isinstance(message, HandedOver):
            self.moves.handed_over(hop, message)
        elif isinstance(message, AdapterRequest) and self._uploads is not None:
            self._uploads.send(hop, message)
        elif not isinstance(message, Forwarding):
            raise PeerMisbehaved(f"unexpected {type(message).__name__}", peer_id=hop.hop.peer_id)
        self._wake()

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """A server is lost: its blocks need another. What it says of a step of ours may be our own fault."""
        if not self._hops.drop(hop):
            return
        self.machine.failed(hop.link)
        self._hops.close_stale()
        step = self._step
        is_ours = isinstance(error, AccessDenied | AdapterError) or (
            step is not None and step.is_fed(hop.link) and isinstance(error, RequestError)
        )
        if step is not None and is_ours:
            self._end_step(error)
            return
        self._peers.failed(hop.hop.peer_id, error)
        if step is not None:
            self._had_trouble(step, error)

    # -- what the moves need ------------------------------------------------------------------------------------

    async def replica(self, hop: Hop, tried: frozenset[str]) -> Hop:
        """Another server of a hop's blocks.

        Raises:
            RouteNotFound: there is none that was not tried.
        """
        return await self._peers.replica(
            hop.blocks, without=tried, num_tokens=sum(self.machine.lengths), adapters=self._adapters
        )

    def on_refused(self, hop: Hop, error: SwarmError) -> None:
        """A server did not take the session of another one."""
        self._peers.failed(hop.peer_id, error)

    def on_moved(self, old: HopStream, seconds: float) -> None:
        """A hop has another server now: the step under way, if there is any, goes on there."""
        self._peers.move_costs.measured(old.hop, sum(self.machine.lengths), seconds)
        logger.info("the session has moved from server %s", self._peers.name_of(old.hop.peer_id))
        if (step := self._step) is not None:
            step.has_moved = True
            step.watch.asked(time.monotonic())
            step.watch.advanced(time.monotonic())
        self._wake()

    def _on_result(self, hop: HopStream, message: StepResult, body: memoryview) -> None:
        step = self._step
        if step is None or message.step_id < step.shape.step_id:
            return
        outputs = step.outputs(message, body, hop.hop.peer_id)
        num_new = self.machine.received(
            hop.link,
            step_id=message.step_id,
            positions=message.positions,
            num_tokens=message.num_tokens,
            hidden_states=outputs,
        )
        if step.answered(hop.link, message, time.monotonic(), num_new=num_new):
            self.waiting = None

    def _on_progress(self, hop: HopStream, message: ProbeResult) -> None:
        if hop.probe_sent_at is None:
            return
        hop.probe_sent_at = None
        doubts, hop.doubts = hop.doubts, []
        for link, epoch in doubts:
            self._link_down(link, epoch, LinkFault.UNREACHABLE)
        step, now = self._step, time.monotonic()
        if step is not None:
            step.probed(hop.link, message, now)
            if message.is_waiting:
                self._end_if_over(step, hop, now)

    def _on_waiting(self, hop: HopStream, message: Waiting) -> None:
        step = self._step
        if step is None or message.step_id != step.shape.step_id:
            return
        now, peer_id, expected_s = time.monotonic(), hop.hop.peer_id, message.expected_s
        self.waiting = WaitingFor(peer_id=peer_id, expected_s=expected_s)
        if now - self._logged_waiting_at >= 1.0:
            self._logged_waiting_at = now
            logger.info("server %s has no room yet, expected in %.0f s", self._peers.name_of(peer_id), expected_s)
        step.watch.asked(now)
        step.watch.advanced(now)
        step.patience.waits(now)
        self._end_if_over(step, hop, now)

    def _on_loading(self, hop: HopStream, message: AdapterLoading) -> None:
        """A server is getting the session's adapters; as long as more of them come, that is no trouble."""
        step, now = self._step, time.monotonic()
        if step is None or self._adapters is None:
            return
        step.watch.asked(now)
        step.watch.advanced(now)
        if message.num_bytes >= hop.loaded_bytes + max(1, self._adapters.num_bytes // LOADING_PARTS):
            hop.loaded_bytes = message.num_bytes
            step.patience.nears()
        else:
            step.patience.waits(now)
            self._end_if_over(step, hop, now)

    def _on_link_down(self, hop: HopStream, message: LinkDown) -> None:
        """A server can't send on. If the next one is lost, it is replaced; if it lives, we stand between the two."""
        epoch, target = hop.forward
        if message.epoch != epoch:
            return
        logger.info("server %s can't send on: %s", self._peers.name_of(hop.hop.peer_id), printable(message.text))
        if message.fault is LinkFault.HISTORY_LOST:
            self._link_down(hop.link, epoch, message.fault)
        elif target is None:
            raise PeerMisbehaved("can't send to us, it says", peer_id=hop.hop.peer_id)
        elif (following := self._hops.get(target)) is not None:
            if (hop.link, epoch) not in following.doubts:
                following.doubts.append((hop.link, epoch))
            self._hops.probe(time.monotonic(), following)

    # -- policy -------------------------------------------------------------------------------------------------

    def _link_down(self, link: int, epoch: int, fault: LinkFault) -> None:
        known = set(self.machine.fallbacks)
        self.machine.link_down(link, epoch, fault)
        for pair in self.machine.fallbacks - known:
            self._peers.cannot_push(*pair)
        self._hops.close_stale()

    def _end_if_over(self, step: RunningStep, hop: HopStream, now: float) -> None:
        """A server waits for room: end the step when that has taken as long as the caller wants to wait."""
        if step.patience.is_over(now):
            expected_s = self.waiting.expected_s if self.waiting is not None else 0.0
            reason = f"no room within {self._config.max_wait_s:g} s, expected in {expected_s:.0f} s"
            self._end_step(PeerBusy(reason, peer_id=hop.hop.peer_id, retry_after_s=expected_s))

    def _lose_stuck(self, step: RunningStep, now: float) -> None:
        """All servers live, yet the step does not advance: replace one of them, or the way between two.

        A hop that moves is frozen while it travels, and gets its time; how long that takes has a limit of its own.
        """
        step.watch.heard(now)
        hops = [self._hops[link] for link in self.machine.hops]
        fed = [step.shape.count(lengths) if lengths is not None else None for lengths in self.machine.fed]
        index, is_hop = find_stuck([step.progress(hop.link) for hop in hops], step.shape.expected, fed)
        culprit = hops[index]
        involved = hops[index : index + 1 if is_hop else index + 2]
        if self.moves.is_moving(*involved) and step.may_stand_still(now, MOVE_TIMEOUT_S):
            return
        if not is_hop:
            self._link_down(culprit.link, culprit.forward[0], LinkFault.UNREACHABLE)
            return
        reason = f"gets no further, {now - step.started:.1f} s after the step began"
        self.on_failure(culprit, PeerTimeout(reason, peer_id=culprit.hop.peer_id))

    def _had_trouble(self, step: RunningStep, error: SwarmError) -> None:
        """Another attempt of this step failed: go on, or give up."""
        step.trouble = error
        if (last := step.patience.failed(time.monotonic(), error)) is not None:
            self._end_step(last)
        self._wake()

    def _end_step(self, error: SwarmError) -> None:
        """Let the step under way raise this."""
        if self._step is not None and self._step.error is None:
            self._step.error = error
        self._wake()

    def _abandon(self) -> None:
        """Make the session ready for another step after one that did not end."""
        self.machine.abandon()
        for link in self._hops.drop_unsettled():
            self.machine.failed(link)
        self._hops.close_stale()

    def _watch(self, num_tokens: int) -> Watch:
        return Watch(
            time.monotonic(),
            expected_s=self._pace.expected_s(num_tokens),
            late_s=self._config.late_s,
            stuck_s=self._config.step_timeout_s,
        )

    def _learn(self, step: RunningStep) -> None:
        """Remember what the step took and what each hop had of it."""
        timings = step.timings(self.machine.hops)
        self.timings.extend(timings)
        if self._adapters is not None:
            self._peers.have_adapters(self.machine.route, self._adapters)
        if step.trouble is None and not step.has_moved:
            self._pace.measured(step.num_tokens, time.monotonic() - step.started)
        if step.is_plain and step.num_tokens <= self.machine.batch_size:
            self._peers.measured(timings)
            self._rerouting.measured(timings)
