"""A device thread without a thread, and the client's side of a chain of handlers, step by step."""

import asyncio
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from swarm.adapters.delta import BlockDelta
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import PeerBusy, SwarmError
from swarm.protocol import (
    SESSION_SERVICE,
    Encoding,
    Forward,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepResult,
)
from swarm.server.blocks.parcel import Layout, pack, unpack
from swarm.server.cache_image import CacheImage
from swarm.server.handler import Handler
from swarm.server.limits import HandlerLimits
from swarm.server.meters import BatchMeter
from swarm.server.pages import PAGE_SIZE
from swarm.server.work import Produced, ProducedRow, SessionListener, Work
from swarm.transport import Stream, Transport
from swarm.types import BlockRange

HIDDEN = 4
MODEL = "ab" * 32


def run_blocks(inputs: torch.Tensor, constant: int) -> torch.Tensor:
    """A stand-in for causal blocks, exact in fp32: each output depends on all inputs so far and on the hop."""
    return (inputs * 3 + inputs.cumsum(0) + constant) % 1009


@dataclass(eq=False)
class FakeCache:
    """What a session holds on the fake device."""

    listener: SessionListener
    client: str
    rows: list[torch.Tensor]
    queue: deque[Work] = field(default_factory=deque)
    num_done: int = 0
    outputs_from: tuple[int, ...] = ()
    adapters: tuple[str | None, ...] = ()
    is_held: bool = False


class FakeExecutor:
    """Does what the executor promises, on the loop: one batch per session and turn, each of at most `budget` tokens.

    Args:
        constant: what makes this hop's outputs its own.
        budget: most tokens in a batch; less than a work has shows that outputs go on batch by batch.
    """

    def __init__(self, constant: int = 0, *, budget: int = 8, num_pages: int = 1000, stateful: bool = False):
        self.span = SimpleNamespace(
            stateful=stateful, hidden_size=HIDDEN, blocks=BlockRange(0, 8), dtype=torch.float32, max_positions=4096
        )
        self.constant, self.budget, self.num_pages = constant, budget, num_pages
        self.num_waiting = self.num_ready = 0
        self.meter = BatchMeter()
        self.is_held = False
        self.num_tokens_run = 0
        self.num_dropped = 0
        self.sessions: list[FakeCache] = []
        self.adapters: dict[str, int] = {}
        self.charged: dict[str, float] = {}
        """What each does: it adds so much to the constant."""
        self._is_scheduled = False

    @property
    def total_tokens(self) -> int:
        return self.num_pages * PAGE_SIZE

    @property
    def free_tokens(self) -> int:
        return self.total_tokens - self.pages * PAGE_SIZE

    @property
    def pages(self) -> int:
        return sum(-(-len(row) // PAGE_SIZE) for cache in self.sessions for row in cache.rows)

    def open(
        self,
        blocks: BlockRange,
        batch_size: int,
        *,
        client: str,
        listener: SessionListener,
        adapters: Sequence[str | None] = (),
    ) -> FakeCache:
        cache = FakeCache(listener, client, [torch.zeros(0, HIDDEN) for _ in range(batch_size)])
        cache.adapters, cache.is_held = tuple(adapters), any(adapters)
        self.sessions.append(cache)
        return cache

    @property
    def attached_adapters(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def charge(self, client: str, seconds: float) -> None:
        self.charged[client] = self.charged.get(client, 0.0) + seconds

    def add_adapter(self, digest: str, deltas: Mapping[int, BlockDelta], *, client: str) -> None:
        self.adapters[digest] = sum(int(delta.linears["q"].bias_O[0]) for delta in deltas.values())

    def forget_adapter(self, digest: str) -> None:
        self.adapters.pop(digest, None)

    def adapters_ready(self, session: FakeCache) -> None:
        session.is_held = False
        self.kick()

    def submit(self, session: FakeCache, work: Work) -> None:
        assert len(work.hidden_states) == sum(work.num_tokens) > 0
        session.queue.append(work)
        self.kick()

    def drop_queued(self, session: FakeCache) -> None:
        self.num_dropped += len(session.queue)
        session.queue.clear()
        session.num_done = 0

    def close(self, session: FakeCache) -> None:
        self.sessions.remove(session)
        session.queue.clear()

    async def layout(self, blocks: BlockRange) -> Layout:
        return Layout(dtype=torch.float32, kv_shapes=((1, HIDDEN, 0),))

    async def take_image(self, session: FakeCache) -> CacheImage:
        """The rows, each in pages of its own; what is beside them is NaN."""
        assert not session.queue
        counts = [-(-len(row) // PAGE_SIZE) for row in session.rows]
        pages = torch.full((sum(counts) * PAGE_SIZE, HIDDEN), torch.nan)
        layouts, first = [], 0
        for row, count in zip(session.rows, counts, strict=True):
            pages[first * PAGE_SIZE : first * PAGE_SIZE + len(row)] = row
            layouts.append(tuple(range(first, first + count)))
            first += count
        saved = [(pages.view(1, -1, PAGE_SIZE * HIDDEN), torch.empty(1, first, 0))]
        return CacheImage(
            lengths=tuple(map(len, session.rows)),
            num_pages=first,
            layouts=tuple(layouts),
            content=pack(await self.layout(self.span.blocks), saved, []),
        )

    async def put_image(self, session: FakeCache, image: CacheImage) -> None:
        if session not in self.sessions:
            raise PeerBusy("the session is over")
        saved, _ = unpack(await self.layout(self.span.blocks), image.content, image.num_pages, 0)
        pages = saved[0][0].reshape(-1, PAGE_SIZE, HIDDEN)
        session.rows = [
            pages[list(layout)].reshape(-1, HIDDEN)[:length].clone()
            for layout, length in zip(image.layouts, image.lengths, strict=True)
        ]

    def hold(self) -> None:
        """Run nothing until `release`."""
        self.is_held = True

    def release(self) -> None:
        self.is_held = False
        self.kick()

    def kick(self) -> None:
        if not self._is_scheduled and not self.is_held:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        if self.is_held:
            return
        for session in list(self.sessions):
            if session.queue and not session.is_held:
                self._run_batch(session)
        if any(session.queue and not session.is_held for session in self.sessions):
            self.kick()

    def _run_batch(self, session: FakeCache) -> None:
        work = session.queue[0]
        if not session.num_done and work.base is not None:
            rows = [session.rows[old] for old in work.order] if work.order is not None else session.rows
            session.rows = [row[:base] for row, base in zip(rows, work.base, strict=True)]
            session.outputs_from = work.outputs_from
        budget, skip, produced = self.budget, session.num_done, []
        for index, piece in enumerate(work.hidden_states.split(list(work.num_tokens))):
            new = piece[skip : skip + budget]
            skip = max(0, skip - len(piece))
            budget -= len(new)
            row = session.rows[index] = torch.cat([session.rows[index], new])
            position = len(row) - len(new)
            first = max(position, session.outputs_from[index])
            if len(new) and first < len(row):
                adapter = session.adapters[index] if session.adapters else None
                own = self.adapters[adapter] if adapter is not None else 0
                outputs = run_blocks(row, self.constant + own)[first:]
                produced.append(ProducedRow(row=index, position=first, hidden_states=outputs))
        count = self.budget - budget
        session.num_done += count
        self.num_tokens_run += count
        if session.num_done == len(work.hidden_states):
            session.queue.popleft()
            session.num_done = 0
        session.listener.produced(
            Produced(
                step_id=work.step_id,
                rows=tuple(produced),
                num_tokens=count,
                queue_s=0.001,
                compute_s=0.002,
                batch_tokens=count,
            )
        )


def make_handler(executor: Any, transport: Any, **limits: Any) -> Handler:
    """A handler of the fake model."""
    return Handler(
        executor,
        transport,
        model=MODEL,
        model_name="fake",
        quantization="none",
        max_positions=4096,
        limits=HandlerLimits(**limits),
    )


class HopClient:
    """The client's stream to one hop."""

    def __init__(self, stream: Stream, push_key: bytes, opened: SessionOpened):
        self.stream, self.push_key, self.opened = stream, push_key, opened
        self.num_results = 0

    @classmethod
    async def open(
        cls,
        transport: Transport,
        peer_id: str,
        *,
        is_last: bool,
        rows: int = 1,
        push_key: bytes | None = None,
        **fields,
    ) -> "HopClient":
        """Open a session."""
        stream = await transport.open(peer_id, SESSION_SERVICE, timeout_s=10)
        key = push_key or os.urandom(16)
        message = {
            "session_id": bytes(16),
            "push_key": key,
            "model": MODEL,
            "start": 0,
            "end": 2,
            "batch_size": rows,
            "max_length": 2048,
            "is_last": is_last,
            **fields,
        }
        await stream.send(OpenSession(**message))
        opened, _ = await stream.receive(10)
        assert isinstance(opened, SessionOpened)
        return cls(stream, key, opened)

    async def step(
        self,
        step_id: int,
        rows: Sequence[torch.Tensor],
        *,
        positions: Sequence[int],
        base: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
        outputs_from: Sequence[int] | None = None,
        encoding: Encoding = Encoding.RAW,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Send a chunk of a step."""
        await self.stream.send(
            *make_step(
                step_id,
                rows,
                positions=positions,
                base=base,
                order=order,
                outputs_from=outputs_from,
                encoding=encoding,
                dtype=dtype,
            )
        )

    async def forward(
        self, epoch: int, target: "HopClient | None", *, held: Sequence[int] = (0,), as_of: int = -1, **fields
    ) -> None:
        """Tell this hop where its outputs go."""
        await self.stream.send(
            Forward(
                **{
                    "epoch": epoch,
                    "peer_id": target.stream.peer_id if target else "",
                    "push_key": target.push_key if target else bytes(16),
                    "held": tuple(held),
                    "as_of": as_of,
                    "max_step_tokens": target.opened.max_step_tokens if target else 1024,
                    **fields,
                }
            )
        )

    async def expect(self, kind: type[Message]) -> Any:
        """The next message, which must be of this kind."""
        message, _ = await self.stream.receive(10)
        assert isinstance(message, kind), message
        return message

    async def results(self, step_id: int, upto: Sequence[int]) -> list[torch.Tensor]:
        """Outputs of a step until each row has them up to `upto`; rows are joined in order of position."""
        rows: list[list[torch.Tensor]] = [[] for _ in upto]
        ends = [0 if end else -1 for end in upto]
        while any(end > done and end for end, done in zip(upto, ends, strict=True)):
            message, body = await self.stream.receive(10)
            assert isinstance(message, StepResult), message
            if message.step_id != step_id:
                continue
            self.num_results += 1
            self.last_result = message
            pieces = decode_tensor(message.hidden_states, body).split(list(message.num_tokens))
            for row, (position, piece) in enumerate(zip(message.positions, pieces, strict=True)):
                rows[row].append(piece)
                ends[row] = max(ends[row], position + len(piece))
        return [torch.cat(pieces) if pieces else torch.zeros(0, HIDDEN) for pieces in rows]


class Chain:
    """Servers in a row and the client's transport."""

    def __init__(self, client: Transport, transports: list[Transport], handlers: list[Handler]):
        self.client, self.transports, self.handlers = client, transports, handlers

    @property
    def executors(self) -> list[FakeExecutor]:
        return [handler.executor for handler in self.handlers]  # type: ignore[misc]

    def peer_id(self, index: int) -> str:
        return self.transports[index].node.peer_id

    async def open(self, index: int, *, is_last: bool = False, **fields: Any) -> HopClient:
        """A session on one server."""
        return await HopClient.open(self.client, self.peer_id(index), is_last=is_last, **fields)

    async def open_route(self, *indices: int, **fields: Any) -> list[HopClient]:
        """Sessions on several servers, each told to push to the next."""
        hops = [await self.open(i, is_last=n + 1 == len(indices), **fields) for n, i in enumerate(indices)]
        for hop, following in pairwise(hops):
            await hop.forward(0, following, held=(0,) * fields.get("rows", 1))
        return hops

    @property
    def pages(self) -> int:
        return sum(executor.pages for executor in self.executors)


def make_step(
    step_id: int,
    rows: Sequence[torch.Tensor],
    *,
    positions: Sequence[int],
    base: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    outputs_from: Sequence[int] | None = None,
    encoding: Encoding = Encoding.RAW,
    dtype: torch.dtype = torch.float32,
) -> tuple[Step, memoryview]:
    """A Step message and its body."""
    spec, body = encode_tensor(torch.cat(list(rows)).to(dtype), encoding)
    step = Step(
        step_id=step_id,
        order=None if order is None else tuple(order),
        base=tuple(positions if base is None else base),
        positions=tuple(positions),
        num_tokens=tuple(len(row) for row in rows),
        outputs_from=tuple(positions if outputs_from is None else outputs_from),
        hidden_states=spec,
    )
    return step, body


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Inputs that are exact in every dtype of the wire."""
    return torch.randint(0, 100, (count, HIDDEN), generator=torch.Generator().manual_seed(seed)).float()


async def eventually(condition, what: str = "condition") -> None:
    """Wait until a condition of the handlers' loop holds; fails after 10 s."""
    try:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true") from None


async def failure_of(stream: Stream) -> SwarmError:
    """The error with which a stream ends."""
    try:
        async with asyncio.timeout(10):
            while True:
                await stream.receive()
    except SwarmError as error:
        return error


def through(inputs: torch.Tensor, *constants: int) -> torch.Tensor:
    """What a chain of these hops makes of a row."""
    for constant in constants:
        inputs = run_blocks(inputs, constant)
    return inputs


async def until_free(chain: Chain) -> None:
    """Wait until nothing is held any more, anywhere."""
    await eventually(lambda: not any(executor.sessions for executor in chain.executors), "the end of all sessions")
    assert chain.pages == 0
    for handler in chain.handlers:
        assert handler.num_sessions == handler.num_rows == 0
        assert handler.history.used_bytes == 0 and not handler.history._clients
        assert handler._pending.used == 0
        assert not handler.pushes._targets and not handler.pushes._awaited and not handler.pushes._num_early
