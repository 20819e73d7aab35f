"""The adapters of this server, as its handler and its sessions see them.

OpenSession ─► lease: pin ─► AdapterLoader.load ─► Executor.add_adapter ─► the session's work may run
                                   └─ once a second: AdapterLoading ~~► client
service `adapter` ─► serve              AdapterStore ─ evicted ─► Executor.forget_adapter
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from swarm.adapters.format import Manifest
from swarm.adapters.notes import MAX_NOTES, AdapterNote
from swarm.errors import AdapterError, InvalidRequest, SwarmError
from swarm.protocol import AdapterLoading, AdapterOffer, AdapterRequest, Message, OpenSession
from swarm.server.adapter_intake import Base
from swarm.server.adapter_loader import AdapterLoader, Wish
from swarm.server.adapter_store import OWNER, AdapterStore, HeldAdapter
from swarm.server.executor import Executor
from swarm.transport import Stream

TELL_PERIOD_S = 1.0
"""How often a client is told how far its adapters have come."""


class AdapterDesk:
    """See the module.

    Args:
        executor: the device thread.
        base: what adapters must fit.
        limit_bytes: host memory for them; 0 takes none.
        open_stream: opens a stream to another server's `adapter` service, for a client that named it.
    """

    def __init__(
        self, executor: Executor, base: Base, *, limit_bytes: int, open_stream: Callable[[str, str], Awaitable[Stream]]
    ):
        self.store = AdapterStore(limit_bytes, on_evicted=executor.forget_adapter)
        self.loader = AdapterLoader(self.store, base, open_stream, on_work=self._charge)
        self._executor, self._base = executor, base

    async def close(self) -> None:
        """Give up what is on its way."""
        await self.loader.close()

    def lease(self, opened: OpenSession, client: str, tell: Callable[[Message], None]) -> "AdapterLease":
        """The adapters of a new session.

        Args:
            opened: what the client asked for.
            client: who it is.
            tell: sends it a message.
        """
        return AdapterLease(self, opened, client, tell)

    async def serve(self, stream: Stream, message: Message) -> None:
        """A stream to the `adapter` service, which began with this message.

        Raises:
            SwarmError: it asks for what is not here, or sends what it should not.
        """
        if not isinstance(message, AdapterRequest | AdapterOffer):
            raise InvalidRequest(f"expected AdapterRequest or AdapterOffer, got {type(message).__name__}")
        await self.loader.serve(stream, message)

    async def keep(self, manifest: Manifest, shards: Mapping[int, bytes]) -> None:
        """Keep an adapter for good, in host memory, and on the device while there is room.

        Raises:
            AdapterError: it does not fit the model.
            PeerBusy: nor the memory.
        """
        self.give(await self.loader.keep(manifest, shards), OWNER)

    def notes(self) -> tuple[AdapterNote, ...]:
        """What this server says of its adapters in its record: those on the device, then the most recently used."""
        blocks, attached = self._base.blocks, set(self._executor.attached_adapters)
        whole = [held for held in self.store if not held.missing(blocks)]
        whole.sort(key=lambda held: held.digest not in attached)
        return tuple(
            AdapterNote.of(held.digest, held.max_rank(blocks), on_device=held.digest in attached)
            for held in whole[:MAX_NOTES]
        )

    def give(self, held: HeldAdapter, client: str) -> None:
        """Let the device thread have an adapter that is here, for a client.

        Raises:
            PeerBusy: the device could never hold it.
        """
        self._executor.add_adapter(held.digest, held.deltas(self._base.blocks), client=client)

    def _charge(self, client: str, seconds: float) -> None:
        if client != OWNER:
            self._executor.charge(client, seconds)


class AdapterLease:
    """The adapters of one session, which stay in host memory until it is closed; made by `AdapterDesk.lease`."""

    def __init__(self, desk: AdapterDesk, opened: OpenSession, client: str, tell: Callable[[Message], None]):
        self._desk, self._client, self._tell = desk, client, tell
        self._digests, self._holders = opened.adapters, opened.holders
        for digest in self._digests:
            desk.store.pin(digest, client)

    async def load(self) -> None:
        """Wait until the device thread has all adapters of the session.

        Raises:
            SwarmError: one of them can't be had.
        """
        teller = asyncio.create_task(self._tell_progress(), name="adapter progress")
        try:
            async with asyncio.TaskGroup() as group:
                for digest in self._digests:
                    group.create_task(self._load(digest))
        except* SwarmError as group_of_errors:
            raise _first(group_of_errors) from None
        finally:
            teller.cancel()

    def close(self) -> None:
        """The session has ended, and the device thread knows it."""
        for digest in self._digests:
            self._desk.store.unpin(digest, self._client)
        self._digests = ()

    async def _load(self, digest: str) -> None:
        wish = Wish(client=self._client, holders=self._holders, ask=self._tell)
        self._desk.give(await self._desk.loader.load(digest, wish), self._client)

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(TELL_PERIOD_S)
            parts = [self._desk.loader.progress(digest) for digest in self._digests]
            done, total = (sum(values) for values in zip(*parts, strict=True))
            self._tell(AdapterLoading(num_bytes=done, total_bytes=total))


def _first(group: BaseExceptionGroup[SwarmError]) -> SwarmError:
    """One of the errors, the adapter's own before a peer's."""
    errors = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    return next((error for error in errors if isinstance(error, AdapterError)), errors[0])
