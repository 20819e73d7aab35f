"""The streams of a training run to the servers of one chain: what is posted goes out in order, what comes is reported.

    open_chain ─► streams to all hops; each linked to the next, where they can reach each other ─► TrainingChain
    post(hop, message) ─► outbox ─► writer ─► Stream ~~► server        Listener ◄─ message, failure ─ reader ◄─ Stream

The outbox has no limit of its own: what waits there are micro-batches that the client keeps anyway. It knows nothing of
micro-batches, versions and retries.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Protocol

from swarm.errors import PeerDisconnected, PeerMisbehaved, PeerTimeout, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import TRAIN_SERVICE, Message, OpenTraining, TrainingOpened, TrainLink, TrainLinked, printable
from swarm.transport import EndOfStream, Stream, Transport
from swarm.types import Hop

logger = logging.getLogger(__name__)

Posted = tuple[Message, bytes | memoryview]


class ChainListener(Protocol):
    """Who is told of what happens to a chain, on the loop, one call at a time."""

    def on_message(self, index: int, message: Message, body: memoryview) -> None:
        """A hop has sent something. A SwarmError that this raises is the hop's failure."""

    def on_sent(self, index: int, message: Message) -> None:
        """What was posted has gone out."""

    def on_failure(self, index: int, error: SwarmError) -> None:
        """A hop is lost, and the chain with it; nothing more will be reported."""


class TrainingChain:
    """Streams to all hops of a route, open. Made by `open_chain`."""

    def __init__(
        self, hops: Sequence[Hop], streams: Sequence[Stream], opened: Sequence[TrainingOpened], links: frozenset[int]
    ):
        self.hops = tuple(hops)
        self.links = links
        """Hops that send to the next one by themselves."""
        self.max_tokens = min(it.max_tokens for it in opened)
        """Most tokens of a micro-batch."""
        self.good_tokens = min(it.good_tokens for it in opened)
        """What a micro-batch should have about."""
        self.versions: dict[int, int] = {}
        """Of the parameters, that all hops have, by the ascending numbers under which the chain knows them."""
        self._streams = tuple(streams)
        self._outboxes: list[deque[Posted]] = [deque() for _ in hops]
        self._wakes = [asyncio.Event() for _ in hops]
        self._tasks = TaskSet()
        self._is_over = False

    def start(self, listener: ChainListener) -> None:
        """Report to this one from now on."""
        for index, stream in enumerate(self._streams):
            for work in (self._read(index, stream, listener), self._write(index, stream, listener)):
                self._tasks.spawn(work, name=f"training at {self.hops[index].peer_id}")

    def post(self, index: int, message: Message, body: bytes | memoryview = b"") -> None:
        """Send a message to a hop as soon as there is room for it."""
        self._outboxes[index].append((message, body))
        self._wakes[index].set()

    async def close(self) -> None:
        """End all streams; servers forget the run."""
        self._is_over = True
        await self._tasks.close()
        for stream in self._streams:
            await stream.close()

    async def _read(self, index: int, stream: Stream, listener: ChainListener) -> None:
        try:
            while True:
                message, body = await stream.receive()
                listener.on_message(index, message, body)
        except EndOfStream:
            self._fail(index, PeerDisconnected("the server ended the run", peer_id=stream.peer_id), listener)
        except SwarmError as error:
            self._fail(index, error, listener)

    async def _write(self, index: int, stream: Stream, listener: ChainListener) -> None:
        outbox, wake = self._outboxes[index], self._wakes[index]
        try:
            while True:
                await wake.wait()
                wake.clear()
                while outbox:
                    message, body = outbox.popleft()
                    await stream.send(message, body)
                    listener.on_sent(index, message)
        except SwarmError as error:
            self._fail(index, error, listener)

    def _fail(self, index: int, error: SwarmError, listener: ChainListener) -> None:
        if not self._is_over:
            self._is_over = True
            listener.on_failure(index, error)


class HopFailed(Exception):
    """A chain could not be opened because of one hop.

    Args:
        hop: which one.
        error: what it said, or that it did not.
    """

    def __init__(self, hop: Hop, error: SwarmError):
        super().__init__(str(error))
        self.hop, self.error = hop, error


async def open_chain(
    transport: Transport,
    hops: Sequence[Hop],
    *,
    model: str,
    timeout_s: float,
    may_link: Callable[[Hop, Hop], bool] = lambda hop, following: True,
    on_unlinked: Callable[[Hop, Hop], None] = lambda hop, following: None,
) -> TrainingChain:
    """Open streams to all hops at the same time, then link each to the next.

    Args:
        transport: how they are reached.
        hops: of the route.
        model: content digest of the checkpoint.
        timeout_s: for all of them to answer; once for opening, once for linking.
        may_link: whether a hop should send to the next one.
        on_unlinked: told of two that should, and can't.

    Raises:
        HopFailed: one of them can't be reached or refuses.
    """
    keys = [secrets.token_bytes(16) for _ in hops]
    tasks = [
        asyncio.create_task(_open(transport, *of_hop, model, timeout_s)) for of_hop in zip(hops, keys, strict=True)
    ]
    try:
        opened = await asyncio.gather(*tasks)
        streams = [stream for stream, _ in opened]
        links = set()
        wanted = [index for index, pair in enumerate(pairwise(hops)) if may_link(*pair)]
        answers = (_link(hops[it], streams[it], hops[it + 1], keys[it + 1], timeout_s) for it in wanted)
        for index, is_linked in zip(wanted, await asyncio.gather(*answers), strict=True):
            if is_linked:
                links.add(index)
            else:
                on_unlinked(hops[index], hops[index + 1])
    except BaseException:  # also when we are cancelled: an open stream is a run that the server holds for us
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result[0].close()
        raise
    return TrainingChain(hops, streams, [message for _, message in opened], frozenset(links))


async def _open(
    transport: Transport, hop: Hop, push_key: bytes, model: str, timeout_s: float
) -> tuple[Stream, TrainingOpened]:
    stream = None
    try:
        async with _blaming(hop, timeout_s):
            stream = await transport.open(hop.peer_id, TRAIN_SERVICE, timeout_s=timeout_s)
            await stream.send(OpenTraining(push_key=push_key, model=model, start=hop.blocks.start, end=hop.blocks.end))
            message, _ = await stream.receive()
            if not isinstance(message, TrainingOpened):
                raise PeerMisbehaved(f"expected TrainingOpened, got {type(message).__name__}", peer_id=hop.peer_id)
            return stream, message
    except BaseException:
        if stream is not None:
            await stream.close()
        raise


async def _link(hop: Hop, stream: Stream, following: Hop, push_key: bytes, timeout_s: float) -> bool:
    """Whether a hop sends to the next one by itself from now on."""
    async with _blaming(hop, timeout_s):
        await stream.send(TrainLink(peer_id=following.peer_id, push_key=push_key))
        message, _ = await stream.receive()
        if not isinstance(message, TrainLinked):
            raise PeerMisbehaved(f"expected TrainLinked, got {type(message).__name__}", peer_id=hop.peer_id)
    if message.fault:
        logger.info("no link from %s to %s: %s", hop.peer_id, following.peer_id, printable(message.fault))
    return not message.fault


@asynccontextmanager
async def _blaming(hop: Hop, timeout_s: float) -> AsyncIterator[None]:
    """What goes wrong, or takes longer, is this hop's failure."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        error: SwarmError = PeerTimeout(f"no training run within {timeout_s:g} s", peer_id=hop.peer_id)
    except EndOfStream:
        error = PeerDisconnected("the server ended the run", peer_id=hop.peer_id)
    except SwarmError as refusal:
        error = refusal
    else:
        return
    raise HopFailed(hop, error) from error
