"""The first words on a connection between members of a private swarm, once TLS stands: who is there, and what for.

    dialler ──Hello(service, invitation, address card)──► listener ──Welcome or Refused──► dialler

TLS has checked both chains of certificates, but tells a program the last of them only; so the invitation comes again in
the greeting. It is checked before anything else is done. Bytes: a length (4, big-endian), then msgpack. Pure.
"""

from typing import Annotated

import msgspec

from swarm.errors import PeerMisbehaved
from swarm.network.addresses import Card
from swarm.private.certificates import MAX_CERTIFICATE_BYTES

VERSION = 1
LENGTH_BYTES = 4
MAX_GREETING_BYTES = 4096
MAX_SERVICE_BYTES = 64
CALLS = ""
"""The service of a connection that carries unary calls; others carry one raw stream."""

Invitation = Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """What the dialler says first."""

    version: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    service: Annotated[str, msgspec.Meta(max_length=MAX_SERVICE_BYTES)]
    invitation: Invitation
    card: Card | None


class Welcome(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """The listener takes the connection."""

    invitation: Invitation
    card: Card | None


class Refused(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """The listener does not: why, and the statement that proves it where the invitation was revoked."""

    error: Annotated[bytes, msgspec.Meta(max_length=2048)]
    statement: Annotated[bytes, msgspec.Meta(max_length=1024)] = b""


Greeting = Hello | Welcome | Refused
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)


def encode_greeting(greeting: Greeting) -> bytes:
    """A greeting behind its length."""
    data = _encoder.encode(greeting)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


class FrameReader:
    """Cuts a byte stream into pieces behind their lengths. Pure.

    Args:
        max_bytes: longest piece.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self.buffer += data

    def next(self) -> bytes | None:
        """Take the next whole piece, or None while it is incomplete.

        Raises:
            PeerMisbehaved: when it is longer than `max_bytes`.
        """
        if len(self.buffer) < LENGTH_BYTES:
            return None
        size = int.from_bytes(self.buffer[:LENGTH_BYTES], "big")
        if size > self.max_bytes:
            raise PeerMisbehaved(f"{size} bytes in one piece, limit {self.max_bytes}")
        end = LENGTH_BYTES + size
        if len(self.buffer) < end:
            return None
        piece = bytes(self.buffer[LENGTH_BYTES:end])
        del self.buffer[:end]
        return piece


def decode_greeting(data: bytes) -> Greeting:
    """Read a greeting.

    Raises:
        PeerMisbehaved: malformed.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerMisbehaved(f"malformed greeting: {error}") from error
