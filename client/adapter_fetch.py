"""Fetches an adapter of which only the digest is known, from the servers that have it.

    "sha256:3f..." ─► fetch_adapter: manifest ◄~~ whoever has it first           AdapterRequest, by hash
                                     shards   ◄~~ those that serve their blocks ─► names, shapes, NaN ─► LoadedAdapter

Those who announce the adapter are asked first, the others after them, since announcements are bounded. What comes is
believed only with its hash; a server that sends anything else, or hardly anything, is left for the next. The client
keeps all shards, so that sessions outlive the servers that it had them from.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from swarm.adapters.format import HashMismatch, Manifest, decode_shard
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft import LoadedAdapter
from swarm.adapters.peft_files import MAX_ADAPTER_BYTES
from swarm.adapters.transfer import Assembly, is_too_slow
from swarm.errors import AdapterError, InvalidRequest, PeerMisbehaved, PeerTimeout, SwarmError
from swarm.protocol import AdapterPart, AdapterRequest
from swarm.registry import ServerRecord
from swarm.transport import EndOfStream, Stream
from swarm.types import name_ranges

logger = logging.getLogger(__name__)

PART_TIMEOUT_S = 10.0
"""Longest silence of a server that sends."""
MAX_FETCH_S = 1800.0
"""Longest that all of an adapter may take, whoever sends it."""


async def fetch_adapter(
    digest: str,
    records: Sequence[ServerRecord],
    open_stream: Callable[[str], Awaitable[Stream]],
    layout: ModelLayout,
    *,
    max_bytes: int = MAX_ADAPTER_BYTES,
    timeout_s: float = MAX_FETCH_S,
    clock: Callable[[], float] = time.monotonic,
) -> LoadedAdapter:
    """All of an adapter.

    Args:
        digest: of its manifest.
        records: servers that may be asked.
        open_stream: opens a stream to a server's `adapter` service.
        layout: of the model that it must fit.
        max_bytes: of all its shards.
        timeout_s: longest that all of it may take.
        clock: seconds, by which it is looked how fast a server sends.

    Raises:
        AdapterError: nobody has it, or some of it, or it did not come in time; or it is not for this model, or larger
            than that.
    """
    fetch = _Fetch(digest, layout, max_bytes, clock)
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask_all(fetch, digest, records, open_stream)
    except TimeoutError as error:
        raise AdapterError(f"{fetch.name} did not come within {timeout_s:g} s: {fetch.progress}") from error


async def _ask_all(
    fetch: "_Fetch", digest: str, records: Sequence[ServerRecord], open_stream: Callable[[str], Awaitable[Stream]]
) -> LoadedAdapter:
    asked = sorted(records, key=lambda record: not any(note.is_about(digest) for note in record.adapters))
    for record in asked:
        if (request := fetch.wanted_from(record)) is None:
            continue
        try:
            async with await open_stream(record.peer_id) as stream:
                await stream.send(request, timeout_s=PART_TIMEOUT_S)
                await fetch.receive(stream, request)
        except _Unfit as unfit:
            raise AdapterError(str(unfit)) from unfit
        except SwarmError as error:
            logger.info("adapter %.12s does not come from %s: %s", digest, record.peer_id, error)
    return fetch.result(len(asked))


class _Unfit(Exception):
    """The adapter itself is wrong, whoever sends it."""


class _Fetch:
    """What has come of an adapter so far."""

    def __init__(self, digest: str, layout: ModelLayout, max_bytes: int, clock: Callable[[], float]):
        self._digest, self._layout, self._max_bytes, self._clock = digest, layout, max_bytes, clock
        self._manifest: Manifest | None = None
        self._shards: dict[int, bytes] = {}

    @property
    def name(self) -> str:
        """For messages."""
        return f"adapter sha256:{self._digest[:12]}…"

    @property
    def progress(self) -> str:
        """How much is here."""
        if self._manifest is None:
            return "nothing is here"
        return f"{len(self._shards)} of {len(self._manifest.shards)} blocks are here"

    def wanted_from(self, record: ServerRecord) -> AdapterRequest | None:
        """What to ask a server for; None where it can have nothing that is missing."""
        blocks = tuple(block for block in record.blocks if self._is_missing(block))
        if self._manifest is not None and not blocks:
            return None
        return AdapterRequest(digest=self._digest, with_manifest=self._manifest is None, blocks=blocks)

    async def receive(self, stream: Stream, request: AdapterRequest) -> None:
        """Take what a server sends until that is all, or it ends the stream.

        Raises:
            _Unfit: the adapter can't be used.
            SwarmError: the server can't be used.
        """
        assembly = Assembly(with_manifest=request.with_manifest)
        self._expect(assembly, request)
        started = self._clock()
        while not assembly.is_done:
            try:
                part, body = await stream.receive(PART_TIMEOUT_S)
            except EndOfStream:
                return
            if not isinstance(part, AdapterPart):
                raise PeerMisbehaved(f"expected AdapterPart, got {type(part).__name__}", peer_id=stream.peer_id)
            if (whole := assembly.take(part, body)) is not None:
                await self._take(*whole)
                if whole[0] is None:
                    self._expect(assembly, request)
            elapsed_s = self._clock() - started
            if is_too_slow(assembly.num_bytes, elapsed_s):
                raise PeerTimeout(f"{assembly.num_bytes} bytes in {elapsed_s:.0f} s", peer_id=stream.peer_id)

    def result(self, num_asked: int) -> LoadedAdapter:
        """The adapter, when all who could have it were asked.

        Raises:
            AdapterError: something is missing.
        """
        if self._manifest is None:
            raise AdapterError(f"no server has {self.name}; {num_asked} were asked")
        missing = [info.block for info in self._manifest.shards if info.block not in self._shards]
        if missing:
            raise AdapterError(f"no server has what {self.name} does to blocks {name_ranges(missing)}")
        return LoadedAdapter(manifest=self._manifest, shards=dict(sorted(self._shards.items())), embeddings_PH=None)

    def _is_missing(self, block: int) -> bool:
        manifest = self._manifest
        return block not in self._shards and (manifest is None or bool(manifest.within(block, block + 1)))

    def _expect(self, assembly: Assembly, request: AdapterRequest) -> None:
        for info in self._manifest.shards if self._manifest is not None else ():
            if info.block in request.blocks:
                assembly.expect(info.block, info.num_bytes)

    async def _take(self, block: int | None, data: bytearray) -> None:
        try:
            if block is None:
                self._manifest = self._check(Manifest.decode(data, digest=self._digest))
                return
            assert self._manifest is not None  # shards are expected after it only
            (info,) = self._manifest.within(block, block + 1)
            shape, num_virtual = self._layout.blocks[block], self._manifest.num_virtual
            await asyncio.to_thread(decode_shard, data, info, shape, num_virtual)
            self._shards[block] = bytes(data)
        except HashMismatch:
            raise
        except InvalidRequest as error:
            raise _Unfit(str(error)) from error

    def _check(self, manifest: Manifest) -> Manifest:
        ours = (len(self._layout.blocks), self._layout.hidden_size)
        if (theirs := (manifest.num_blocks, manifest.hidden_size)) != ours:
            raise _Unfit(f"{self.name} is for {manifest.base}, (blocks, width) {theirs}; this model has {ours}")
        if manifest.num_bytes > self._max_bytes:
            raise _Unfit(f"{self.name} has {manifest.num_bytes} bytes, limit {self._max_bytes}")
        if manifest.embeddings is not None:
            raise _Unfit(f"{self.name} has embeddings, which servers don't keep: load it from its files")
        return manifest
