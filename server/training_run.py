"""One training run on a server: micro-batches come in, outputs and gradients go out.

    Stream ──TrainParameters──► ParameterVersions ─┐
           ──TrainForward, TrainBackward, TrainForget──► check ─► executor.train ─► Trainer
           ◄──TrainOutputs, TrainGradients, TrainLost── outbox ◄── results, on the loop
    TrainingLinks ──TrainForward of the server before, TrainBackward of the next──► check
                  ◄── outputs for the next server, gradients for the one before

The client's stream is the run's life at this server: when it ends, everything is freed. Every message is checked here;
behind this module micro-batches are trusted. A run whose results wait, or that has much queued, is not read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from swarm.codec import decode_tensor, encode_tensor, torch_dtype
from swarm.errors import InvalidRequest, PeerBusy, SwarmError
from swarm.protocol import (
    MAX_META_BYTES,
    MAX_STEP_TOKENS,
    OpenTraining,
    TensorSpec,
    TrainBackward,
    TrainForget,
    TrainForward,
    TrainGradients,
    TrainingOpened,
    TrainLink,
    TrainLinked,
    TrainLost,
    TrainOutputs,
    TrainParameters,
)
from swarm.server.blocks.training_pass import Part
from swarm.server.executor import Executor
from swarm.server.limits import TrainingLimits
from swarm.server.push import PushStream
from swarm.server.trainer import Back, Failed, Forth, Result
from swarm.server.training_links import Outbox, TrainingLinks
from swarm.server.training_versions import ParameterVersions
from swarm.transport import EndOfStream, Limits, Stream


@dataclass(frozen=True, slots=True)
class _Coming:
    """A micro-batch on its way forth, or kept."""

    spec: TensorSpec
    """Of its hidden states, as they came."""
    version: int
    num_tokens: tuple[int, ...]
    is_pushed: bool
    """Whether it came from the server before, which then gets its gradients."""


class ServedTraining:
    """One run; see the module.

    Args:
        stream: whose account is the client's.
        opened: what the client asked for, admitted.
        executor: runs the blocks.
        open_push: opens a stream to a peer's push service.
        limits: sizes and patience.
    """

    def __init__(
        self,
        stream: Stream,
        opened: OpenTraining,
        *,
        executor: Executor,
        open_push: Callable[[str], Awaitable[PushStream]],
        limits: TrainingLimits,
    ):
        self._stream, self._opened, self._executor, self._limits = stream, opened, executor, limits
        self._span = executor.span
        # fp32 is the widest dtype that hidden states may have
        largest = (Limits().max_message_bytes - MAX_META_BYTES) // (4 * self._span.hidden_size)
        self._max_tokens = max(1, min(MAX_STEP_TOKENS, largest))
        self._versions = ParameterVersions(opened.blocks, self._span, max_bytes=limits.max_parameter_bytes)
        self._last_number = -1
        self._forth: dict[int, _Coming] = {}
        self._kept: dict[int, _Coming] = {}
        """Those that may go back."""
        self._back: dict[int, TrainBackward] = {}
        """On their way back: what came."""
        self._pending: dict[int, int] = {}
        """Bytes of micro-batches that wait to be run."""
        self._forgotten: set[int] = set()
        """Micro-batches that were forgotten before they came."""
        self._outbox = Outbox(stream, timeout_s=limits.send_timeout_s, on_sent=lambda: self._room.set())
        self._links = TrainingLinks(
            open_push,
            take_forward=self._take_pushed,
            take_backward=self._backward,
            on_fault=lambda fault: self._outbox.post(TrainLinked(fault=fault)),
            on_sent=lambda: self._room.set(),
            open_timeout_s=limits.link_timeout_s,
            send_timeout_s=limits.send_timeout_s,
        )
        self._error: SwarmError | None = None
        self._failed = asyncio.Event()
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
            await self._links.close()
            self._executor.train(lambda trainer: trainer.close(self._run))

    def end(self, error: SwarmError) -> None:
        """End the run; the client is told `error`."""
        self._error = error
        self._failed.set()

    async def receive_pushes(self, stream: PushStream) -> None:
        """Take what the server before sends.

        Raises:
            SwarmError: what was wrong, or that the run has ended.
        """
        await self._links.receive_pushes(stream)

    async def _read_and_write(self) -> None:
        tasks = [asyncio.create_task(it) for it in (self._read(), self._outbox.run(), self._failed.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._error is not None:
                raise self._error
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
                self._versions.add(message, body)
            elif isinstance(message, TrainForget):
                self._forget(message)
            elif isinstance(message, TrainLink):
                self._links.open(message, on_open=lambda: self._outbox.post(TrainLinked(fault="")))
            else:
                raise InvalidRequest(f"expected a message of training, got {type(message).__name__}")
            await self._wait_for_room()

    async def _take_pushed(self, message: TrainForward, body: memoryview) -> None:
        """A micro-batch from the server before; its version of the parameters may come later, from the client."""
        await self._versions.until(message.version)
        self._forward(message, body, is_pushed=True)
        await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while (
            self._outbox.num_bytes + self._links.num_bytes + sum(self._pending.values())
            > self._limits.max_pending_bytes
        ):
            self._room.clear()
            await self._room.wait()

    # -- what comes in ------------------------------------------------------------------------------------------

    def _forward(self, message: TrainForward, body: memoryview, *, is_pushed: bool = False) -> None:
        number, spec = message.micro_batch, message.hidden_states
        if number <= self._last_number:
            raise InvalidRequest(f"micro-batch {number} after {self._last_number}: numbers ascend, none comes twice")
        was_forgotten, self._forgotten = number in self._forgotten, {it for it in self._forgotten if it > number}
        if is_pushed and was_forgotten:
            self._last_number = number
            return
        version = self._versions.get(message.version)
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
        self._forth[number] = _Coming(spec, message.version, message.num_tokens, is_pushed)
        self._executor.train(lambda trainer: trainer.forth(self._run, number, part, keep=message.keep))

    def _backward(self, message: TrainBackward, body: memoryview) -> None:
        number = message.micro_batch
        if number > self._last_number or number in self._pending:
            raise InvalidRequest(f"gradients of micro-batch {number}, whose outputs have not been sent")
        known = self._kept.get(number)
        if known is None:
            if self._outbox.num_bytes > self._limits.max_pending_bytes:
                raise PeerBusy(f"{self._outbox.num_bytes} bytes of results are unread")
            self._outbox.post(TrainLost(micro_batch=number))
            return
        where = f"micro-batch {number}: gradients"
        self._check_shape(message.gradients, known.spec.shape[0], where)
        gradients = decode_tensor(message.gradients, body)
        if not torch.isfinite(gradients).all():
            raise InvalidRequest(f"{where} have numbers that are not finite")
        self._pending[number] = len(body)
        self._back[number] = message
        self._executor.train(lambda trainer: trainer.back(self._run, number, gradients))

    def _forget(self, message: TrainForget) -> None:
        for number in message.micro_batches:
            self._kept.pop(number, None)
            self._forth.pop(number, None)
            self._back.pop(number, None)
            self._pending.pop(number, None)  # of those that were queued nothing is told any more
        self._forgotten |= {number for number in message.micro_batches if number > self._last_number}
        if len(self._forgotten) > self._limits.max_forgotten:
            raise InvalidRequest(f"{len(self._forgotten)} micro-batches forgotten that never came")
        self._executor.train(lambda trainer: trainer.forget(self._run, message.micro_batches))
        for version in message.versions:
            self._versions.forget(version)

    def _check_shape(self, spec: TensorSpec, num_tokens: int, what: str) -> None:
        expected = (num_tokens, self._span.hidden_size)
        if spec.shape != expected or not 1 <= num_tokens <= self._max_tokens:
            raise InvalidRequest(f"{what} of shape {spec.shape}, expected {expected} and at most {self._max_tokens}")

    # -- the device thread tells us -----------------------------------------------------------------------------

    def _told(self, result: Result) -> None:
        self._pending.pop(result.number, None)
        if isinstance(result, Failed):
            self._error = result.error
            self._failed.set()
        elif isinstance(result, Forth):
            self._send_outputs(result)
        else:
            self._send_gradients(result)
        self._room.set()

    def _send_outputs(self, result: Forth) -> None:
        number, coming = result.number, self._forth.pop(result.number, None)
        if coming is None:  # the client has forgotten it meanwhile
            self._executor.train(lambda trainer: trainer.forget(self._run, (number,)))
            return
        if result.is_kept:
            self._kept[number] = coming
        spec, body = encode_tensor(result.outputs.to(torch_dtype(coming.spec.dtype)), coming.spec.encoding)
        if self._links.next is None:
            self._outbox.post(TrainOutputs(micro_batch=number, is_kept=result.is_kept, hidden_states=spec), body)
            return
        onward = TrainForward(
            micro_batch=number,
            version=coming.version,
            num_tokens=coming.num_tokens,
            keep=result.is_kept,
            hidden_states=spec,
        )
        self._links.next.post(onward, body)
        self._outbox.post(TrainOutputs(micro_batch=number, is_kept=result.is_kept, hidden_states=None))

    def _send_gradients(self, result: Back) -> None:
        number = result.number
        coming, asked = self._kept.pop(number, None), self._back.pop(number, None)
        if coming is None or asked is None or result.input_gradients is None:
            self._outbox.post(TrainLost(micro_batch=number))
            return
        flat = [tensor.float().flatten() for block in sorted(result.deltas) for tensor in result.deltas[block]]
        numbers = torch.cat(flat) if flat else torch.empty(0, dtype=torch.float32)
        spec, body = encode_tensor(result.input_gradients.to(torch_dtype(coming.spec.dtype)))
        previous = self._links.previous if coming.is_pushed else None
        if previous is not None:
            onward = TrainBackward(micro_batch=number, gradients=spec, wants_inputs=asked.wants_inputs)
            previous.post(onward, body)
        is_clients = asked.wants_inputs and not coming.is_pushed
        message = TrainGradients(
            micro_batch=number, gradients=spec if is_clients else None, num_parameters=numbers.numel()
        )
        self._outbox.post(message, b"".join([body if is_clients else b"", numbers.numpy().tobytes()]))
