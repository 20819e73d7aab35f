"""Looks after the servers of one session: hears what they say, notices what they don't, and decides who is to blame.

    servers ~~► HopStream ── on_opened, on_message, on_failure ─► Supervisor ─► Session: received, failed, link_down
                silence ──── check ─────────────────────────────────┘   └─► RunningStep: progress, trouble, its end

Servers are heard at once, also between steps, and nobody is waited for here: what one of them does or fails to do keeps
the others from nothing. What a server answers to a step of ours is believed when it blames the request, and what any
server says of an adapter when it blames that; anything else that goes wrong blames the server, which is then replaced,
until `max_wait_s` has passed without progress. A server that is silent when it is asked is lost at once, one that lives
but does nothing much later. Knows nothing of routes: whoever drives the machine finds others in place of the lost.
"""

import logging
import time
from dataclasses import dataclass

from swarm.client.alarm import Alarm
from swarm.client.config import SessionConfig
from swarm.client.hop_stream import HopStream
from swarm.client.hops import Hops
from swarm.client.moves import MOVE_TIMEOUT_S, Moves
from swarm.client.peers import Peers
from swarm.client.progress import find_stuck
from swarm.client.row_adapters import RowAdapters
from swarm.client.running import RunningStep
from swarm.client.uploads import Uploads
from swarm.errors import AccessDenied, AdapterError, PeerBusy, PeerMisbehaved, PeerTimeout, RequestError, SwarmError
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
from swarm.transport import Transport
from swarm.types import Hop

logger = logging.getLogger(__name__)

LOADING_PARTS = 256
"""So often, at most, a server that gets the session's adapters may say that there are more of them now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingFor:
    """A server has no room for the step at present."""

    peer_id: str
    expected_s: float
    """Its own estimate of how much longer it takes."""


class Supervisor:
    """See the module. It owns the session's streams, and what goes beside them: moves, and adapters for servers.

    Args:
        machine: the session.
        peers: are told who failed, and who can't push to whom.
        transport: how to reach servers.
        config: patience and encoding.
        adapters: of the rows, where any has one.
    """

    def __init__(
        self,
        machine: Session,
        peers: Peers,
        transport: Transport,
        *,
        config: SessionConfig,
        adapters: RowAdapters | None = None,
    ):
        self.step: RunningStep | None = None
        """The step under way."""
        self.waiting: WaitingFor | None = None
        """Which server has no room for it, as far as known."""
        self.alarm = Alarm()
        """Rings when a server has said something, or is lost."""
        self.adapters = peers.adapters_of(adapters) if adapters is not None else None
        self.hops = Hops(machine, transport, model=peers.model, config=config, listener=self, adapters=self.adapters)
        self.moves = Moves(machine, self.hops, self)
        """Hops that go to another server while the session goes on."""
        self._uploads = Uploads(transport, adapters, listener=self) if adapters is not None else None
        self._machine, self._peers, self._config = machine, peers, config
        self._logged_waiting_at = float("-inf")

    async def close(self) -> None:
        """End the session on all its servers, without waiting for any of them."""
        if self._uploads is not None:
            await self._uploads.close()
        await self.hops.close()

    # -- the step under way -------------------------------------------------------------------------------------

    def begin(self, step: RunningStep) -> None:
        """This step is under way now."""
        self.step = step

    def end(self) -> None:
        """No step is under way any more."""
        self.step = self.waiting = None

    def fail(self, error: SwarmError) -> None:
        """Let the step under way raise this."""
        if self.step is not None and self.step.error is None:
            self.step.error = error
        self.alarm.ring()

    def had_trouble(self, step: RunningStep, error: SwarmError) -> None:
        """Another attempt of this step failed: go on, or give up."""
        step.trouble = error
        if (last := step.patience.failed(time.monotonic(), error)) is not None:
            self.fail(last)
        self.alarm.ring()

    def abandon(self) -> None:
        """Make the session ready for another step after one that did not end."""
        self._machine.abandon()
        for link in self.hops.drop_unsettled():
            self._machine.failed(link)
        self.hops.close_stale()

    # -- silence ------------------------------------------------------------------------------------------------

    def next_check(self, step: RunningStep) -> float:
        """When to `check`, if nothing happens before."""
        return min(step.watch.next_check, self.hops.next_deadline)

    def check(self, step: RunningStep, now: float, *, is_opening: bool) -> None:
        """Nothing has happened for a while: ask, or replace who should have answered, or should have got further."""
        silent = self.hops.silent(now)
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
            self.hops.probe(now)
            step.watch.asked(now)

    def _lose_stuck(self, step: RunningStep, now: float) -> None:
        """All servers live, yet the step does not advance: replace one of them, or the way between two.

        A hop that moves is frozen while it travels, and gets its time; how long that takes has a limit of its own.
        """
        step.watch.heard(now)
        hops = [self.hops[link] for link in self._machine.hops]
        fed = [step.shape.count(lengths) if lengths is not None else None for lengths in self._machine.fed]
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

    # -- what the hops tell -------------------------------------------------------------------------------------

    def on_opened(self, hop: HopStream, message: SessionOpened) -> None:
        """A server has opened the session."""
        max_step_tokens = self.hops.step_tokens(message)
        self._machine.opened(hop.link, max_step_tokens=max_step_tokens, can_rollback=message.can_rollback)
        self.alarm.ring()

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
        self.alarm.ring()

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """A server is lost: its blocks need another. What it says of a step of ours may be our own fault."""
        if not self.hops.drop(hop):
            return
        self._machine.failed(hop.link)
        self.hops.close_stale()
        step = self.step
        is_ours = isinstance(error, AccessDenied | AdapterError) or (
            step is not None and step.is_fed(hop.link) and isinstance(error, RequestError)
        )
        if step is not None and is_ours:
            self.fail(error)
            return
        self._peers.failed(hop.hop.peer_id, error)
        if step is not None:
            self.had_trouble(step, error)

    def _on_result(self, hop: HopStream, message: StepResult, body: memoryview) -> None:
        step = self.step
        if step is None or message.step_id < step.shape.step_id:
            return
        outputs = step.outputs(message, body, hop.hop.peer_id)
        num_new = self._machine.received(
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
        step, now = self.step, time.monotonic()
        if step is not None:
            step.probed(hop.link, message, now)
            if message.is_waiting:
                self._end_if_over(step, hop, now)

    def _on_waiting(self, hop: HopStream, message: Waiting) -> None:
        step = self.step
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
        step, now = self.step, time.monotonic()
        if step is None or self.adapters is None:
            return
        step.watch.asked(now)
        step.watch.advanced(now)
        if message.num_bytes >= hop.loaded_bytes + max(1, self.adapters.num_bytes // LOADING_PARTS):
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
        elif (following := self.hops.get(target)) is not None:
            if (hop.link, epoch) not in following.doubts:
                following.doubts.append((hop.link, epoch))
            self.hops.probe(time.monotonic(), following)

    def _link_down(self, link: int, epoch: int, fault: LinkFault) -> None:
        known = set(self._machine.fallbacks)
        self._machine.link_down(link, epoch, fault)
        for pair in self._machine.fallbacks - known:
            self._peers.cannot_push(*pair)
        self.hops.close_stale()

    def _end_if_over(self, step: RunningStep, hop: HopStream, now: float) -> None:
        """A server waits for room: end the step when that has taken as long as the caller wants to wait."""
        if step.patience.is_over(now):
            expected_s = self.waiting.expected_s if self.waiting is not None else 0.0
            reason = f"no room within {self._config.max_wait_s:g} s, expected in {expected_s:.0f} s"
            self.fail(PeerBusy(reason, peer_id=hop.hop.peer_id, retry_after_s=expected_s))

    # -- what the moves need ------------------------------------------------------------------------------------

    async def replica(self, hop: Hop, tried: frozenset[str]) -> Hop:
        """Another server of a hop's blocks.

        Raises:
            RouteNotFound: there is none that was not tried.
        """
        return await self._peers.replica(
            hop.blocks, without=tried, num_tokens=sum(self._machine.lengths), adapters=self.adapters
        )

    def on_refused(self, hop: Hop, error: SwarmError) -> None:
        """A server did not take the session of another one."""
        self._peers.failed(hop.peer_id, error)

    def on_moved(self, old: HopStream, seconds: float) -> None:
        """A hop has another server now: the step under way, if there is any, goes on there."""
        self._peers.move_costs.measured(old.hop, sum(self._machine.lengths), seconds)
        logger.info("the session has moved from server %s", self._peers.name_of(old.hop.peer_id))
        if (step := self.step) is not None:
            step.has_moved = True
            step.watch.asked(time.monotonic())
            step.watch.advanced(time.monotonic())
        self.alarm.ring()
