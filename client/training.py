"""Drives a `swarm.training.Pipeline` over the network: a run's micro-batches, through chains of servers that may die.

    forth, back ─► Pipeline ─next_action─► TrainingChain ~~► servers
                      ▲                        │
                      └── came_forth, came_back, lost_one, chain_lost ◄~~ answers, failures

Everything goes through the client: outputs of one hop are its inputs for the next. When a hop is lost, the chain is
given up and another one opened over the servers that are known then, until `max_wait_s` has passed without progress.
What a server answers to a micro-batch of ours is believed when it blames the request.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.adapters.format import Manifest
from swarm.client.config import SessionConfig
from swarm.client.deadlines import Patience
from swarm.client.peers import Peers
from swarm.client.training_chain import HopFailed, TrainingChain, open_chain
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
    Message,
    TensorSpec,
    TrainBackward,
    TrainForget,
    TrainForward,
    TrainGradients,
    TrainLost,
    TrainOutputs,
    TrainParameters,
)
from swarm.session import Hop
from swarm.training import Backward, Forget, Forward, MicroBatch, Pipeline
from swarm.transport import Transport
from swarm.types import BlockRange

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameters:
    """A version of what is trained in the blocks."""

    version: int
    manifest: Manifest
    shards: Mapping[int, bytes]
    """By block."""
    num_elements: Mapping[int, int]
    """Numbers of all tensors, by block."""

    def message(self, blocks: BlockRange) -> tuple[TrainParameters, bytes]:
        """What a server of these blocks is sent."""
        data = self.manifest.encode()
        shards = [self.shards[info.block] for info in self.manifest.within(blocks.start, blocks.end)]
        message = TrainParameters(version=self.version, digest=self.manifest.digest, manifest_bytes=len(data))
        return message, b"".join([data, *shards])


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One batch of whole sequences: its micro-batches, in order."""

    micros: tuple[MicroBatch, ...]
    blocks: BlockRange


class RemoteTraining:
    """One client's training through some blocks. All methods run on the client's event loop.

    Args:
        peers: who serves the model.
        transport: how to reach them.
        blocks: which ones.
        config: patience.
    """

    def __init__(self, peers: Peers, transport: Transport, *, blocks: BlockRange, config: SessionConfig):
        self.blocks = blocks
        self.pipeline = Pipeline()
        self.num_chains = 0
        """Chains that were opened: one more than were lost, where nothing else went wrong."""
        self.bytes_sent = self.bytes_received = 0
        """Bodies of messages."""
        self._peers, self._transport, self._config = peers, transport, config
        self._chain: TrainingChain | None = None
        self._parameters: dict[int, Parameters] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._refusal: SwarmError | None = None
        """Why what is being done can't be done by anybody."""
        self._trouble: SwarmError | None = None
        """What went wrong last, if that was not looked at yet."""
        self._is_closed = False
        self._tasks = TaskSet()
        self._heard_at = 0.0
        self._has_sent = False

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order."""
        return self._chain.hops if self._chain is not None else ()

    async def forth(
        self, hidden_states: Tensor, lengths: Sequence[int], *, parameters: Parameters | None, wants_gradients: bool
    ) -> tuple[Call, Tensor]:
        """Run whole sequences through the blocks.

        Args:
            hidden_states: [sum(lengths), hidden], one sequence after another.
            lengths: of the sequences.
            parameters: what is trained in the blocks; a version that was not used before, or the one of before.
            wants_gradients: whether `back` may follow.

        Returns:
            The call, for `back` and `drop`, and the outputs [sum(lengths), hidden].

        Raises:
            RequestError: nobody can serve it.
            RouteNotFound: blocks stayed missing for `max_wait_s`.
            PeerError: servers kept failing for `max_wait_s`.
        """
        async with self._turn:
            await self._until(lambda: self._chain is not None)
            assert self._chain is not None
            if parameters is not None:
                self._parameters[parameters.version] = parameters
            version = -1 if parameters is None else parameters.version
            micros = []
            counts = split(lengths, good_tokens=self._chain.good_tokens, max_tokens=self._chain.max_tokens)
            rows = hidden_states.split([sum(own) for own in counts])
            for own, part in zip(counts, rows, strict=True):
                micros.append(MicroBatch(num_tokens=own, version=version, inputs=encode_tensor(part),
                                         wants_gradients=wants_gradients))  # fmt: skip
            call = Call(tuple(micros), self.blocks)
            try:
                self.pipeline.add(micros)
                await self._until(lambda: all(micro.outputs is not None for micro in micros))
            except BaseException:
                self.drop(call)
                raise
            outputs = torch.cat([decode_tensor(*micro.outputs) for micro in micros])
            if not wants_gradients:
                self.drop(call)
            return call, outputs

    async def back(self, call: Call, gradients: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Gradients of a call's inputs [sum(lengths), hidden], and of its parameters: all numbers of each block.

        Micro-batches are summed in their order, whatever the order in which they came.

        Raises:
            as `forth`.
        """
        async with self._turn:
            parts = gradients.split([sum(micro.num_tokens) for micro in call.micros])
            for micro, part in zip(call.micros, parts, strict=True):
                micro.output_gradients = encode_tensor(part)
            try:
                self.pipeline.go_back(call.micros)
                await self._until(lambda: all(micro.input_gradients is not None for micro in call.micros))
            except BaseException:
                self.drop(call)
                raise
            inputs = torch.cat([decode_tensor(*micro.input_gradients) for micro in call.micros])
            sums: dict[int, Tensor] = {}
            for micro in call.micros:
                for found in micro.parameter_gradients:
                    for block, numbers in found.items():
                        sums[block] = sums[block] + numbers if block in sums else numbers
                micro.output_gradients, micro.parameter_gradients = None, []
            return inputs, sums

    def drop(self, call: Call) -> None:
        """Nobody will go back through this call."""
        self.pipeline.drop(call.micros)
        self._pump()

    def forget(self, version: int) -> None:
        """No call uses this version of the parameters any more."""
        self._parameters.pop(version, None)
        if self._chain is not None:
            for index, versions in enumerate(self._chain.versions):
                if version in versions:
                    versions.remove(version)
                    self._chain.post(index, TrainForget(micro_batches=(), versions=(version,)))

    async def close(self) -> None:
        """End the run at all servers."""
        self._is_closed = True
        self._changed.set()
        chain, self._chain = self._chain, None
        if chain is not None:
            await chain.close()
        await self._tasks.close()

    # -- going on -----------------------------------------------------------------------------------------------

    async def _until(self, done: Callable[[], bool]) -> None:
        """Go on until this is true, over as many chains as it takes."""
        patience = Patience(self._config.max_wait_s)
        self._heard_at = time.monotonic()
        num_done = self.pipeline.num_done
        while not done():
            if self._is_closed:
                raise InvalidRequest("the training run was closed")
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                raise refusal
            if self._trouble is not None:
                trouble, self._trouble = self._trouble, None
                if (last := patience.failed(time.monotonic(), trouble)) is not None:
                    raise last
                await asyncio.sleep(patience.pause_s(trouble))
            if self._chain is None:
                await self._open_chain()
                continue
            self._pump()
            self._changed.clear()
            await self._wait(done)
            if self.pipeline.num_done > num_done:
                num_done = self.pipeline.num_done
                patience.progressed()

    async def _wait(self, done: Callable[[], bool]) -> None:
        """Wait until something happens; a hop that should do something and doesn't is lost."""
        if done() or self._trouble is not None or self._refusal is not None or self._is_closed:
            return
        left_s = self._heard_at + self._config.step_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self._changed.wait()
        except TimeoutError:
            index = min(self.pipeline.hops_at_work, default=0)
            reason = f"nothing from this server for {self._config.step_timeout_s:g} s"
            self.on_failure(index, PeerTimeout(reason))

    async def _open_chain(self) -> None:
        try:
            hops = await self._peers.spread(self.blocks)
            chain = await open_chain(
                self._transport, hops, model=self._peers.model, timeout_s=self._config.open_timeout_s
            )
        except HopFailed as failure:
            self._peers.failed(failure.hop.peer_id, failure.error)
            self._trouble = failure.error
        except (RouteNotFound, PeerError) as error:
            self._trouble = error
        else:
            self._chain, self._has_sent = chain, False
            self.num_chains += 1
            self._heard_at = time.monotonic()
            chain.start(self)
            self.pipeline.chain_opened(len(hops))

    def _pump(self) -> None:
        """Send all that can be sent now."""
        if self._chain is None:
            return
        while (action := self.pipeline.next_action()) is not None:
            if isinstance(action, Forward):
                self._send_forward(self._chain, action)
            elif isinstance(action, Backward):
                spec, body = action.gradients
                self._post(
                    self._chain, action.hop, TrainBackward(micro_batch=action.micro.number, gradients=spec), body
                )
            else:
                self._send_forget(self._chain, action)

    def _send_forward(self, chain: TrainingChain, action: Forward) -> None:
        micro, hop = action.micro, action.hop
        if micro.version >= 0 and micro.version not in chain.versions[hop]:
            self._post(chain, hop, *self._parameters[micro.version].message(chain.hops[hop].blocks))
            chain.versions[hop].add(micro.version)
        spec, body = action.hidden_states
        message = TrainForward(
            micro_batch=micro.number,
            version=micro.version,
            num_tokens=micro.num_tokens,
            keep=micro.wants_gradients,
            hidden_states=spec,
        )
        self._post(chain, hop, message, body)

    def _send_forget(self, chain: TrainingChain, action: Forget) -> None:
        for index in range(len(chain.hops)):
            chain.post(index, TrainForget(micro_batches=action.numbers, versions=()))

    def _post(self, chain: TrainingChain, hop: int, message: Message, body: bytes | memoryview) -> None:
        self._has_sent = True
        self.bytes_sent += len(body)
        chain.post(hop, message, body)

    # -- what the chain tells -----------------------------------------------------------------------------------

    def on_message(self, index: int, message: Message, body: memoryview) -> None:
        """A hop has answered.

        Raises:
            PeerMisbehaved: something that it must not.
        """
        self._heard_at = time.monotonic()
        self.bytes_received += len(body)
        if isinstance(message, TrainOutputs):
            outputs = (message.hidden_states, self._checked(message.micro_batch, message.hidden_states, body))
            is_kept = self.pipeline.came_forth(index, message.micro_batch, outputs, is_kept=message.is_kept)
            if not is_kept:
                self._trouble = PeerBusy("no server of the chain may keep this micro-batch for its way back")
        elif isinstance(message, TrainGradients):
            self._on_gradients(index, message, body)
        elif isinstance(message, TrainLost):
            self.pipeline.lost_one(index, message.micro_batch)
        else:
            raise PeerMisbehaved(f"unexpected {type(message).__name__}")
        self._pump()
        self._changed.set()

    def _on_gradients(self, index: int, message: TrainGradients, body: memoryview) -> None:
        micro = self.pipeline.micro(message.micro_batch)
        if micro is None or self._chain is None:
            return
        blocks = self._chain.hops[index].blocks
        sizes = {}
        if micro.version >= 0:
            elements = self._parameters[micro.version].num_elements
            sizes = {block: elements[block] for block in blocks if block in elements}
        if message.num_parameters != sum(sizes.values()):
            raise PeerMisbehaved(f"{message.num_parameters} gradients of parameters, {sum(sizes.values())} expected")
        split_at = message.gradients.num_bytes
        inputs = (message.gradients, self._checked(message.micro_batch, message.gradients, body[:split_at]))
        rest = body[split_at:]
        if len(rest) != 4 * message.num_parameters:
            raise PeerMisbehaved(f"{len(rest)} bytes of gradients, {4 * message.num_parameters} declared")
        numbers = torch.frombuffer(bytearray(rest), dtype=torch.float32) if rest else torch.empty(0)
        parts = numbers.split(list(sizes.values())) if sizes else ()
        self.pipeline.came_back(index, message.micro_batch, inputs, dict(zip(sizes, parts, strict=True)))

    def _checked(self, number: int, spec: TensorSpec, body: memoryview) -> memoryview:
        """The body of a tensor that must be like the micro-batch's inputs."""
        micro = self.pipeline.micro(number)
        if micro is not None and (spec.shape, spec.dtype) != (micro.inputs[0].shape, micro.inputs[0].dtype):
            expected = micro.inputs[0]
            raise PeerMisbehaved(
                f"a tensor of {spec.dtype.name} {spec.shape}, expected {expected.dtype.name} {expected.shape}"
            )
        if len(body) != spec.num_bytes:
            raise PeerMisbehaved(f"tensor body of {len(body)} bytes, {spec.num_bytes} declared")
        return body

    def on_failure(self, index: int, error: SwarmError) -> None:
        """A hop is lost, and with it the chain."""
        chain, self._chain = self._chain, None
        if chain is None:
            return
        self.pipeline.chain_lost()
        self._tasks.spawn(chain.close(), name="close a chain")
        if isinstance(error, RequestError) and self._has_sent:
            self._refusal = error
        else:
            self._peers.failed(chain.hops[index].peer_id, error)
            self._trouble = error
        self._changed.set()


def split(lengths: Sequence[int], *, good_tokens: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Sequences, in order, in micro-batches of at most `good_tokens` tokens, or of one longer sequence.

    Raises:
        InvalidRequest: a sequence is longer than `max_tokens`.
    """
    if max(lengths) > max_tokens:
        raise InvalidRequest(f"a sequence of {max(lengths)} tokens, the servers take {max_tokens} in one micro-batch")
    parts: list[list[int]] = []
    for length in lengths:
        if parts and sum(parts[-1]) + length <= good_tokens:
            parts[-1].append(length)
        else:
            parts.append([length])
    return [tuple(part) for part in parts]
