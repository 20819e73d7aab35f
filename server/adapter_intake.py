"""What comes of an adapter over one stream, checked and put into host memory.

    stream ─AdapterPart─► Assembly ─manifest─► fits the model? room? ─► AdapterStore.add, reserve
                                   ─shard──► hash, names, shapes, ranks, NaN (in a thread) ─► AdapterStore.put

Shards are checked one at a time, the client's first that has had least of that, and the time is told to whoever counts
what clients cost: a client that brings adapter after adapter takes one core at most, and pays for it.

Two kinds of failures are kept apart. Bytes that are not those of their name, or not in order, are the sender's fault,
and another may do better. `Unfit` is the adapter's, or this server's memory: it stays so whoever sends it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarm.adapters.format import HashMismatch, Manifest, ShardInfo, decode_shard
from swarm.adapters.layout import BlockShape
from swarm.adapters.transfer import Assembly, is_too_slow
from swarm.errors import AdapterError, InvalidRequest, PeerBusy, PeerMisbehaved, PeerTimeout, SwarmError
from swarm.protocol import AdapterPart, AdapterRequest
from swarm.server.adapter_store import OWNER, AdapterStore, HeldAdapter, HeldShard
from swarm.server.turns import Turns
from swarm.transport import EndOfStream, Stream
from swarm.types import BlockRange

T = TypeVar("T")

PART_TIMEOUT_S = 10.0
"""Longest silence of whoever sends."""


class Unfit(Exception):
    """The adapter can't be kept here, for a reason that the one who sent it can't change.

    Args:
        error: what those who wait for it are told.
    """

    def __init__(self, error: SwarmError):
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What an adapter must fit."""

    blocks: BlockRange
    """Of this server: nothing else of an adapter is kept."""
    shapes: Mapping[int, BlockShape]
    """Of these blocks."""
    num_blocks: int
    """Of the whole model."""
    hidden_size: int
    name: str
    """For messages."""


class AdapterIntake:
    """See the module.

    Args:
        store: where adapters go.
        base: what they must fit.
        on_work: told for which client how many seconds were worked on what came for it.
    """

    def __init__(
        self, store: AdapterStore, base: Base, on_work: Callable[[str, float], None] = lambda client, seconds: None
    ):
        self.base = base
        self._store, self._on_work = store, on_work
        self._turns = Turns()

    def is_here(self, digest: str) -> bool:
        """Whether all is here that the adapter has for our blocks."""
        held = self._store.find(digest)
        return held is not None and not held.missing(self.base.blocks)

    def request(self, digest: str) -> AdapterRequest:
        """What is not here."""
        held = self._store.find(digest)
        if held is None:
            return AdapterRequest(digest=digest, with_manifest=True, blocks=tuple(self.base.blocks))
        missing = tuple(info.block for info in held.missing(self.base.blocks))
        return AdapterRequest(digest=digest, with_manifest=False, blocks=missing)

    async def receive(
        self,
        stream: Stream,
        digest: str,
        clients: Callable[[], Sequence[str]],
        *,
        on_bytes: Callable[[int], None],
        min_bytes_per_s: int = 0,
    ) -> None:
        """Take what comes on a stream until all is here, the sender ends it, or nobody waits for it any more.

        Args:
            stream: on which parts come, and nothing else.
            digest: of the adapter.
            clients: those who wait for it now; the first with room for it is charged.
            on_bytes: told of each part.
            min_bytes_per_s: a sender that is slower is given up.

        Raises:
            Unfit: the adapter can't be kept.
            HashMismatch, PeerError: the sender's fault; what was whole is kept.
        """
        held = self._store.find(digest)
        assembly = Assembly(with_manifest=held is None)
        if held is not None:
            self._expect(assembly, held, clients())
        started = time.monotonic()
        while clients() and not assembly.is_done and not self.is_here(digest):
            try:
                part, body = await stream.receive(PART_TIMEOUT_S)
            except EndOfStream:
                return
            if not isinstance(part, AdapterPart):
                raise PeerMisbehaved(f"expected AdapterPart, got {type(part).__name__}", peer_id=stream.peer_id)
            on_bytes(len(body))
            if (whole := assembly.take(part, body)) is not None:
                held = await self._take(digest, *whole, clients)
                if whole[0] is None:
                    self._expect(assembly, held, clients())
            elapsed_s = time.monotonic() - started
            if is_too_slow(assembly.num_bytes, elapsed_s, min_bytes_per_s=min_bytes_per_s):
                raise PeerTimeout(f"{assembly.num_bytes} bytes in {elapsed_s:.0f} s", peer_id=stream.peer_id)

    async def keep(self, manifest: Manifest, shards: Mapping[int, bytes]) -> HeldAdapter:
        """Keep an adapter of this server's own for good.

        Raises:
            Unfit: it can't be kept.
        """
        held = self._begin(manifest.digest, bytearray(manifest.encode()), [OWNER])
        self._reserve(held, [OWNER])
        for info in held.missing(self.base.blocks):
            await self._check(held, info, bytearray(shards[info.block]))
        return held

    def _expect(self, assembly: Assembly, held: HeldAdapter, clients: Sequence[str]) -> None:
        """Make room for what is missing, and wait for it."""
        self._reserve(held, clients)
        for info in held.missing(self.base.blocks):
            assembly.expect(info.block, info.num_bytes)

    async def _take(
        self, digest: str, block: int | None, data: bytearray, clients: Callable[[], Sequence[str]]
    ) -> HeldAdapter:
        held = self._store.find(digest)
        if block is None:
            return held or self._begin(digest, data, clients())
        if held is None:  # nobody waits for it any more, so it could be evicted meanwhile
            raise PeerBusy("nobody waits for this adapter any more")
        info = next(info for info in held.manifest.within(block, block + 1))
        await self._check(held, info, data)
        return held

    def _begin(self, digest: str, data: bytearray, clients: Sequence[str]) -> HeldAdapter:
        """The manifest is here: does it fit the model, and whose is it?"""
        base = self.base
        try:
            manifest = Manifest.decode(data, digest=digest)
        except HashMismatch:
            raise
        except InvalidRequest as error:
            raise Unfit(AdapterError(str(error))) from error
        ours, theirs = (base.num_blocks, base.hidden_size), (manifest.num_blocks, manifest.hidden_size)
        if ours != theirs:
            raise Unfit(
                AdapterError(f"the adapter is for {manifest.base}, (blocks, width) {theirs}; {base.name} has {ours}")
            )
        return _first_with_room(clients, lambda client: self._store.add(manifest, bytes(data), client=client))

    def _reserve(self, held: HeldAdapter, clients: Sequence[str]) -> None:
        missing = sum(info.num_bytes for info in held.missing(self.base.blocks)) - held.reserved_bytes
        if missing > 0:
            _first_with_room(clients, lambda client: self._store.reserve(held, missing, client=client))

    async def _check(self, held: HeldAdapter, info: ShardInfo, data: bytearray) -> None:
        """A shard is here: is it what the manifest says, and does it fit its block?"""
        try:
            shape, num_virtual = self.base.shapes[info.block], held.manifest.num_virtual
            async with self._turns.turn(held.owner):
                started = time.monotonic()
                try:
                    delta = await asyncio.to_thread(decode_shard, data, info, shape, num_virtual)
                finally:
                    self._on_work(held.owner, time.monotonic() - started)
        except HashMismatch:
            raise
        except InvalidRequest as error:
            raise Unfit(AdapterError(str(error))) from error
        try:
            self._store.put(held, info.block, HeldShard(data=data, delta=delta))
        except PeerBusy as error:
            raise Unfit(error) from error


def _first_with_room(clients: Sequence[str], attempt: Callable[[str], T]) -> T:
    """What the first client gives that has room.

    Raises:
        Unfit: none has.
    """
    refusal: SwarmError = PeerBusy("nobody waits for this adapter any more")
    for client in dict.fromkeys(clients):
        try:
            return attempt(client)
        except PeerBusy as error:
            refusal = error
    raise Unfit(refusal)
