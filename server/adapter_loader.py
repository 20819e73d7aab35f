"""Brings the adapters that sessions name into host memory: from other servers by hash, else from the client.

    load(digest, wish) ─► here already? ─► servers that clients name ─► a client: AdapterRequest ~~► AdapterOffer, parts
                                                  └── AdapterPart ──► adapter_intake ──► AdapterStore
    other servers ──AdapterRequest──► serve ─► what is here of it

One load per adapter, whoever waits for it, and as long as anybody does. Whole shards stay, so after a broken stream
only the rest is asked for. A sender that sends other bytes than it should is left for the next; an adapter that is
unfit is refused to all who wait for it, each in its own session. Sessions that don't use it notice nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from swarm.adapters.format import HashMismatch, Manifest
from swarm.adapters.transfer import MIN_BYTES_PER_S, send_parts
from swarm.errors import AdapterError, InvalidRequest, PeerBusy, PeerTimeout, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import AdapterOffer, AdapterRequest
from swarm.server.adapter_intake import PART_TIMEOUT_S, AdapterIntake, Base, Unfit
from swarm.server.adapter_store import AdapterStore, HeldAdapter
from swarm.transport import Stream

logger = logging.getLogger(__name__)

MAX_ASKS = 3
"""How often a client is asked while nothing comes."""


@dataclass(slots=True, kw_only=True, eq=False)
class Wish:
    """What one session wants."""

    client: str
    holders: tuple[str, ...]
    """Servers that may have it, says the client."""
    ask: Callable[[AdapterRequest], None]
    """Tells the client what to send."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Load:
    """An adapter on its way, and who waits for it."""

    wishes: list[Wish] = field(default_factory=list)
    num_bytes: int = 0
    """That have come, whatever became of them."""
    tried: set[str] = field(default_factory=set)
    """Servers that were asked."""
    num_streams: int = 0
    """On which clients send."""
    num_asked: int = 0
    """How often clients were asked since something came."""
    failure: SwarmError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None

    def clients(self) -> list[str]:
        return [wish.client for wish in self.wishes]

    def next_holder(self) -> tuple[str, str] | None:
        """A server that was not asked yet, and the client that named it."""
        for wish in self.wishes:
            for peer_id in wish.holders:
                if peer_id not in self.tried:
                    self.tried.add(peer_id)
                    return peer_id, wish.client
        return None

    def came(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.news.set()

    async def changes_within(self, timeout_s: float) -> bool:
        """Whether something comes, or a stream ends, within this time."""
        self.news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.news.wait()
        return self.news.is_set()


class AdapterLoader:
    """See the module.

    Args:
        store: where adapters go.
        base: what they must fit.
        open_stream: opens a stream to another server's `adapter` service, for a client that named it.
        on_work: told for which client how many seconds were worked on what came for it.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: Base,
        open_stream: Callable[[str, str], Awaitable[Stream]],
        on_work: Callable[[str, float], None] = lambda client, seconds: None,
    ):
        self.store = store
        self.num_fetched_bytes = self.num_uploaded_bytes = 0
        """From other servers and from clients, since the start."""
        self._intake = AdapterIntake(store, base, on_work)
        self._open_stream = open_stream
        self._loads: dict[str, _Load] = {}
        self._tasks = TaskSet()

    async def close(self) -> None:
        """Give up what is on its way."""
        await self._tasks.close()

    # -- for sessions -------------------------------------------------------------------------------------------

    async def load(self, digest: str, wish: Wish) -> HeldAdapter:
        """Wait until all is here that an adapter has for our blocks; the caller has pinned it.

        Raises:
            AdapterError: it is malformed, or not for this model.
            PeerBusy: there is no memory for it.
            PeerError: nobody sends it.
        """
        if not self._intake.is_here(digest):
            load = self._loads.get(digest)
            if load is None:
                load = self._loads[digest] = _Load()
                load.task = self._tasks.spawn(self._run(digest, load), name=f"adapter {digest[:8]}")
            await self._wait(digest, load, wish)
        held = self.store.find(digest)
        assert held is not None
        return held

    def progress(self, digest: str) -> tuple[int, int]:
        """Bytes that have come of an adapter, and bytes that it has for our blocks, as far as known."""
        held, load = self.store.find(digest), self._loads.get(digest)
        num_bytes = load.num_bytes if load is not None else 0
        if held is None:
            return num_bytes, num_bytes
        blocks = self._intake.base.blocks
        total = sum(info.num_bytes for info in held.manifest.within(blocks.start, blocks.end))
        return min(total, max(num_bytes, total - sum(info.num_bytes for info in held.missing(blocks)))), total

    async def keep(self, manifest: Manifest, shards: Mapping[int, bytes]) -> HeldAdapter:
        """Keep an adapter of this server's own for good.

        Raises:
            AdapterError: it does not fit the model.
            PeerBusy: nor the memory.
        """
        try:
            return await self._intake.keep(manifest, shards)
        except Unfit as unfit:
            raise unfit.error from unfit

    # -- the service --------------------------------------------------------------------------------------------

    async def serve(self, stream: Stream, message: AdapterRequest | AdapterOffer) -> None:
        """A stream to the `adapter` service, which began with this.

        Raises:
            SwarmError: nothing is here, or what is wrong with what came.
        """
        if isinstance(message, AdapterOffer):
            return await self._receive_upload(stream, message.digest)
        held = self.store.find(message.digest)
        if held is None:
            raise AdapterError(f"adapter {message.digest[:12]} is not here")
        shards = {block: shard.data for block, shard in held.shards.items()}
        await send_parts(stream, message, held.manifest_bytes, shards)

    async def _receive_upload(self, stream: Stream, digest: str) -> None:
        load = self._loads.get(digest)
        if load is None or stream.account not in load.clients():
            if self._intake.is_here(digest):
                return  # somebody else was quicker
            raise InvalidRequest(f"nobody has asked you for adapter {digest[:12]}")
        load.num_streams += 1
        before = load.num_bytes
        try:
            await self._intake.receive(stream, digest, load.clients, on_bytes=load.came)
        except Unfit as unfit:
            load.failure = unfit.error
            raise unfit.error from unfit
        except HashMismatch as error:
            raise AdapterError(str(error)) from error
        finally:
            self.num_uploaded_bytes += load.num_bytes - before
            load.num_streams -= 1
            load.news.set()

    # -- loading ------------------------------------------------------------------------------------------------

    async def _wait(self, digest: str, load: _Load, wish: Wish) -> None:
        load.wishes.append(wish)
        try:
            await asyncio.shield(load.done)
        finally:
            load.wishes.remove(wish)
            load.num_asked = 0
            load.news.set()  # if it was this one's client that was asked, another's is
            if not load.wishes and load.task is not None:
                load.task.cancel()
                self._forget(digest, load)

    async def _run(self, digest: str, load: _Load) -> None:
        try:
            while load.failure is None and not self._intake.is_here(digest):
                if (found := load.next_holder()) is not None:
                    await self._fetch(digest, load, *found)
                else:
                    await self._ask_client(digest, load)
        except PeerTimeout as error:
            load.failure = error
        finally:
            self._forget(digest, load)
            if self._intake.is_here(digest):
                load.done.set_result(None)
            elif load.wishes:
                load.done.set_exception(load.failure or PeerBusy("the server is stopping"))

    def _forget(self, digest: str, load: _Load) -> None:
        """What this load has reserved is free again."""
        if self._loads.get(digest) is load:
            del self._loads[digest]
            if (held := self.store.find(digest)) is not None:
                self.store.give_up(held)

    async def _fetch(self, digest: str, load: _Load, peer_id: str, client: str) -> None:
        """Take from another server what it has; where that fails, there are other sources."""
        before = load.num_bytes
        try:
            async with await self._open_stream(peer_id, client) as stream:
                await stream.send(self._intake.request(digest), timeout_s=PART_TIMEOUT_S)
                await self._intake.receive(
                    stream, digest, load.clients, on_bytes=load.came, min_bytes_per_s=MIN_BYTES_PER_S
                )
        except Unfit as unfit:
            load.failure = unfit.error
        except SwarmError as error:
            logger.info("adapter %.12s does not come from %s: %s", digest, peer_id, error)
        finally:
            self.num_fetched_bytes += load.num_bytes - before

    async def _ask_client(self, digest: str, load: _Load) -> None:
        """Let a client send what is missing, and wait as long as anything comes.

        Raises:
            PeerTimeout: clients were asked again and again, and send nothing.
        """
        before, wish = load.num_bytes, load.wishes[0]
        load.wishes.append(load.wishes.pop(0))  # it is another's turn next time
        load.num_asked += 1
        wish.ask(self._intake.request(digest))
        while await load.changes_within(PART_TIMEOUT_S) and load.num_streams:
            pass
        if load.num_bytes > before:
            load.num_asked = 0
        elif load.num_asked >= MAX_ASKS and not load.num_streams:
            raise PeerTimeout(f"asked {load.num_asked} times for adapter {digest[:12]}, nothing came")
