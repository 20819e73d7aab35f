"""Drives a `swarm.session.Session` over the network: carries out its actions, and waits for what comes of them.

    step() ─begin─► Session ─next_action─► FindRoute ─► Peers.route
                       ▲                   Open, Connect, Send ─► Hops ~~► servers
                       │                   Wait ◄─ Alarm ─┐       Done ─► outputs
                       └── received, failed, link_down ───┴─ Supervisor ◄~~ servers

The task of a step only carries out actions. What servers say, and who is lost, reaches the machine through
`client.supervisor`, at any time; here it is only seen in the next action. A step is over when it is done, or when the
supervisor, the caller or the end of the session ends it; the session can go on after any of these.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import torch

from swarm.client.config import SessionConfig
from swarm.client.deadlines import Pace, Patience, Watch
from swarm.client.moves import Moves
from swarm.client.peers import Peers
from swarm.client.progress import StepShape
from swarm.client.rerouting import Rerouting
from swarm.client.row_adapters import RowAdapters
from swarm.client.running import RunningStep
from swarm.client.supervisor import Supervisor, WaitingFor
from swarm.client.timings import HopTiming
from swarm.errors import InvalidRequest, PeerError, RouteNotFound
from swarm.session import Session
from swarm.session_actions import Connect, Done, FindRoute, Open, Send, Wait
from swarm.transport import Transport
from swarm.types import BlockRange, Hop


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
        self._peers, self._config = peers, config
        self._supervisor = Supervisor(self.machine, peers, transport, config=config, adapters=adapters)
        self._hops, self._alarm = self._supervisor.hops, self._supervisor.alarm
        self._adapters = self._supervisor.adapters
        self._rerouting = Rerouting(self.machine, self._hops, self.moves, peers, config, self._adapters)
        self._pace = Pace()
        self._turn = asyncio.Lock()
        self._is_closed = False

    @property
    def moves(self) -> Moves:
        """Hops that go to another server while the session goes on."""
        return self._supervisor.moves

    @property
    def waiting(self) -> WaitingFor | None:
        """Which server has no room for the step under way, as far as known."""
        return self._supervisor.waiting

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
            step = self._begin(shape, hidden_states)
            try:
                outputs = await self._run(step)
            except BaseException:
                self._supervisor.abandon()
                raise
            finally:
                self._supervisor.end()
            self._learn(step)
            return outputs

    def _begin(self, shape: StepShape, hidden_states: torch.Tensor) -> RunningStep:
        watch, patience = self._watch(sum(shape.num_tokens)), Patience(self._config.max_wait_s)
        step = RunningStep(shape, hidden_states, now=time.monotonic(), watch=watch, patience=patience)
        self._supervisor.begin(step)
        return step

    async def close(self) -> None:
        """End the session on all its servers, without waiting for any of them; a step under way fails."""
        self._is_closed = True
        self._supervisor.fail(InvalidRequest("the session was closed"))
        await self._supervisor.close()

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
            self._supervisor.had_trouble(step, error)
            return
        if self.machine.next_action() == action:  # no neighbour was lost meanwhile
            self.machine.fallbacks.update(self._peers.pairs_without_push)
            self.machine.routed(hops)
            step.watch = self._watch(sum(self.machine.lengths))  # somebody has to catch up with everything
            step.watch.asked(time.monotonic())  # ask often from now on: catching up counts as progress

    async def _wait(self, step: RunningStep, *, is_opening: bool = False) -> None:
        """Wait until something happens, and look after the servers while nothing does."""
        until = self._supervisor.next_check(step)
        await self._alarm.wait(until - time.monotonic())
        if (now := time.monotonic()) >= until:
            self._supervisor.check(step, now, is_opening=is_opening)

    async def _pause(self, seconds: float, step: RunningStep) -> None:
        """Wait before another attempt, unless the step ends."""
        until = time.monotonic() + seconds
        while step.error is None and (left_s := until - time.monotonic()) > 0:
            await self._alarm.wait(left_s)

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
