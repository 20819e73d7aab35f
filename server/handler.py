"""The server's face to other peers: answers `info` and runs session streams.

Every value that a peer sent is checked here, once; behind this module steps are trusted.

    Stream ──OpenSession──► check, admit ──► executor.open
           ◄─SessionOpened─
           ──Step──────────► check ──► executor.run ──► StepResult ──► Stream         until FIN, an error or silence
"""

import logging
from dataclasses import dataclass

import torch

from swarm import __version__
from swarm.codec import decode_tensor, encode_tensor, torch_dtype
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy, PeerTimeout
from swarm.protocol import Info, InfoRequest, OpenSession, SessionOpened, Step, StepResult
from swarm.server.executor import Executor
from swarm.server.pages import PAGE_SIZE
from swarm.server.scheduler import CachedSession, Job
from swarm.transport import EndOfStream, Stream
from swarm.types import ServerState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLimits:
    """What one server accepts."""

    max_sessions: int = 256
    """Sessions at once."""
    max_rows: int = 2048
    """Sequences at once, over all sessions."""
    max_step_tokens: int = 1024
    """Tokens in one step, over all its rows."""
    open_timeout_s: float = 10.0
    """How long a new stream may take to say what it wants."""
    idle_timeout_s: float = 900.0
    """How long a session may be silent before its cache is freed."""


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

    async def info(self, stream: Stream) -> None:
        """Answer one InfoRequest."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, InfoRequest):
            raise InvalidRequest(f"expected InfoRequest, got {type(message).__name__}")
        await stream.send(self.describe())

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
        self._admit(message)
        self.num_sessions += 1
        self.num_rows += message.batch_size
        session = self.executor.open(message.blocks, message.batch_size)
        try:
            can_rollback = not self.executor.span.stateful
            limit = self._limits.max_step_tokens
            await stream.send(SessionOpened(max_step_tokens=limit, can_rollback=can_rollback))
            await self._run_steps(stream, message, session)
        finally:
            self.executor.close(session)
            self.num_sessions -= 1
            self.num_rows -= message.batch_size

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
            await stream.send(reply, payload)

    def _admit(self, message: OpenSession) -> None:
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
        rows = self.num_rows + message.batch_size
        if self.num_sessions >= self._limits.max_sessions or rows > self._limits.max_rows:
            raise PeerBusy(
                f"{self.num_sessions} sessions with {self.num_rows} rows open, limits {self._limits.max_sessions} and"
                f" {self._limits.max_rows}",
                retry_after_s=5.0,
            )
        needed = message.batch_size * -(-message.max_length // PAGE_SIZE) * PAGE_SIZE
        if needed > self.executor.total_tokens:
            raise PeerBusy(
                f"the session may need {needed} tokens of KV cache, the server has {self.executor.total_tokens}",
                retry_after_s=600.0,
            )

    def _check_step(self, step: Step, body: memoryview, opened: OpenSession, lengths: list[int]) -> torch.Tensor:
        """The hidden states of a step that fits the session.

        Raises:
            InvalidRequest: for rows, positions, counts or a shape that do not fit.
            PeerMisbehaved: for a body of another length than declared.
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
        if step.hidden_states.shape != expected or not 1 <= expected[0] <= self._limits.max_step_tokens:
            raise InvalidRequest(
                f"hidden states of shape {step.hidden_states.shape}, expected {expected} and at most"
                f" {self._limits.max_step_tokens} tokens"
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
