"""Adapters between the clients of a run: what others may have of ours, and what we fetch of theirs, checked.

    Delivery.fetch ─AdapterRequest─► a peer ─AdapterPart ...─► manifest: sizes, ranks ─► shards: hash, shapes, NaN
    a peer's AdapterRequest ─► Delivery.send ─► what is on the shelf: adapters of this round and the last

It knows nothing of rounds. Nothing larger is taken than the rules of a run allow, and what isn't believed is not kept.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from swarm.adapters.delta import BlockDelta
from swarm.adapters.format import HashMismatch, Manifest
from swarm.adapters.peft import LoadedAdapter
from swarm.adapters.transfer import Assembly, is_too_slow, send_parts
from swarm.errors import InvalidRequest, PeerBusy, PeerError, PeerMisbehaved, PeerTimeout, RequestError
from swarm.federated.aggregate import Update
from swarm.federated.updates import Rules, check_manifest, read_shard
from swarm.protocol import FEDERATED_SERVICE, AdapterPart, AdapterRequest
from swarm.rates import Rate, Rates
from swarm.transport import EndOfStream, Stream, Transport

OPEN_TIMEOUT_S = 5.0
PART_TIMEOUT_S = 10.0
"""Longest silence of a peer that sends."""
MAX_SENDS = 16
MAX_SENDS_PER_ACCOUNT = 2
"""Adapters that are sent at once."""
SERVE_RATE = Rate(burst=128, per_s=2)
"""Requests for adapters by one account; a fetch takes two."""


@dataclass(slots=True)
class Bytes:
    """Of adapters, without what transports add."""

    sent: int = 0
    received: int = 0


class Delivery:
    """See the module docstring.

    Args:
        transport: to the peers, started.
    """

    def __init__(self, transport: Transport):
        self.bytes = Bytes()
        self._transport = transport
        self._shelf: dict[str, LoadedAdapter] = {}
        self._kept: dict[str, LoadedAdapter] = {}
        self._rates = Rates(SERVE_RATE)
        self._sends: Counter[str] = Counter()

    def offer(self, adapter: LoadedAdapter) -> None:
        """Let others have an adapter."""
        self._shelf[adapter.digest] = adapter

    def keep(self, digests: Collection[str]) -> None:
        """Only these are offered any more, of what was since the last round: a round has come to nothing."""
        self._shelf = {digest: adapter for digest, adapter in self._shelf.items() if digest in digests}

    def turn(self) -> None:
        """A round is over: what was offered until now may be had until the next call, and no longer."""
        self._kept, self._shelf = self._shelf, {}

    async def fetch(self, peer_id: str, digest: str, rules: Rules) -> tuple[LoadedAdapter, Update]:
        """An adapter from a peer, all of it checked.

        Raises:
            PeerMisbehaved: it sends something else. PeerError: it does not send all of it.
            InvalidRequest: the adapter itself does not fit the rules, whoever sends it.
        """
        try:
            part = await self._receive(peer_id, AdapterRequest(digest=digest, with_manifest=True, blocks=()), {})
            manifest = Manifest.decode(part[None], digest=digest)
            check_manifest(manifest, rules)
            sizes = {info.block: info.num_bytes for info in manifest.shards}
            request = AdapterRequest(digest=digest, with_manifest=False, blocks=tuple(sizes))
            parts = await self._receive(peer_id, request, sizes)
            shards = {info.block: bytes(parts[info.block]) for info in manifest.shards}

            def read() -> dict[int, BlockDelta]:
                return {info.block: read_shard(parts[info.block], info, rules) for info in manifest.shards}

            update = await asyncio.to_thread(read)
        except HashMismatch as error:
            raise PeerMisbehaved(f"{peer_id}: {error}", peer_id=peer_id) from error
        return LoadedAdapter(manifest=manifest, shards=shards, embeddings_PH=None), update

    async def send(self, stream: Stream, request: AdapterRequest) -> None:
        """Answer a peer.

        Raises:
            InvalidRequest: the adapter is not on offer. PeerBusy: too many are being sent.
            SwarmError: the peer is gone.
        """
        adapter = self._shelf.get(request.digest) or self._kept.get(request.digest)
        if adapter is None:
            raise InvalidRequest(f"adapter {request.digest[:12]} belongs to no round that is known here")
        account, now = stream.account, asyncio.get_running_loop().time()
        if self._sends.total() >= MAX_SENDS or self._sends[account] >= MAX_SENDS_PER_ACCOUNT:
            raise PeerBusy(f"{self._sends[account]} of {self._sends.total()} adapters are being sent to {account}")
        if not self._rates.charge(account, now):
            raise PeerBusy(
                f"over {SERVE_RATE.per_s:g} requests per second",
                retry_after_s=self._rates.retry_after_s(account, now),
            )
        self._sends[account] += 1
        try:
            await send_parts(stream, request, adapter.manifest.encode(), adapter.shards, on_sent=self._count_sent)
        finally:
            self._sends[account] -= 1
            if not self._sends[account]:
                del self._sends[account]

    async def _receive(
        self, peer_id: str, request: AdapterRequest, sizes: Mapping[int, int]
    ) -> dict[int | None, bytearray]:
        """What was asked for; whatever goes wrong here is the peer's fault, also where it says that it is ours."""
        try:
            return await self._receive_parts(peer_id, request, sizes)
        except RequestError as error:
            raise PeerError(f"{peer_id} does not send an adapter: {error}", peer_id=peer_id) from error

    async def _receive_parts(
        self, peer_id: str, request: AdapterRequest, sizes: Mapping[int, int]
    ) -> dict[int | None, bytearray]:
        assembly = Assembly(with_manifest=request.with_manifest)
        for block, num_bytes in sizes.items():
            assembly.expect(block, num_bytes)
        whole: dict[int | None, bytearray] = {}
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with await self._transport.open(peer_id, FEDERATED_SERVICE, timeout_s=OPEN_TIMEOUT_S) as stream:
            await stream.send(request, timeout_s=OPEN_TIMEOUT_S)
            while not assembly.is_done:
                try:
                    part, body = await stream.receive(PART_TIMEOUT_S)
                except EndOfStream as error:
                    raise PeerMisbehaved(f"{peer_id} has not sent all of an adapter", peer_id=peer_id) from error
                if not isinstance(part, AdapterPart):
                    raise PeerMisbehaved(f"expected AdapterPart, got {type(part).__name__}", peer_id=peer_id)
                if (piece := assembly.take(part, body)) is not None:
                    whole[piece[0]] = piece[1]
                self.bytes.received += len(body)
                if is_too_slow(assembly.num_bytes, loop.time() - started):
                    raise PeerTimeout(f"{assembly.num_bytes} bytes in {loop.time() - started:.0f} s", peer_id=peer_id)
        return whole

    def _count_sent(self, num_bytes: int) -> None:
        self.bytes.sent += num_bytes
