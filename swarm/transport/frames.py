"""Frames: the units in which two peers exchange bytes, on every carrier. Pure: bytes in, frames out.

    0      1      2        4           8            12           16
    +------+------+--------+-----------+------------+------------+-- meta --+-- body --+
    | 0x53 | kind | flags  | stream id | meta bytes | body bytes |          |          |      all integers big-endian
    +------+------+--------+-----------+------------+------------+----------+----------+

Each kind has limits on its parts, checked on the header alone, so nothing is allocated on a peer's word. The header
and the first seven bytes of HELLO's meta are the same in all versions of the protocol; the rest may change with the
version.
"""

import struct
from enum import IntEnum

import msgspec

from swarm.errors import PeerMisbehaved
from swarm.protocol import MAX_META_BYTES

HEADER_BYTES = 16
MAGIC = 0x53
FLAG_MORE = 1
"""On DATA: the message continues in the next DATA frame of this stream."""
MAX_FRAGMENT_BYTES = 1 << 18
"""Largest body of one frame; larger messages are cut, so that others' frames pass between the pieces."""
MAX_SERVICE_BYTES = 64
MAX_TICKET_BYTES = 64
MAX_ERROR_BYTES = 8192
HELLO_PREFIX = b"swarm"

_header = struct.Struct("!BBHIII")


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 0
    """First frame of each side. meta: "swarm", version (2 bytes), ticket (0 to 64 bytes)."""
    OPEN = 1
    """Opens a stream. meta: name of the service."""
    DATA = 2
    """A message, or a piece of one. meta: the encoded message (first piece only); body: tensors."""
    FIN = 3
    """The sender sends no more on this stream."""
    ERR = 4
    """The stream failed (stream 0: the connection). meta: the encoded error."""
    CREDIT = 5
    """The receiver has consumed so many units. meta: 4 bytes."""
    PING = 6
    """Asks for a PONG with the same 8 bytes of meta."""
    PONG = 7
    """Answers a PING."""


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One frame. `meta` and `body` are copies: they don't keep the receive buffer alive."""

    kind: int
    flags: int
    stream_id: int
    meta: bytes
    body: bytearray


class _Rule(msgspec.Struct, frozen=True):
    """What the header of a kind may say: stream 0 or another, bytes of meta, bytes of body, flags."""

    has_stream: bool | None
    min_meta: int
    max_meta: int
    max_body: int = 0
    flags: int = 0


_RULES = (
    _Rule(has_stream=False, min_meta=len(HELLO_PREFIX) + 2, max_meta=len(HELLO_PREFIX) + 2 + MAX_TICKET_BYTES),
    _Rule(has_stream=True, min_meta=1, max_meta=MAX_SERVICE_BYTES),
    _Rule(has_stream=True, min_meta=0, max_meta=MAX_META_BYTES, max_body=MAX_FRAGMENT_BYTES, flags=FLAG_MORE),
    _Rule(has_stream=True, min_meta=0, max_meta=0),
    _Rule(has_stream=None, min_meta=0, max_meta=MAX_ERROR_BYTES),
    _Rule(has_stream=True, min_meta=4, max_meta=4),
    _Rule(has_stream=False, min_meta=8, max_meta=8),
    _Rule(has_stream=False, min_meta=8, max_meta=8),
)


def encode_frame(kind: Kind, stream_id: int, meta: bytes = b"", *, flags: int = 0, num_body_bytes: int = 0) -> bytes:
    """Header and meta of a frame; the caller sends the body behind it."""
    return _header.pack(MAGIC, kind, flags, stream_id, len(meta), num_body_bytes) + meta


class FrameDecoder:
    """Cuts a byte stream into frames, however the stream is split.

    It holds at most one incomplete frame: header, 256 KiB of meta, 256 KiB of body.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = HEADER_BYTES

    @property
    def num_waiting(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray) -> list[Frame]:
        """The frames that `data` completes, in order.

        Raises:
            PeerMisbehaved: at the first header that breaks a rule; the decoder is of no use afterwards.
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data, self._buffer = self._buffer, bytearray()
        frames: list[Frame] = []
        position, end = 0, len(data)
        self._needed = HEADER_BYTES
        with memoryview(data) as view:
            while end - position >= HEADER_BYTES:
                magic, kind, flags, stream_id, num_meta, num_body = _header.unpack_from(data, position)
                _check(magic, kind, flags, stream_id, num_meta, num_body)
                body = position + HEADER_BYTES + num_meta
                stop = body + num_body
                if stop > end:
                    self._needed = stop - position
                    break
                meta = bytes(view[position + HEADER_BYTES : body])
                frames.append(Frame(kind, flags, stream_id, meta, bytearray(view[body:stop])))
                position = stop
            if position < end:
                self._buffer = bytearray(view[position:])
        return frames


def _check(magic: int, kind: int, flags: int, stream_id: int, num_meta: int, num_body: int) -> None:
    if magic != MAGIC or kind >= len(_RULES):
        raise PeerMisbehaved(f"bytes 0x{magic:02x}{kind:02x} do not start a frame")
    rule = _RULES[kind]
    if not rule.min_meta <= num_meta <= rule.max_meta:
        raise PeerMisbehaved(
            f"{Kind(kind).name} with {num_meta} bytes of meta, allowed {rule.min_meta}..{rule.max_meta}"
        )
    if num_body > rule.max_body:
        raise PeerMisbehaved(f"{Kind(kind).name} with a body of {num_body} bytes, limit {rule.max_body}")
    if flags & ~rule.flags:
        raise PeerMisbehaved(f"{Kind(kind).name} with unknown flags 0x{flags:04x}")
    if rule.has_stream is not None and rule.has_stream != bool(stream_id):
        raise PeerMisbehaved(f"{Kind(kind).name} on stream {stream_id}")
