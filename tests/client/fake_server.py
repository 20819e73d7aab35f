"""A server without a model on a real transport: speaks the protocol, computes something simple, fails on command.

    session stream, push streams ─► script ─► FakeSession: Intake ─► run_blocks ─► Link ─► client or next server

`FakeServer.script` is asked before each message is handled. It may raise (the session is refused), wait (the server is
stopped but connected), `server.kill()`, or do something else and return True: the message is then not handled. Outputs
depend on all inputs before, so a lost token shows.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

import torch

from swarm.client.betterment import MoveCosts
from swarm.client.prospects import Outlook
from swarm.client.timings import HopTiming
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import InvalidRequest, PeerDisconnected, PeerMisbehaved, PeerTimeout, RouteNotFound, SwarmError
from swarm.intake import Intake
from swarm.link import HistoryLost, Link
from swarm.network import Node
from swarm.protocol import (
    PUSH_SERVICE,
    SESSION_SERVICE,
    Forward,
    Forwarding,
    HopTrace,
    LinkDown,
    LinkFault,
    Message,
    OpenSession,
    Probe,
    ProbeResult,
    PushAccepted,
    PushHello,
    SessionOpened,
    Step,
    TensorSpec,
)
from swarm.step_chunk import StepChunk
from swarm.transport import EndOfStream, Limits, Stream, Transport
from swarm.types import BlockRange, Hop

HIDDEN = 4
NUM_BLOCKS = 6
MODULUS = 251.0


def run_blocks(inputs: torch.Tensor, blocks: BlockRange) -> torch.Tensor:
    """A stand-in for causal blocks, exact in fp32: each output depends on all inputs so far and on the block."""
    for block in blocks:
        inputs = (inputs.double().cumsum(0) + inputs + block).remainder(MODULUS).float()
    return inputs


Script = Callable[["FakeSession", Message], Awaitable[bool | None]]


class FakeServer:
    """One peer that serves a range of blocks.

    Args:
        node: its identity.
        blocks: what it serves.
        max_step_tokens: tokens that it takes in one message, and passes on in one.
    """

    def __init__(self, node: Node, blocks: BlockRange, *, max_step_tokens: int = 100, can_rollback: bool = True):
        self.node, self.blocks = node, blocks
        self.max_step_tokens, self.can_rollback = max_step_tokens, can_rollback
        self.script: Script | None = None
        self.unreachable: set[str] = set()
        """Peers that this one can't push to."""
        self.sessions: list[FakeSession] = []
        self.received: Counter[str] = Counter()
        """Messages by kind, on session streams and, with "push:" before it, on push streams."""
        self.num_tokens = 0
        """Tokens taken in, over all sessions."""
        self.transport = Transport(
            node, listen=("127.0.0.1", 0), limits=Limits(ping_period_s=0.5, silence_timeout_s=60.0)
        )
        self.transport.serve(SESSION_SERVICE, self._serve)
        self.transport.serve(PUSH_SERVICE, self._serve_push)
        self._changed = asyncio.Condition()

    @property
    def peer_id(self) -> str:
        return self.node.peer_id

    def kill(self) -> None:
        """Die without a word: all connections are cut."""
        self.script = _refuse
        for connection in list(self.transport._connections):
            connection.transport.abort()

    def revive(self) -> None:
        """Be there again, without any memory."""
        self.script = None

    async def told(self, session: "FakeSession | None", message: Message, prefix: str = "") -> bool:
        """Count a message and ask the script; True when it is handled already."""
        self.received[prefix + type(message).__name__] += 1
        if self.script is None or session is None:
            return False
        return bool(await self.script(session, message))

    async def _serve(self, stream: Stream) -> None:
        message, _ = await stream.receive()
        assert isinstance(message, OpenSession)
        session = FakeSession(self, stream, message)
        if await self.told(session, message):
            return
        self.sessions.append(session)
        async with self._changed:
            self._changed.notify_all()
        try:
            await session.run()
        finally:
            self.sessions.remove(session)

    async def _serve_push(self, stream: Stream) -> None:
        message, _ = await stream.receive()
        assert isinstance(message, PushHello)
        session = await self._find(message.push_key)
        await self.told(session, message, "push:")
        session.pushes.append(stream)
        await stream.send(PushAccepted())
        while True:
            message, body = await stream.receive()
            if not await self.told(session, message, "push:"):
                await session.handle(message, body)

    async def _find(self, push_key: bytes) -> "FakeSession":
        try:
            async with asyncio.timeout(5), self._changed:
                while True:
                    for session in self.sessions:
                        if session.opened.push_key == push_key:
                            return session
                    await self._changed.wait()
        except TimeoutError:
            raise InvalidRequest("no session has this push key") from None


async def _refuse(session: "FakeSession", message: Message) -> None:
    raise PeerDisconnected("this server is dead")


class FakeSession:
    """One session at one server."""

    def __init__(self, server: FakeServer, stream: Stream, opened: OpenSession):
        self.server, self.stream, self.opened = server, stream, opened
        self.intake = Intake(opened.batch_size, max_length=opened.max_length)
        self.link = Link(opened.batch_size, to_client=opened.is_last)
        self.rows = [torch.zeros(0, HIDDEN) for _ in range(opened.batch_size)]
        self.forwarded: list[str] = []
        """Peers that outputs were to go to, in order; "" is the client."""
        self.epoch = -1
        self.pushes: list[Stream] = []
        self._target: Stream | None = stream if opened.is_last else None
        self._trace: tuple[HopTrace, ...] = ()
        self._spec: TensorSpec | None = None
        self._outputs_from: tuple[int, ...] = ()
        self._keeper: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        await self.stream.send(
            SessionOpened(max_step_tokens=self.server.max_step_tokens, can_rollback=self.server.can_rollback)
        )
        try:
            while True:
                message, body = await self.stream.receive()
                if not await self.server.told(self, message):
                    await self.handle(message, body)
        finally:
            if self._keeper is not None:
                self._keeper.cancel()
            for stream in self.pushes:
                await stream.abort(PeerDisconnected("the session has ended"))

    async def handle(self, message: Message, body: memoryview) -> None:
        if isinstance(message, Step):
            await self._step(message, body)
        elif isinstance(message, Probe):
            await self.stream.send(
                ProbeResult(
                    nonce=message.nonce,
                    step_id=self.intake.step_id,
                    received=tuple(self.intake.lengths),
                    produced=tuple(len(row) for row in self.rows),
                    is_waiting=False,
                )
            )
        elif isinstance(message, Forward):
            await self._forward(message)

    async def lose_link(self, fault: LinkFault = LinkFault.UNREACHABLE) -> None:
        """Say that the way to the next server is broken."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._target = None
        self.link.disconnect()
        await self.stream.send(LinkDown(epoch=self.epoch, fault=fault, text="as scripted"))

    # -- steps --------------------------------------------------------------------------------------------------

    async def _step(self, step: Step, body: memoryview) -> None:
        chunk = StepChunk.of(step, decode_tensor(step.hidden_states, body))
        if self.intake.rolls_back(chunk) and not self.server.can_rollback:
            raise InvalidRequest("rows can't be rolled back")
        if (accepted := self.intake.accept(chunk)) is None:
            return
        self.server.num_tokens += sum(accepted.num_tokens)
        self._spec, self._outputs_from = step.hidden_states, step.outputs_from
        if accepted.base is not None:
            if accepted.order is not None:
                self.rows = [self.rows[old] for old in accepted.order]
            self.rows = [row[:base] for row, base in zip(self.rows, accepted.base, strict=True)]
            self.link.begin(step.step_id, order=accepted.order, base=accepted.base, outputs_from=accepted.outputs_from)
        self._compute(accepted.hidden_states.split(list(accepted.num_tokens)))
        own = HopTrace(queue_us=1, compute_us=10, batch_tokens=sum(accepted.num_tokens), link_us=5)
        self._trace = (*step.trace, own)
        await self.pump()

    def _compute(self, pieces: Sequence[torch.Tensor]) -> None:
        for index, piece in enumerate(pieces):
            if not len(piece):
                continue
            position = len(self.rows[index])
            self.rows[index] = torch.cat([self.rows[index], piece])
            outputs = run_blocks(self.rows[index], self.opened.blocks)
            if self.opened.is_last:
                position = max(position, min(self._outputs_from[index], len(outputs)))
            if position < len(outputs):
                self.link.append(index, position, outputs[position:].clone())

    async def pump(self) -> None:
        """Send what the receiver lacks."""
        async with self._lock:
            while (target := self._target) is not None and (chunk := self.link.next_chunk()) is not None:
                assert self._spec is not None
                spec, payload = encode_tensor(chunk.hidden_states, self._spec.encoding)
                with suppress(SwarmError):
                    await target.send(self._message(chunk, spec, target), payload)

    def _message(self, chunk: StepChunk, spec: TensorSpec, target: Stream) -> Message:
        return chunk.as_result(spec, self._trace) if target is self.stream else chunk.as_step(spec, self._trace)

    # -- links --------------------------------------------------------------------------------------------------

    async def _forward(self, message: Forward) -> None:
        self.forwarded.append(message.peer_id)
        self.epoch = message.epoch
        if self._keeper is not None:
            self._keeper.cancel()
        self._target = None
        try:
            self.link.connect(
                held=message.held,
                as_of=message.as_of,
                max_step_tokens=message.max_step_tokens,
                to_client=not message.peer_id,
            )
        except HistoryLost as error:
            await self.stream.send(LinkDown(epoch=message.epoch, fault=LinkFault.HISTORY_LOST, text=str(error)))
            return
        if message.peer_id:
            self._keeper = asyncio.create_task(self._keep(message))
        else:
            self._target = self.stream
            await self.stream.send(Forwarding(epoch=message.epoch))
            await self.pump()

    async def _keep(self, message: Forward) -> None:
        """Push to the next server until that ends."""
        try:
            if message.peer_id in self.server.unreachable:
                raise PeerTimeout("scripted: unreachable")
            transport = self.server.transport
            async with await transport.open(message.peer_id, PUSH_SERVICE, timeout_s=5) as stream:
                await stream.send(PushHello(push_key=message.push_key))
                answer, _ = await stream.receive(5)
                assert isinstance(answer, PushAccepted)
                await self.stream.send(Forwarding(epoch=message.epoch))
                self._target = stream
                await self.pump()
                await stream.receive()
                raise PeerMisbehaved("a message on a push stream")
        except (SwarmError, EndOfStream) as error:
            self._target = None
            self.link.disconnect()
            with suppress(SwarmError):
                await self.stream.send(
                    LinkDown(epoch=message.epoch, fault=LinkFault.UNREACHABLE, text=str(error) or "it ended")
                )


class FakePeers:
    """What `swarm.client.peers.Peers` is for a session: servers in order of preference, those that failed last."""

    model, model_name, num_blocks = "0" * 64, "fake", NUM_BLOCKS

    def __init__(self, servers: Sequence[FakeServer]):
        self.servers = list(servers)
        self.failures: list[str] = []
        self.overheads: list[str] = []
        self.pairs_without_push: frozenset[tuple[str, str]] = frozenset()
        self.on_route: Callable[[BlockRange], None] = lambda blocks: None
        self.on_outlook: Callable[[Sequence[Hop]], Outlook | None] = lambda chain: None
        self.move_costs = MoveCosts()

    def keep_fresh(self) -> None:
        pass

    async def route(self, blocks: BlockRange, **wishes: object) -> tuple[Hop, ...]:
        self.on_route(blocks)
        hops: list[Hop] = []
        position = blocks.start
        while position < blocks.end:
            server = next((server for server in self.servers if position in server.blocks), None)
            if server is None:
                raise RouteNotFound(f"nobody serves block {position}", missing=[position])
            end = min(server.blocks.end, blocks.end)
            hops.append(Hop(peer_id=server.peer_id, blocks=BlockRange(position, end)))
            position = end
        return tuple(hops)

    async def replica(self, blocks: BlockRange, *, without: Collection[str], **wishes: object) -> Hop:
        for server in self.servers:
            if server.blocks.covers(blocks) and server.peer_id not in without:
                return Hop(peer_id=server.peer_id, blocks=blocks)
        raise RouteNotFound(f"nobody else serves {blocks}", missing=list(blocks))

    async def outlook(self, chain: Sequence[Hop], **wishes: object) -> Outlook | None:
        return self.on_outlook(chain)

    def failed(self, peer_id: str, error: Exception) -> None:
        self.failures.append(peer_id)
        self.servers.sort(key=lambda server: server.peer_id == peer_id)

    def measured(self, timings: Sequence[HopTiming]) -> None:
        self.overheads += [timing.peer_id for timing in timings]

    def cannot_push(self, sender: str, receiver: str) -> None:
        self.pairs_without_push |= {(sender, receiver)}

    def name_of(self, peer_id: str) -> str:
        return peer_id[-8:]
