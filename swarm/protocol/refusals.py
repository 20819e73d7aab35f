"""Errors in the form in which they cross the wire."""

from typing import Annotated

import msgspec

from swarm.errors import (
    AccessDenied,
    AdapterError,
    CheckpointMismatch,
    ConfigError,
    InvalidRequest,
    InvitationExpired,
    InvitationRevoked,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolMismatch,
    RequestError,
    RouteNotFound,
    SwarmError,
    SwarmIsPrivate,
    UnknownModel,
    UnsupportedModel,
)
from swarm.protocol.fields import Text


class WireError(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A refusal in the form in which it crosses the wire."""

    code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    text: Text
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0


# A peer's own trouble reaches the caller in the PeerError branch; the caller's faults keep their class.
_REQUEST_CODES: dict[int, type[RequestError]] = {
    1: RequestError,
    2: InvalidRequest,
    3: UnknownModel,
    4: UnsupportedModel,
    5: CheckpointMismatch,
    6: ProtocolMismatch,
    7: ConfigError,
    8: AdapterError,
    16: AccessDenied,
    17: SwarmIsPrivate,
    18: InvitationExpired,
    19: InvitationRevoked,
}
_PEER_CODES: dict[int, type[PeerError]] = {
    32: PeerError,
    33: PeerUnreachable,
    34: PeerDisconnected,
    35: PeerTimeout,
    37: PeerMisbehaved,
}
_BUSY_CODE = 36
_CODES: dict[type[SwarmError], int] = {
    **{cls: code for code, cls in _REQUEST_CODES.items()},
    **{cls: code for code, cls in _PEER_CODES.items()},
    PeerBusy: _BUSY_CODE,
    RouteNotFound: 32,
}
_error_encoder = msgspec.msgpack.Encoder()
_error_decoder = msgspec.msgpack.Decoder(WireError)


def error_to_wire(error: SwarmError) -> bytes:
    """A refusal as msgpack. Unknown kinds travel as a plain PeerError, so no detail of this process leaks."""
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), 32)
    retry = error.retry_after_s if isinstance(error, PeerBusy) else 0.0
    return _error_encoder.encode(WireError(code, str(error)[:1024], min(max(retry, 0.0), 86400.0)))


def error_from_wire(data: bytes | bytearray | memoryview, *, peer_id: str | None) -> SwarmError:
    """The error that a peer refused us with; a malformed one becomes PeerMisbehaved, never an exception here."""
    try:
        wire = _error_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return PeerMisbehaved(f"malformed error message: {error}", peer_id=peer_id)
    text = printable(wire.text)
    if wire.code in _REQUEST_CODES:
        return _REQUEST_CODES[wire.code](text)
    if wire.code == _BUSY_CODE:
        return PeerBusy(text, peer_id=peer_id, retry_after_s=wire.retry_after_s)
    return _PEER_CODES.get(wire.code, PeerError)(text, peer_id=peer_id)


def printable(text: str) -> str:
    """A peer's text without what could move a cursor, break a line or run a terminal's commands."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
