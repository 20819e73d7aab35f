"""Keeps the link of a session pumped: whatever its receiver lacks is sent on, to the next server or to the client.

    session ──begin, append──► Link ──next_chunk──► Sender ──► push stream to the next server    (after a Forward)
                                                           └─► session stream to the client      (last hop, or star)

Sending usually happens at once, inside `pump`; only when the stream is full does the task of `run` take over. A lost
next server leaves the link disconnected: outputs are kept, the client is told, and names another with a new Forward.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from swarm.codec import encode_tensor, torch_dtype
from swarm.errors import PeerMisbehaved, SwarmError
from swarm.link import HistoryLost, Link
from swarm.protocol import (
    MAX_HOPS,
    Forward,
    Forwarding,
    HopTrace,
    LinkDown,
    LinkFault,
    Message,
    TensorSpec,
)
from swarm.server.backlog import StepStart
from swarm.server.control import Control
from swarm.server.limits import HandlerLimits
from swarm.server.push import PushStream, for_the_client, greet
from swarm.server.session_state import Sent
from swarm.server.work import Produced, ProducedRow
from swarm.step_chunk import StepChunk
from swarm.transport import EndOfStream

log = logging.getLogger(__name__)

BURST = 8
"""Messages that `pump` sends in one go, before others on the loop get their turn."""


class Sender:
    """The sending side of one session.

    Args:
        num_rows: rows of the session.
        client: the session stream.
        control: for what the client is told besides outputs.
        is_last: whether the outputs are the client's from the start.
        max_tokens: most tokens in one message that we send.
        open_push: opens a stream to a peer's push service.
        limits: patience, and whether history is kept.
        on_progress: called when something was sent that had to wait, or there is a new receiver.
        on_client_lost: called when the client can't be sent to.
    """

    def __init__(
        self,
        num_rows: int,
        client: PushStream,
        control: Control,
        *,
        is_last: bool,
        max_tokens: int,
        open_push: Callable[[str], Awaitable[PushStream]],
        limits: HandlerLimits,
        on_progress: Callable[[], None],
        on_client_lost: Callable[[SwarmError], None],
    ):
        self.link = Link(num_rows, to_client=is_last, keeps_history=limits.history_bytes > 0)
        if is_last:
            self.link.connect(held=(0,) * num_rows, as_of=-2, max_step_tokens=max_tokens, to_client=True)
        self.trace: tuple[HopTrace, ...] = ()
        """What came with the last chunk that came in."""
        self._client, self._control = client, control
        self._target: PushStream | None = client if is_last else None
        self._max_tokens, self._open_push, self._limits = max_tokens, open_push, limits
        self._on_progress, self._on_client_lost = on_progress, on_client_lost
        self._spec: TensorSpec | None = None
        self._waiting: tuple[PushStream, Message, memoryview] | None = None
        self._wake = asyncio.Event()
        self._forwarding: asyncio.Task[None] | None = None
        self._queue_s = self._compute_s = 0.0
        self._batch_tokens = 0

    # -- what belongs to the receiver ---------------------------------------------------------------------------

    def begin(self, start: StepStart) -> None:
        """A new step; its outputs follow."""
        self._spec = start.spec
        self.link.begin(start.step_id, order=start.order, base=start.base, outputs_from=start.outputs_from)

    def append(self, produced: Produced) -> None:
        """The outputs of a batch belong to the receiver now."""
        for row in produced.rows:
            self._append_row(row)
        self._queue_s += produced.queue_s
        self._compute_s += produced.compute_s
        self._batch_tokens = max(self._batch_tokens, produced.batch_tokens)

    def _append_row(self, row: ProducedRow) -> None:
        assert self._spec is not None
        outputs = row.hidden_states.to(torch_dtype(self._spec.dtype))
        if outputs.untyped_storage().nbytes() > outputs.nbytes:
            outputs = outputs.clone()  # or the history of one row would keep whole batches
        self.link.append(row.row, row.position, outputs)

    # -- moving to another server ---------------------------------------------------------------------------------

    def save(self) -> Sent | None:
        """What another server needs to send on in place of us; None before the first output."""
        spec = self._spec
        return None if spec is None else Sent(link=self.link.save(), dtype=spec.dtype, encoding=spec.encoding)

    def resume(self, sent: Sent | None) -> None:
        """Go on, before anything was sent, where another server was."""
        if sent is not None:
            self._spec = TensorSpec(sent.dtype, (0, 1), sent.encoding)
            self.link.resume(sent.link)

    # -- sending ------------------------------------------------------------------------------------------------

    @property
    def is_blocked(self) -> bool:
        """Whether the receiver makes no room at present."""
        return self._waiting is not None

    @property
    def has_receiver(self) -> bool:
        """Whether there is anybody to send to."""
        return self._target is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left that the client is to get from us."""
        return self._target is not self._client or (self._waiting is None and not self.link.num_unsent)

    def pump(self) -> None:
        """Send what the receiver lacks, as far as there is room; the task of `run` does the rest."""
        if self._waiting is not None:
            return
        for _ in range(BURST):
            if (waiting := self._next()) is None:
                return
            try:
                sent = waiting[0].send_now(waiting[1], waiting[2])
            except SwarmError as error:
                return self._lost(waiting[0], error)
            if not sent:
                self._waiting = waiting
                break
        self._wake.set()

    async def run(self) -> None:
        """Send what `pump` could not, for as long as the session lives."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (waiting := self._waiting or self._next()) is not None:
                self._waiting = waiting
                target, message, body = waiting
                try:
                    await target.send(message, body, timeout_s=self._timeout_s(target))
                except SwarmError as error:
                    self._lost(target, error)
                self._waiting = None
                self._on_progress()
                await asyncio.sleep(0)

    def _next(self) -> tuple[PushStream, Message, memoryview] | None:
        """The next message and to whom it goes; None when there is nothing, or nobody to send to."""
        if self._target is None or (chunk := self.link.next_chunk()) is None:
            return None
        assert self._spec is not None
        spec, body = encode_tensor(chunk.hidden_states.to(torch_dtype(self._spec.dtype)), self._spec.encoding)
        return self._target, self._message(chunk, spec, self._take_trace()), body

    def _message(self, chunk: StepChunk, spec: TensorSpec, trace: tuple[HopTrace, ...]) -> Message:
        return chunk.as_result(spec, trace) if self._target is self._client else chunk.as_step(spec, trace)

    def _take_trace(self) -> tuple[HopTrace, ...]:
        """The hops before us as they came in last, and what we did since we last sent."""
        link_s = (self._target.rtt_s if self._target is not None else None) or 0.0
        own = HopTrace(
            queue_us=max(0, int(self._queue_s * 1e6)),
            compute_us=max(0, int(self._compute_s * 1e6)),
            batch_tokens=self._batch_tokens,
            link_us=int(link_s / 2 * 1e6),
        )
        self._queue_s = self._compute_s = 0.0
        self._batch_tokens = 0
        return (*self.trace[: MAX_HOPS - 1], own)

    def _timeout_s(self, target: PushStream) -> float:
        return self._limits.send_timeout_s if target is self._client else self._limits.push_timeout_s

    def _lost(self, target: PushStream, error: SwarmError) -> None:
        """Sending failed. Where it was a server, the task of `_keep_open` sees the end of the stream, too."""
        if target is self._client:
            self._on_client_lost(error)
        elif target is self._target:
            self._target = None
            self.link.disconnect()

    # -- whom to send to ----------------------------------------------------------------------------------------

    def forward(self, message: Forward, group: asyncio.TaskGroup) -> None:
        """Send to another receiver from now on.

        Raises:
            InvalidRequest: the message does not fit the session.
        """
        if self._forwarding is not None:
            self._forwarding.cancel()
        self._target = None
        try:
            self.link.connect(
                held=message.held,
                as_of=message.as_of,
                max_step_tokens=min(message.max_step_tokens, self._max_tokens),
                to_client=not message.peer_id,
            )
        except HistoryLost as error:
            self._control.tell(LinkDown(epoch=message.epoch, fault=LinkFault.HISTORY_LOST, text=str(error)))
            return
        if message.peer_id:
            self._forwarding = group.create_task(self._keep_open(message))
            return
        self._target = self._client
        self._control.tell(Forwarding(epoch=message.epoch))
        self.pump()
        self._on_progress()

    async def _keep_open(self, message: Forward) -> None:
        """Open a push stream, and watch over it until it ends or a newer Forward cancels this task."""
        timeout_s = self._limits.push_open_timeout_s
        try:
            async with await greet(self._open_push, message.peer_id, message.push_key, timeout_s=timeout_s) as stream:
                self._target = stream
                self._control.tell(Forwarding(epoch=message.epoch))
                self.pump()
                self._on_progress()
                answer, _ = await stream.receive()
                raise PeerMisbehaved(f"{type(answer).__name__} on a push stream", peer_id=stream.peer_id)
        except (SwarmError, EndOfStream) as error:
            text = for_the_client(error)
            log.info("can't send to %s: %s", message.peer_id, error)
        self._target = None
        self.link.disconnect()
        self._control.tell(LinkDown(epoch=message.epoch, fault=LinkFault.UNREACHABLE, text=text))
