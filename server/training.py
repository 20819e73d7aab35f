"""Training as a service: one stream per client and run; micro-batches come in, outputs and gradients go out.

    Stream ──OpenTraining──► TrainingDesk: check, admit ─► ServedTraining
           ──TrainParameters, TrainForward, TrainBackward, TrainForget──► check ─► executor.train ─► Trainer
           ◄──TrainOutputs, TrainGradients, TrainLost── outbox ◄── results, on the loop

The stream is the run's life at this server: when it ends, everything is freed. Every message is checked here; behind
this module micro-batches are trusted. A run whose results wait, or that has much queued, is not read.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from swarm.adapters.delta import BlockDelta
from swarm.adapters.format import Manifest, decode_shard
from swarm.codec import decode_tensor, encode_tensor, torch_dtype
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy, SwarmError
from swarm.protocol import (
    MAX_META_BYTES,
    MAX_STEP_TOKENS,
    Message,
    OpenTraining,
    TensorSpec,
    TrainBackward,
    TrainForget,
    TrainForward,
    TrainGradients,
    TrainingOpened,
    TrainLost,
    TrainOutputs,
    TrainParameters,
)
from swarm.server.blocks.training_pass import Part
from swarm.server.executor import Executor
from swarm.server.trainer import Back, Failed, Forth, Result
from swarm.transport import EndOfStream, Limits, Stream
from swarm.types import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What one server accepts of training."""

    max_runs: int = 64
    """Streams at once."""
    max_runs_per_peer: int = 8
    """Or per member of a private swarm."""
    max_pending_bytes: int = 64 << 20
    """Of one run: micro-batches that wait to be run, and results that wait to be sent; beyond, it is not read."""
    max_parameter_bytes: int = 256 << 20
    """Of one run: all versions of its parameters together."""
    open_timeout_s: float = 10.0
    idle_timeout_s: float = 900.0
    """How long a run may be silent before it is ended."""
    send_timeout_s: float = 120.0
    """How long a client may leave its results unread."""


class TrainingDesk:
    """Admits runs.

    Args:
        executor: runs the blocks.
        model: content digest of the checkpoint.
        model_name: what people call it.
        state: of the server, now.
        limits: what to refuse.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        model: str,
        model_name: str,
        state: Callable[[], ServerState] = lambda: ServerState.ONLINE,
        limits: TrainingLimits | None = None,
    ):
        self._state = state
        self._executor, self._model, self._model_name = executor, model, model_name
        self._limits = limits or TrainingLimits()
        self._runs_of: Counter[str] = Counter()

    @property
    def num_runs(self) -> int:
        """Runs that are open."""
        return self._runs_of.total()

    async def serve(self, stream: Stream) -> None:
        """Serve one run until its client ends it, errs or falls silent; all that it had is freed in every case."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, OpenTraining):
            raise InvalidRequest(f"expected OpenTraining, got {type(message).__name__}")
        self._admit(message, stream.account)
        self._runs_of[stream.account] += 1
        try:
            await ServedTraining(stream, message, executor=self._executor, limits=self._limits).run()
        finally:
            self._runs_of[stream.account] -= 1
            if not self._runs_of[stream.account]:
                del self._runs_of[stream.account]

    def _admit(self, message: OpenTraining, account: str) -> None:
        span, limits = self._executor.span, self._limits
        if message.model != self._model:
            raise CheckpointMismatch(
                f"this server runs {self._model_name} {self._model[:12]}, not {message.model[:12]}"
            )
        if not span.blocks.covers(message.blocks):
            raise PeerBusy(f"this server runs blocks {span.blocks}, not {message.blocks}", retry_after_s=60.0)
        if (state := self._state()) is not ServerState.ONLINE:
            raise PeerBusy(f"the server is {state.name}", retry_after_s=60.0)
        for count, limit in ((self.num_runs, limits.max_runs), (self._runs_of[account], limits.max_runs_per_peer)):
            if count >= limit:
                raise PeerBusy(f"{count} training runs are open, limit {limit}", retry_after_s=5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """A version of the parameters."""

    deltas: Mapping[int, BlockDelta]
    num_virtual: int
    num_bytes: int


class ServedTraining:
    """One run; see the module.

    Args:
        stream: whose account is the client's.
        opened: what the client asked for, admitted.
        executor: runs the blocks.
        limits: sizes and patience.
    """

    def __init__(self, stream: Stream, opened: OpenTraining, *, executor: Executor, limits: TrainingLimits):
        self._stream, self._opened, self._executor, self._limits = stream, opened, executor, limits
        self._span = executor.span
        # fp32 is the widest dtype that hidden states may have
        largest = (Limits().max_message_bytes - MAX_META_BYTES) // (4 * self._span.hidden_size)
        self._max_tokens = max(1, min(MAX_STEP_TOKENS, largest))
        self._versions: dict[int, _Version] = {}
        self._last_number = self._last_version = -1
        self._forth: dict[int, TensorSpec] = {}
        """Of micro-batches on their way forth: what came."""
        self._kept: dict[int, TensorSpec] = {}
        """The same of those that may go back."""
        self._pending: dict[int, int] = {}
        """Bytes of micro-batches that wait to be run."""
        self._outbox: deque[tuple[Message, bytes | memoryview]] = deque()
        self._outbox_bytes = 0
        self._error: SwarmError | None = None
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._run = executor.trainer.new_run(stream.account, opened.blocks, self._told)

    async def run(self) -> None:
        """Serve until the client ends the stream.

        Raises:
            SwarmError: why the run has ended, if not because the client wished so.
        """
        self._executor.train(lambda trainer: trainer.open(self._run))
        good_tokens = min(self._executor.trainer.good_tokens, self._max_tokens)
        try:
            await self._stream.send(TrainingOpened(max_tokens=self._max_tokens, good_tokens=good_tokens))
            await self._read_and_write()
        finally:
            self._executor.train(lambda trainer: trainer.close(self._run))

    async def _read_and_write(self) -> None:
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Take messages until the client ends the stream."""
        while True:
            try:
                message, body = await self._stream.receive(timeout_s=self._limits.idle_timeout_s)
            except EndOfStream:
                return
            if isinstance(message, TrainForward):
                self._forward(message, body)
            elif isinstance(message, TrainBackward):
                self._backward(message, body)
            elif isinstance(message, TrainParameters):
                self._set_parameters(message, body)
            elif isinstance(message, TrainForget):
                self._forget(message)
            else:
                raise InvalidRequest(f"expected a message of training, got {type(message).__name__}")
            while self._outbox_bytes + sum(self._pending.values()) > self._limits.max_pending_bytes:
                self._room.clear()
                await self._room.wait()

    # -- what comes in ------------------------------------------------------------------------------------------

    def _forward(self, message: TrainForward, body: memoryview) -> None:
        number, spec = message.micro_batch, message.hidden_states
        if number <= self._last_number:
            raise InvalidRequest(f"micro-batch {number} after {self._last_number}: numbers ascend, none comes twice")
        version = self._version(message.version)
        self._check_shape(spec, sum(message.num_tokens), f"micro-batch {number}: hidden_states")
        least, most = max(1, version.num_virtual), min(self._max_tokens, self._span.max_positions)
        if min(message.num_tokens) < least or max(message.num_tokens) > most:
            raise InvalidRequest(
                f"micro-batch {number}: sequences of {min(message.num_tokens)} to {max(message.num_tokens)} tokens,"
                f" limits {least} and {most}"
            )
        part = Part(
            hidden_states=decode_tensor(spec, body),
            lengths=message.num_tokens,
            deltas=version.deltas,
            num_virtual=version.num_virtual,
        )
        self._last_number = number
        self._pending[number] = len(body)
        self._forth[number] = spec
        self._executor.train(lambda trainer: trainer.forth(self._run, number, part, keep=message.keep))

    def _backward(self, message: TrainBackward, body: memoryview) -> None:
        number = message.micro_batch
        if number > self._last_number or number in self._pending:
            raise InvalidRequest(f"gradients of micro-batch {number}, whose outputs have not been sent")
        known = self._kept.get(number)
        if known is None:
            self._post(TrainLost(micro_batch=number))
            return
        where = f"micro-batch {number}: gradients"
        self._check_shape(message.gradients, known.shape[0], where)
        gradients = decode_tensor(message.gradients, body)
        if not torch.isfinite(gradients).all():
            raise InvalidRequest(f"{where} have numbers that are not finite")
        self._pending[number] = len(body)
        self._executor.train(lambda trainer: trainer.back(self._run, number, gradients))

    def _set_parameters(self, message: TrainParameters, body: memoryview) -> None:
        if message.version <= self._last_version:
            raise InvalidRequest(f"parameters of version {message.version} after {self._last_version}: stale")
        used = sum(version.num_bytes for version in self._versions.values())
        if used + len(body) > self._limits.max_parameter_bytes:
            raise InvalidRequest(
                f"parameters of version {message.version}: {len(body)} bytes and {used} of other versions,"
                f" limit {self._limits.max_parameter_bytes}"
            )
        manifest = Manifest.decode(body[: message.manifest_bytes], digest=message.digest)
        if manifest.hidden_size != self._span.hidden_size:
            raise InvalidRequest(
                f"parameters for hidden size {manifest.hidden_size}, the model has {self._span.hidden_size}"
            )
        blocks, rest, deltas = self._opened.blocks, body[message.manifest_bytes :], {}
        for info in manifest.within(blocks.start, blocks.end):
            shape = self._span.shape(info.block)
            deltas[info.block] = decode_shard(rest[: info.num_bytes], info, shape, manifest.num_virtual)
            rest = rest[info.num_bytes :]
        if rest:
            raise InvalidRequest(f"{len(rest)} bytes behind the parameters of version {message.version}")
        self._versions[message.version] = _Version(deltas=deltas, num_virtual=manifest.num_virtual, num_bytes=len(body))
        self._last_version = message.version

    def _forget(self, message: TrainForget) -> None:
        for number in message.micro_batches:
            self._kept.pop(number, None)
            self._forth.pop(number, None)
            self._pending.pop(number, None)  # of those that were queued nothing is told any more
        self._executor.train(lambda trainer: trainer.forget(self._run, message.micro_batches))
        for version in message.versions:
            self._versions.pop(version, None)

    def _version(self, version: int) -> _Version:
        if version == -1:
            return _Version(deltas={}, num_virtual=0, num_bytes=0)
        known = self._versions.get(version)
        if known is None:
            raise InvalidRequest(f"version {version} of the parameters is stale; there are {sorted(self._versions)}")
        return known

    def _check_shape(self, spec: TensorSpec, num_tokens: int, what: str) -> None:
        expected = (num_tokens, self._span.hidden_size)
        if spec.shape != expected or not 1 <= num_tokens <= self._max_tokens:
            raise InvalidRequest(f"{what} of shape {spec.shape}, expected {expected} and at most {self._max_tokens}")

    # -- the device thread tells us -----------------------------------------------------------------------------

    def _told(self, result: Result) -> None:
        self._pending.pop(result.number, None)
        if isinstance(result, Failed):
            self._error = result.error
        elif isinstance(result, Forth):
            self._send_outputs(result)
        else:
            self._send_gradients(result)
        self._wake.set()
        self._room.set()

    def _send_outputs(self, result: Forth) -> None:
        spec = self._forth.pop(result.number, None)
        if spec is None:  # the client has forgotten it meanwhile
            self._executor.train(lambda trainer: trainer.forget(self._run, (result.number,)))
            return
        if result.is_kept:
            self._kept[result.number] = spec
        out, body = encode_tensor(result.outputs.to(torch_dtype(spec.dtype)), spec.encoding)
        self._post(TrainOutputs(micro_batch=result.number, is_kept=result.is_kept, hidden_states=out), body)

    def _send_gradients(self, result: Back) -> None:
        spec = self._kept.pop(result.number, None)
        if spec is None or result.input_gradients is None:
            self._post(TrainLost(micro_batch=result.number))
            return
        out, body = encode_tensor(result.input_gradients.to(torch_dtype(spec.dtype)))
        flat = [tensor.float().flatten() for block in sorted(result.deltas) for tensor in result.deltas[block]]
        numbers = torch.cat(flat) if flat else torch.empty(0, dtype=torch.float32)
        message = TrainGradients(micro_batch=result.number, gradients=out, num_parameters=numbers.numel())
        self._post(message, bytes(body) + numbers.numpy().tobytes())

    def _post(self, message: Message, body: bytes | memoryview = b"") -> None:
        self._outbox.append((message, body))
        self._outbox_bytes += len(body)
        self._wake.set()

    async def _write(self) -> None:
        """Send what is in the outbox, until the run fails.

        Raises:
            SwarmError: why it has.
        """
        while self._error is None:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                message, body = self._outbox.popleft()
                await self._stream.send(message, body, timeout_s=self._limits.send_timeout_s)
                self._outbox_bytes -= len(body)
                self._room.set()
        raise self._error
