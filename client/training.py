"""Drives a `swarm.training.Pipeline` over the network: a run's micro-batches, through chains of servers that may die.

    forth, back ─► Pipeline ─next_action─► TrainingChain ~~► servers
                      ▲                        │
                      └── came_forth, came_back, lost_one, chain_lost ◄~~ answers, failures

Hops send to each other where they can (`TrainLink`); else what comes out of one goes through the client to the next.
When a hop is lost, the chain is given up and another one opened over the servers that are known then, until
`max_wait_s` has passed without progress. What a server answers to a micro-batch of ours is believed when it blames the
request. Of a new version of the parameters servers get what is different from the one before.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.client.config import SessionConfig
from swarm.client.deadlines import Patience
from swarm.client.parameters import Parameters
from swarm.client.peers import Peers
from swarm.client.training_chain import HopFailed, TrainingChain, open_chain
from swarm.client.way_back import WayBack
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import (
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
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
    TrainLinked,
    TrainLost,
    TrainOutputs,
    printable,
)
from swarm.training import Backward, Forward, MicroBatch, Pipeline
from swarm.transport import Transport
from swarm.types import BlockRange, Hop

logger = logging.getLogger(__name__)

LOOK_S = 10.0
"""Least time between two looks whether servers turned out slow: another chain takes long to draw in a large swarm."""


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
        """Chains that were opened: one more than were lost or left, where nothing else went wrong."""
        self.bytes_sent = self.bytes_received = 0
        """Bodies of messages."""
        self._peers, self._transport, self._config = peers, transport, config
        self._chain: TrainingChain | None = None
        self._way_back = WayBack(())
        self._parameters: dict[int, Parameters] = {}
        self._stale: set[int] = set()
        """Versions that no call uses any more, and that a hop may still have."""
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._refusal: SwarmError | None = None
        """Why what is being done can't be done by anybody."""
        self._trouble: SwarmError | None = None
        """What went wrong last, if that was not looked at yet."""
        self._is_closed = False
        self._tasks = TaskSet()
        self._heard_at = self._looked_at = 0.0
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
            await self._leave_slow_servers()
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

    async def back(
        self, call: Call, gradients: Tensor, *, wants_inputs: bool = True
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Gradients of a call's inputs [sum(lengths), hidden], if wanted, and of its parameters: all of each block.

        Micro-batches are summed in their order, whatever the order in which they came.

        Raises:
            as `forth`.
        """
        async with self._turn:
            parts = gradients.split([sum(micro.num_tokens) for micro in call.micros])
            for micro, part in zip(call.micros, parts, strict=True):
                micro.output_gradients, micro.wants_inputs = encode_tensor(part), wants_inputs
            try:
                self.pipeline.go_back(call.micros)
                await self._until(lambda: all(micro.is_back for micro in call.micros))
            except BaseException:
                self.drop(call)
                raise
            found = [decode_tensor(*micro.input_gradients) for micro in call.micros if wants_inputs]
            sums: dict[int, Tensor] = {}
            for micro in call.micros:
                for of_hop in micro.parameter_gradients.values():
                    for block, numbers in of_hop.items():
                        sums[block] = sums[block] + numbers if block in sums else numbers
                micro.output_gradients, micro.parameter_gradients = None, {}
            return torch.cat(found) if wants_inputs else None, sums

    def drop(self, call: Call) -> None:
        """Nobody will go back through this call."""
        self.pipeline.drop(call.micros)
        self._pump()

    def forget(self, version: int) -> None:
        """No call uses this version of the parameters any more."""
        self._stale.add(version)
        self._forget_stale()

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

    async def _leave_slow_servers(self) -> None:
        """Go where it is much quicker, if the chain holds nothing: between two steps."""
        chain, now = self._chain, time.monotonic()
        if chain is None or not self.pipeline.is_empty or now < self._looked_at + LOOK_S:
            return
        self._looked_at = now
        hops = await self._peers.quicker(chain.hops)
        if hops and chain is self._chain:
            names = ", ".join(self._peers.name_of(hop.peer_id) for hop in hops)
            logger.info("leaving a slow server: training goes over %s from now on", names)
            self._give_up_chain()
            await self._open_chain(hops)

    def _give_up_chain(self) -> None:
        chain, self._chain = self._chain, None
        if chain is not None:
            self.pipeline.chain_lost()
            self._tasks.spawn(chain.close(), name="close a chain")

    async def _open_chain(self, hops: Sequence[Hop] = ()) -> None:
        try:
            hops = hops or await self._peers.spread(self.blocks)
            unlinkable = self._peers.pairs_without_push
            chain = await open_chain(
                self._transport,
                hops,
                model=self._peers.model,
                timeout_s=self._config.open_timeout_s,
                may_link=lambda hop, following: (
                    self._config.push and (hop.peer_id, following.peer_id) not in unlinkable
                ),
                on_unlinked=lambda hop, following: self._peers.cannot_push(hop.peer_id, following.peer_id),
            )
        except HopFailed as failure:
            self._peers.failed(failure.hop.peer_id, failure.error)
            self._trouble = failure.error
        except (RouteNotFound, PeerError) as error:
            self._trouble = error
        else:
            self._chain, self._has_sent, self._way_back = chain, False, WayBack(chain.hops)
            self.num_chains += 1
            self._heard_at = time.monotonic()
            chain.start(self)
            self.pipeline.chain_opened(len(hops), chain.links)

    def _pump(self) -> None:
        """Send all that can be sent now."""
        if self._chain is None:
            return
        while (action := self.pipeline.next_action()) is not None:
            if isinstance(action, Forward):
                self._send_forward(self._chain, action)
            elif isinstance(action, Backward):
                self._send_backward(self._chain, action)
            else:
                message = TrainForget(micro_batches=action.numbers, versions=())
                for hop in range(len(self._chain.hops)):
                    self._post(self._chain, hop, message, b"")

    def _send_forward(self, chain: TrainingChain, action: Forward) -> None:
        micro = action.micro
        self._send_parameters(chain, micro.version)
        spec, body = action.hidden_states
        message = TrainForward(
            micro_batch=micro.number,
            version=chain.versions.get(micro.version, -1),
            num_tokens=micro.num_tokens,
            keep=micro.is_kept,
            hidden_states=spec,
        )
        self._post(chain, action.hop, message, body)

    def _send_parameters(self, chain: TrainingChain, version: int) -> None:
        """Send a version to all hops, if they don't have it: those that get micro-batches without us need it, too.

        Its number is of the chain: after a loss, versions may come in another order than they were made in.
        """
        if version < 0 or version in chain.versions:
            return
        latest, latest_number = max(chain.versions.items(), key=lambda item: item[1], default=(-1, -1))
        number, base = latest_number + 1, self._parameters.get(latest)
        for index, hop in enumerate(chain.hops):
            self._post(chain, index, *self._parameters[version].message(hop.blocks, number, base, latest_number))
        chain.versions[version] = number
        self._forget_stale()

    def _forget_stale(self) -> None:
        """Free the versions that nobody uses, but for the last that a chain has: the next one will be based on it."""
        chain = self._chain
        versions = {} if chain is None else chain.versions
        latest = max(versions, key=versions.__getitem__, default=-1)
        for version in self._stale - {latest}:
            self._stale.remove(version)
            self._parameters.pop(version, None)
            number = versions.pop(version, None)
            if chain is not None and number is not None:
                for index in range(len(chain.hops)):
                    chain.post(index, TrainForget(micro_batches=(), versions=(number,)))

    def _send_backward(self, chain: TrainingChain, action: Backward) -> None:
        spec, body = action.gradients
        message = TrainBackward(micro_batch=action.micro.number, gradients=spec, wants_inputs=action.wants_inputs)
        self._post(chain, action.hop, message, body)

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
            spec = message.hidden_states
            outputs = None if spec is None else (spec, self._checked(message.micro_batch, spec, body))
            is_kept = self.pipeline.came_forth(index, message.micro_batch, outputs, is_kept=message.is_kept)
            if not is_kept:
                self._trouble = PeerBusy("no server of the chain may keep this micro-batch for its way back")
        elif isinstance(message, TrainGradients):
            self._on_gradients(index, message, body)
        elif isinstance(message, TrainLost):
            self.pipeline.lost_one(index, message.micro_batch)
        elif isinstance(message, TrainLinked) and message.fault and index in self.pipeline.links:
            # Most likely because the next server is gone; if not, what is between the two goes through us for a while,
            # and who errs then is seen.
            if self._chain is not None:
                self._peers.cannot_push(*(hop.peer_id for hop in self._chain.hops[index : index + 2]))
            self.on_failure(index + 1, PeerDisconnected(f"the link to this server broke: {printable(message.fault)}"))
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
        spec, rest, inputs = message.gradients, body, None
        if spec is not None:
            inputs = (spec, self._checked(message.micro_batch, spec, body[: spec.num_bytes]))
            rest = body[spec.num_bytes :]
        if len(rest) != 4 * message.num_parameters:
            raise PeerMisbehaved(f"{len(rest)} bytes of gradients, {4 * message.num_parameters} declared")
        numbers = torch.frombuffer(bytearray(rest), dtype=torch.float32) if rest else torch.empty(0)
        parts = numbers.split(list(sizes.values())) if sizes else ()
        self.pipeline.came_back(index, message.micro_batch, inputs, dict(zip(sizes, parts, strict=True)))
        if len(body):  # else it is a mere word
            leg = self._way_back.answered(message.micro_batch, index, self._heard_at)
            if leg is not None:
                self._peers.trained(leg, sum(micro.num_tokens))

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

    def on_sent(self, index: int, message: Message) -> None:
        """What was posted has gone out."""
        if isinstance(message, TrainBackward):
            self._way_back.sent(message.micro_batch, index, time.monotonic())

    def on_failure(self, index: int, error: SwarmError) -> None:
        """A hop is lost, and with it the chain."""
        chain = self._chain
        if chain is None:
            return
        self._give_up_chain()
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
