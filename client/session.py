"""Drives a `swarm.session.Session` over the network: opens streams, sends steps, fails over, waits.

    step() ─begin─► Session ──FindRoute──► Peers.route        deadline and back-off are decided here
                       │  ▲───Send──────► Stream (one per hop) ──► server
                       ▼
                     Done ─► outputs

Policy: what a server answers to a step is believed when it blames the request; anything else that goes wrong blames the
server, which is then replaced, until `max_wait_s` has passed without progress.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.client.peers import Peers
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import PeerDisconnected, PeerError, PeerMisbehaved, RequestError, RouteNotFound, SwarmError
from swarm.protocol import SESSION_SERVICE, Encoding, Message, OpenSession, SessionOpened, Step, StepResult
from swarm.session import Action, Done, FindRoute, Hop, Send, Session
from swarm.transport import EndOfStream, Stream, Transport
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """How patient a session is, and how it talks."""

    open_timeout_s: float = 10.0
    """To connect to a server and open the session there."""
    step_timeout_s: float = 120.0
    """To wait for one answer; a dead or stopped server is noticed much earlier by the transport's heartbeat."""
    max_wait_s: float = 30.0
    """To wait for missing blocks or busy servers before giving up."""
    encoding: Encoding = Encoding.RAW
    """How hidden states cross the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTiming:
    """One answered step of one hop."""

    peer_id: str
    blocks: BlockRange
    num_tokens: int
    round_trip_s: float
    compute_s: float
    queue_s: float

    @property
    def overhead_s(self) -> float:
        """What the hop cost besides the blocks and the server's queue."""
        return self.round_trip_s - self.compute_s - self.queue_s


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
        self.machine = Session(blocks, batch_size=batch_size, max_length=max_length)
        self.timings: deque[HopTiming] = deque(maxlen=8192)
        self._peers, self._transport, self._config = peers, transport, config
        self._session_id = os.urandom(16)
        self._streams: dict[int, Stream] = {}
        self._step_id = 0

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order."""
        return self.machine.route

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

        Raises:
            RequestError: the request can't be served by anyone.
            RouteNotFound: blocks stayed missing for `max_wait_s`.
            PeerError: servers kept failing for `max_wait_s`.
        """
        patience = _Patience(self._config.max_wait_s)
        action = self.machine.begin(
            hidden_states, positions=positions, num_tokens=num_tokens, num_outputs=num_outputs, order=order
        )
        try:
            while not isinstance(action, Done):
                if isinstance(action, FindRoute):
                    action = await self._find_route(action, patience)
                else:
                    action = await self._send(action, patience)
        except BaseException:
            self.machine.abandon()
            for link in set(self.machine.hops) - set(self._streams):
                self.machine.lose(link)
            await self._close_stale()
            raise
        return action.outputs

    async def close(self) -> None:
        """End the session on all its servers."""
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            await stream.close()

    async def _find_route(self, action: FindRoute, patience: "_Patience") -> Action:
        while True:
            try:
                hops = await self._peers.route(action.blocks)
            except (RouteNotFound, PeerError) as error:
                await patience.wait(error)
                continue
            self.machine.routed(hops)
            await self._close_stale()
            await self._open_all(patience)
            return self.machine.resend()

    async def _open_all(self, patience: "_Patience") -> None:
        """Open the links that have no stream yet, all at once; those that fail lose their server."""
        new = [(link, hop) for link, hop in self.machine.hops.items() if link not in self._streams]
        results = await asyncio.gather(*(self._open(link, hop) for link, hop in new), return_exceptions=True)
        failure: SwarmError | None = None
        for (link, hop), result in zip(new, results, strict=True):
            if isinstance(result, SwarmError):
                # Also a RequestError: a stale record may have led us to a server that has moved on.
                failure = result
                self._peers.failed(hop.peer_id, result)
                self.machine.failed(link)
            elif isinstance(result, BaseException):
                raise result
        if failure is not None:
            await patience.wait(failure)

    async def _open(self, link: int, hop: Hop) -> None:
        """Open a stream to a server and the session on it; the stream is kept only if all went well."""
        timeout_s = self._config.open_timeout_s
        request = OpenSession(
            session_id=self._session_id,
            model=self._peers.model,
            start=hop.blocks.start,
            end=hop.blocks.end,
            batch_size=self.machine.batch_size,
            max_length=self.machine.max_length,
        )
        stream = await self._transport.open(hop.peer_id, SESSION_SERVICE, timeout_s=timeout_s)
        try:
            await stream.send(request, timeout_s=timeout_s)
            message, _ = await _receive(stream, hop, timeout_s)
            if not isinstance(message, SessionOpened):
                raise PeerMisbehaved(f"expected SessionOpened, got {type(message).__name__}", peer_id=hop.peer_id)
        except BaseException:
            await stream.close()
            raise
        self._streams[link] = stream
        self.machine.opened(link, max_step_tokens=message.max_step_tokens, can_rollback=message.can_rollback)

    async def _send(self, action: Send, patience: "_Patience") -> Action:
        try:
            outputs = await self._exchange(action)
        except PeerError as error:
            self._peers.failed(action.hop.peer_id, error)
            following = self.machine.failed(action.link)
            await self._close_stale()
            await patience.wait(error)
            return following
        patience.reset()
        return self.machine.received(action.link, outputs)

    async def _exchange(self, action: Send) -> torch.Tensor:
        """Send one step to one server and return its outputs [sum(num_outputs), hidden]."""
        stream, hop = self._streams[action.link], action.hop
        self._step_id += 1
        spec, payload = encode_tensor(action.hidden_states, self._config.encoding)
        step = Step(
            step_id=self._step_id,
            positions=action.positions,
            num_tokens=action.num_tokens,
            num_outputs=action.num_outputs,
            order=action.order,
            hidden_states=spec,
        )
        started = time.perf_counter()
        await stream.send(step, payload, timeout_s=self._config.step_timeout_s)
        reply, body = await _receive(stream, hop, self._config.step_timeout_s)
        round_trip_s = time.perf_counter() - started
        expected = (sum(action.num_outputs), action.hidden_states.shape[1])
        if not isinstance(reply, StepResult) or reply.step_id != self._step_id:
            raise PeerMisbehaved(f"expected the result of step {self._step_id}", peer_id=hop.peer_id)
        if reply.hidden_states.shape != expected or reply.hidden_states.dtype != spec.dtype:
            raise PeerMisbehaved(
                f"outputs of shape {reply.hidden_states.shape}, expected {expected}", peer_id=hop.peer_id
            )
        timing = HopTiming(
            peer_id=hop.peer_id,
            blocks=hop.blocks,
            num_tokens=spec.shape[0],
            round_trip_s=round_trip_s,
            compute_s=reply.compute_us / 1e6,
            queue_s=reply.queue_us / 1e6,
        )
        self.timings.append(timing)
        self._peers.measured(hop.peer_id, max(timing.overhead_s, 0.0))
        return decode_tensor(reply.hidden_states, body)

    async def _close_stale(self) -> None:
        """Close the streams of links that the session no longer uses."""
        for link in set(self._streams) - set(self.machine.hops):
            await self._streams.pop(link).close()


async def _receive(stream: Stream, hop: Hop, timeout_s: float) -> tuple[Message, memoryview]:
    """The next message of a stream that must not end yet."""
    try:
        return await stream.receive(timeout_s=timeout_s)
    except EndOfStream:
        raise PeerDisconnected("the server ended the session", peer_id=hop.peer_id) from None


class _Patience:
    """Waits between attempts, longer each time, until no progress was made for `max_wait_s`."""

    def __init__(self, max_wait_s: float):
        self._max_wait_s = max_wait_s
        self.reset()

    def reset(self) -> None:
        """Progress was made."""
        self._deadline = time.monotonic() + self._max_wait_s
        self._attempts = 0

    async def wait(self, error: SwarmError) -> None:
        """Pause before the next attempt.

        Raises:
            SwarmError: `error` itself, when patience is at its end.
        """
        self._attempts += 1
        # The first failure of a server is no reason to pause: another one may be ready.
        pause = (
            0.0 if self._attempts == 1 and not isinstance(error, RouteNotFound) else 0.05 * 2 ** (self._attempts - 1)
        )
        pause = min(pause, MAX_BACKOFF_S)
        if time.monotonic() + pause > self._deadline or (isinstance(error, RequestError) and self._attempts > 3):
            raise error
        await asyncio.sleep(pause)
