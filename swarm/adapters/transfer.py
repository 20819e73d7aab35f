"""Adapters on the wire: what was asked for is cut into parts, and put together again.

    AdapterRequest ─► send_parts: manifest, then shards ─AdapterPart, bytes─► Assembly.take ─► (block, bytes)

The sender waits where the receiver does not keep up. What came whole stays; after a broken stream only the rest is
asked for again. Whether the bytes are those of the name is not known here: that is `swarm.adapters.format`'s business.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from swarm.adapters.format import MAX_MANIFEST_BYTES
from swarm.errors import PeerMisbehaved
from swarm.protocol import AdapterPart, AdapterRequest, Message

PART_BYTES = 256 << 10
"""Most bytes in one part: steps of sessions on the same connection come in between."""
SEND_TIMEOUT_S = 30.0
"""How long a receiver may make no room."""
MIN_BYTES_PER_S = 64 << 10
"""A server that sends more slowly is left for another."""
GRACE_S = 10.0
"""After so long it is looked how fast one sends."""

Buffer = bytes | bytearray | memoryview


class PartStream(Protocol):
    """What is sent on: `swarm.transport.Stream`."""

    async def send(self, message: Message, body: Buffer = b"", *, timeout_s: float | None = None) -> None:
        """Send, waiting for room."""


async def send_parts(
    stream: PartStream,
    request: AdapterRequest,
    manifest: Buffer,
    shards: Mapping[int, Buffer],
    *,
    on_sent: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Send what is asked for, as far as it is here.

    Args:
        stream: to the peer that asks.
        request: what it wants.
        manifest: of the adapter.
        shards: by block.
        on_sent: called with the bytes of each part once it is on its way.

    Raises:
        SwarmError: the peer is gone, or makes no room.
    """
    wanted = [None] if request.with_manifest else []
    for block in (*wanted, *(block for block in request.blocks if block in shards)):
        data = memoryview(manifest if block is None else shards[block])
        for offset in range(0, len(data), PART_BYTES):
            piece = data[offset : offset + PART_BYTES]
            part = AdapterPart(block=block, offset=offset, num_bytes=len(data))
            await stream.send(part, piece, timeout_s=SEND_TIMEOUT_S)
            on_sent(len(piece))


def is_too_slow(num_bytes: int, elapsed_s: float, *, min_bytes_per_s: int = MIN_BYTES_PER_S) -> bool:
    """Whether one who has sent so much in so long should be given up."""
    return elapsed_s > GRACE_S and num_bytes < min_bytes_per_s * elapsed_s


class Assembly:
    """The receiving end of one stream. Memory is taken for what is expected, and nothing else.

    Args:
        with_manifest: whether the manifest is expected.
    """

    def __init__(self, *, with_manifest: bool):
        self.num_bytes = 0
        """That have come."""
        self._sizes: dict[int | None, int] = {None: MAX_MANIFEST_BYTES} if with_manifest else {}
        self._part: AdapterPart | None = None
        self._data = bytearray()
        self._filled = 0

    @property
    def is_done(self) -> bool:
        """Whether all that is expected has come."""
        return not self._sizes

    def expect(self, block: int, num_bytes: int) -> None:
        """This block's shard will come, of exactly this size."""
        self._sizes[block] = num_bytes

    def take(self, part: AdapterPart, body: Buffer) -> tuple[int | None, bytearray] | None:
        """Add the next part; returns (block, bytes) when it was the last one of a shard, or of the manifest (None).

        Raises:
            PeerMisbehaved: not what is expected, or not in order.
        """
        if self._part is None:
            self._begin(part)
        first = self._part
        assert first is not None
        if (part.block, part.num_bytes) != (first.block, first.num_bytes) or part.offset != self._filled:
            raise PeerMisbehaved(
                f"part {part.block} of an adapter at {part.offset}/{part.num_bytes}, expected {first.block} at"
                f" {self._filled}/{first.num_bytes}"
            )
        end = self._filled + len(body)
        if not len(body) or end > first.num_bytes:
            raise PeerMisbehaved(f"{len(body)} bytes at {part.offset} of an adapter's part of {first.num_bytes}")
        self._data[self._filled : end] = body
        self._filled, self.num_bytes = end, self.num_bytes + len(body)
        if end < first.num_bytes:
            return None
        done, self._part, self._data = self._data, None, bytearray()
        del self._sizes[part.block]
        return part.block, done

    def _begin(self, part: AdapterPart) -> None:
        size = self._sizes.get(part.block)
        is_fine = size is not None and (part.num_bytes == size or (part.block is None and 0 < part.num_bytes <= size))
        if not is_fine or part.offset:
            raise PeerMisbehaved(f"part {part.block} of {part.num_bytes} bytes of an adapter, expected {size}")
        self._part, self._filled = part, 0
        self._data = bytearray(part.num_bytes)
