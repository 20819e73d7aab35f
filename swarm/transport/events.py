"""What `Mux.receive` reports: one small value per thing that happened on a connection."""

import msgspec


class Greeted(msgspec.Struct, frozen=True):
    """The peer's HELLO came, with this ticket."""

    ticket: bytes


class Opened(msgspec.Struct, frozen=True):
    """The peer opened a stream to one of our services."""

    stream_id: int
    service: str


class Received(msgspec.Struct, frozen=True):
    """A whole message; pass `cost` to `consume` once the application has taken it."""

    stream_id: int
    meta: bytes
    body: bytearray
    cost: int


class Finished(msgspec.Struct, frozen=True):
    """The peer sends no more on this stream."""

    stream_id: int


class Failed(msgspec.Struct, frozen=True):
    """The peer gave up the stream (0: the connection); `error` is encoded."""

    stream_id: int
    error: bytes


class Credited(msgspec.Struct, frozen=True):
    """The stream may send again."""

    stream_id: int


class Refused(msgspec.Struct, frozen=True):
    """We gave up the stream, because the peer sent more than we can hold; all that waited on it is dropped."""

    stream_id: int
    error: bytes


Event = Greeted | Opened | Received | Finished | Failed | Credited | Refused
