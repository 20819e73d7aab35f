"""The server's face to other peers: answers `info` and runs session streams.

Every value that a peer sent is checked here, once; behind this module steps are trusted.

    Stream ──OpenSession──► check, admit ──► executor.open
           ◄─SessionOpened─
           ──Step──────────► check ──► executor.run ──► StepResult ──► Stream         until FIN, an error or silence
"""

import logging
from collections import Counter
from dataclasses import dataclass

import torch

from swarm import __version__
from swarm.codec import decode_tensor, encode_tensor, torch_dtype
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy, PeerTimeout
from swarm.protocol import MAX_META_BYTES, Info, InfoRequest, OpenSession, SessionOpened, Step, StepResult
from swarm.server.executor import Executor
from swarm.server.pages import PAGE_SIZE
from swarm.server.scheduler import CachedSession, Job
from swarm.transport import EndOfStream, Limits, Stream
from swarm.types import ServerState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLimits:
    """What one server accepts."""

    max_sessions: int = 256
    """Sessions at once."""
    max_rows: int = 2048
    """Sequences at once, over all sessions."""
    max_stateful_rows: int = 128
    """The same where each has a recurrent state."""
    max_peer_share: float = 0.5
    """Part of these that one peer may take."""
    max_step_tokens: int = 1024
    """Tokens in one step, over all its rows."""
    open_timeout_s: float = 10.0
    """How long a new stream may take to say what it wants."""
    idle_timeout_s: float = 900.0
    """How long a session may be silent before its cache is freed."""
    send_timeout_s: float = 30.0
    """How long a client may leave its answer unread."""


class Handler:
    """Serves one span of blocks.

    Args:
        executor: the device thread that runs the blocks.
        model: content digest of the checkpoint.
        model_name: what people call it.
        quantization: how the weights are stored, for `info`.
        max_positions: longest sequence that the model can run.
        limits: what to refuse.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        model: str,
        model_name: str,
        quantization: str,
        max_positions: int,
        limits: HandlerLimits | None = None,
    ):
        self.executor = executor
        self.state = ServerState.ONLINE
        self.num_sessions = 0
        self.num_rows = 0
        self._model, self._model_name = model, model_name
        self._quantization, self._max_positions = quantization, max_positions
        self._limits = limits or HandlerLimits()
        self._rows_of: Counter[str] = Counter()
        self._sessions_of: Counter[str] = Counter()
        # fp32 is the widest dtype that a step may have
        largest = (Limits().max_message_bytes - MAX_META_BYTES) // (4 * executor.span.hidden_size)
        self._max_step_tokens = max(1, min(self._limits.max_step_tokens, largest))

    async def info(self, stream: Stream) -> None:
        """Answer one InfoRequest."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, InfoRequest):
            raise InvalidRequest(f"expected InfoRequest, got {type(message).__name__}")
        await stream.send(self.describe(), timeout_s=self._limits.send_timeout_s)

    def describe(self) -> Info:
        """What `info` answers."""
        span = self.executor.span
        return Info(
            model=self._model,
            model_name=self._model_name,
            start=span.blocks.start,
            end=span.blocks.end,
            state=int(self.state),
            version=__version__,
            dtype=str(span.dtype).removeprefix("torch."),
            quantization=self._quantization,
            num_sessions=self.num_sessions,
            kv_free_tokens=self.executor.free_tokens,
            kv_total_tokens=self.executor.total_tokens,
        )

    async def session(self, stream: Stream) -> None:
        """Run one session until the client ends it, errs or falls silent; its cache is freed in every case."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, OpenSession):
            raise InvalidRequest(f"expected OpenSession, got {type(message).__name__}")
        self._admit(message, stream.peer_id)
        session = self.executor.open(message.blocks, message.batch_size)
        self._count(stream.peer_id, 1, message.batch_size)
        try:
            opened = SessionOpened(max_step_tokens=self._max_step_tokens, can_rollback=not self.executor.span.stateful)
            await stream.send(opened, timeout_s=self._limits.send_timeout_s)
            await self._run_steps(stream, message, session)
        finally:
            self.executor.close(session)
            self._count(stream.peer_id, -1, -message.batch_size)

    def _count(self, peer_id: str, sessions: int, rows: int) -> None:
        self.num_sessions += sessions
        self.num_rows += rows
        for counter, change in ((self._sessions_of, sessions), (self._rows_of, rows)):
            counter[peer_id] += change
            if not counter[peer_id]:
                del counter[peer_id]

    async def _run_steps(self, stream: Stream, opened: OpenSession, session: CachedSession) -> None:
        lengths = [0] * opened.batch_size
        while True:
            try:
                message, body = await stream.receive(timeout_s=self._limits.idle_timeout_s)
            except EndOfStream:
                return
            except PeerTimeout:
                raise PeerTimeout(f"session closed after {self._limits.idle_timeout_s:.0f} s of silence") from None
            if not isinstance(message, Step):
                raise InvalidRequest(f"expected Step, got {type(message).__name__}")
            hidden_states = self._check_step(message, body, opened, lengths)
            job = await self.executor.run(session, message, hidden_states)
            lengths = [sum(pair) for pair in zip(message.positions, message.num_tokens, strict=True)]
            reply, payload = _reply(job)
            await stream.send(reply, payload, timeout_s=self._limits.send_timeout_s)

    def _admit(self, message: OpenSession, peer_id: str) -> None:
        """Refuse what can't be served.

        Raises:
            CheckpointMismatch: another checkpoint is asked for.
            InvalidRequest: blocks or lengths that this server never serves.
            PeerBusy: not now.
        """
        span = self.executor.span
        if message.model != self._model:
            raise CheckpointMismatch(
                f"this server runs {self._model_name} {self._model[:12]}, not {message.model[:12]}"
            )
        if not span.blocks.covers(message.blocks):
            raise InvalidRequest(f"this server runs blocks {span.blocks}, not {message.blocks}")
        if message.max_length > self._max_positions:
            raise InvalidRequest(
                f"{message.max_length} tokens asked, {self._model_name} has {self._max_positions} positions"
            )
        if self.state is not ServerState.ONLINE:
            raise PeerBusy(f"the server is {self.state.name}", retry_after_s=60.0)
        self._admit_rows(message.batch_size, peer_id)

    def _admit_rows(self, batch_size: int, peer_id: str) -> None:
        """Refuse a session beyond the limits of all peers together, or of this one.

        Raises:
            PeerBusy: with what is open and what the limits are.
        """
        limits, share = self._limits, self._limits.max_peer_share
        max_rows = limits.max_stateful_rows if self.executor.span.stateful else limits.max_rows
        for sessions, rows, part in (
            (self.num_sessions, self.num_rows, 1.0),
            (self._sessions_of[peer_id], self._rows_of[peer_id], share),
        ):
            if sessions >= part * limits.max_sessions or rows + batch_size > part * max_rows:
                whose = "" if part == 1.0 else "you have "
                raise PeerBusy(
                    f"{whose}{sessions} sessions with {rows} rows open, limits {part * limits.max_sessions:.0f} and"
                    f" {part * max_rows:.0f}",
                    retry_after_s=5.0,
                )
        if batch_size * PAGE_SIZE > self.executor.total_tokens:
            raise PeerBusy(
                f"{batch_size} rows need at least {batch_size} pages of KV cache, the server has"
                f" {self.executor.total_tokens // PAGE_SIZE}",
                retry_after_s=600.0,
            )

    def _check_step(self, step: Step, body: memoryview, opened: OpenSession, lengths: list[int]) -> torch.Tensor:
        """The hidden states of a step that fits the session.

        Raises:
            InvalidRequest: for rows, positions, counts or a shape that do not fit.
            PeerMisbehaved: for a body of another length than declared.
            PeerBusy: for rows that this server's cache could never hold.
        """
        rows = opened.batch_size
        counts = (len(step.positions), len(step.num_tokens), len(step.num_outputs))
        if counts != (rows, rows, rows) or (step.order is not None and len(step.order) != rows):
            raise InvalidRequest(f"the session has {rows} rows, the step speaks of {counts}")
        if step.order is not None:
            if max(step.order) >= rows:
                raise InvalidRequest(f"order names row {max(step.order)} of {rows}")
            lengths = [lengths[old] for old in step.order]
        for row, (position, count, wanted, length) in enumerate(
            zip(step.positions, step.num_tokens, step.num_outputs, lengths, strict=True)
        ):
            if position > length or (position < length and self.executor.span.stateful):
                raise InvalidRequest(f"row {row} holds {length} tokens, cannot continue at position {position}")
            if wanted > count or position + count > opened.max_length:
                raise InvalidRequest(
                    f"row {row}: {count} tokens ({wanted} outputs) at {position}, session limit {opened.max_length}"
                )
        expected = (sum(step.num_tokens), self.executor.span.hidden_size)
        if step.hidden_states.shape != expected or not 1 <= expected[0] <= self._max_step_tokens:
            raise InvalidRequest(
                f"hidden states of shape {step.hidden_states.shape}, expected {expected} and at most"
                f" {self._max_step_tokens} tokens"
            )
        lengths = [sum(pair) for pair in zip(step.positions, step.num_tokens, strict=True)]
        needed = sum(-(-length // PAGE_SIZE) for length in lengths) * PAGE_SIZE
        if step.order is None and needed > self.executor.total_tokens:
            raise PeerBusy(
                f"the session needs {needed} tokens of KV cache, the server has {self.executor.total_tokens}",
                retry_after_s=600.0,
            )
        return decode_tensor(step.hidden_states, body)


def _reply(job: Job) -> tuple[StepResult, memoryview]:
    """The answer to a finished step, in the dtype and encoding of the question."""
    asked = job.step.hidden_states
    outputs = job.result() if sum(job.step.num_outputs) else job.hidden_states[:0]
    spec, payload = encode_tensor(outputs.to(torch_dtype(asked.dtype)), asked.encoding)
    started = job.started if job.started is not None else job.arrived
    reply = StepResult(
        step_id=job.step.step_id,
        hidden_states=spec,
        queue_us=int((started - job.arrived) * 1e6),
        compute_us=int(job.compute_s * 1e6),
        batch_tokens=job.batch_tokens,
    )
    return reply, payload
