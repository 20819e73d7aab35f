"""The versions of one training run's parameters that its client has sent, and not forgotten yet.

    TrainParameters, body ─ manifest, difference to a base ─ check ─► ParameterVersion: deltas by block

A new version is made of the one before, so two are kept, usually. Everything that comes is checked; what a version is
used for is the run's business.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarm.adapters.delta import BlockDelta
from swarm.adapters.difference import apply_difference
from swarm.adapters.format import Manifest, decode_shard
from swarm.errors import InvalidRequest
from swarm.protocol import TrainParameters
from swarm.server.blocks.span import BlockSpan
from swarm.types import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterVersion:
    """A version of the parameters."""

    deltas: Mapping[int, BlockDelta] = field(default_factory=dict)
    shards: memoryview = field(default_factory=lambda: memoryview(b""))
    """One after another; the deltas are views of them. Nobody changes them."""
    num_virtual: int = 0


NO_PARAMETERS = ParameterVersion()


class ParameterVersions:
    """See the module.

    Args:
        blocks: of the run.
        span: what this server runs.
        max_bytes: of all versions together.
    """

    def __init__(self, blocks: BlockRange, span: BlockSpan, *, max_bytes: int):
        self._blocks, self._span, self._max_bytes = blocks, span, max_bytes
        self._known: dict[int, ParameterVersion] = {}
        self._last = -1
        self._changed = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """Of all versions."""
        return sum(len(known.shards) for known in self._known.values())

    def get(self, version: int) -> ParameterVersion:
        """A version; -1 is that without any parameters.

        Raises:
            InvalidRequest: it is not here.
        """
        if version == -1:
            return NO_PARAMETERS
        known = self._known.get(version)
        if known is None:
            raise InvalidRequest(f"version {version} of the parameters is stale; there are {sorted(self._known)}")
        return known

    async def until(self, version: int) -> None:
        """Wait for a version that may not have come yet."""
        while version > self._last:
            self._changed.clear()
            await self._changed.wait()

    def add(self, message: TrainParameters, body: memoryview) -> None:
        """A new version.

        Raises:
            InvalidRequest: it is older than the last, does not fit the model, or there is no room for it.
        """
        if message.version <= self._last:
            raise InvalidRequest(f"parameters of version {message.version} after {self._last}: stale")
        manifest = Manifest.decode(body[: message.manifest_bytes], digest=message.digest)
        if manifest.hidden_size != self._span.hidden_size:
            raise InvalidRequest(
                f"parameters for hidden size {manifest.hidden_size}, the model has {self._span.hidden_size}"
            )
        shards = self._shards(message, body[message.manifest_bytes :])
        rest, deltas = shards, {}
        for info in manifest.within(self._blocks.start, self._blocks.end):
            shape = self._span.shape(info.block)
            deltas[info.block] = decode_shard(rest[: info.num_bytes], info, shape, manifest.num_virtual)
            rest = rest[info.num_bytes :]
        if rest:
            raise InvalidRequest(f"{len(rest)} bytes behind the parameters of version {message.version}")
        self._known[message.version] = ParameterVersion(deltas=deltas, shards=shards, num_virtual=manifest.num_virtual)
        self._last = message.version
        self._changed.set()

    def _shards(self, message: TrainParameters, data: memoryview) -> memoryview:
        """What was sent, or what becomes of the base by it."""
        base = self.get(message.base).shards if message.base >= 0 else None
        self._check_room(message.version, len(data) if base is None else len(base))
        return data if base is None else memoryview(apply_difference(base, data))

    def _check_room(self, version: int, num_bytes: int) -> None:
        used = self.num_bytes
        if used + num_bytes > self._max_bytes:
            raise InvalidRequest(
                f"parameters of version {version}: {num_bytes} bytes and {used} of other versions,"
                f" limit {self._max_bytes}"
            )

    def forget(self, version: int) -> None:
        """Nobody uses it any more."""
        self._known.pop(version, None)
