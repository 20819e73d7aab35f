"""Varint-delimited protobuf, as the libp2p daemon speaks it: a pure splitter, and an asyncio connection on top of it.

bytes --feed--> DelimitedReader --next--> messages --> Delimited.received      (the head of a raw stream is the same)
"""

import asyncio
import logging
from typing import Any

from swarm.network.hive import P2PDaemonError

log = logging.getLogger(__name__)


class DelimitedReader:
    """Splits a byte stream into varint-delimited messages. Pure."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self.buffer += data

    def next(self) -> bytes | None:
        """Take the next whole message, or None while it is incomplete.

        Raises:
            P2PDaemonError: when the length is malformed or above `max_bytes`.
        """
        size = shift = 0
        for index, byte in enumerate(self.buffer[:10]):
            size |= (byte & 0x7F) << shift
            if size > self.max_bytes:
                raise P2PDaemonError(f"message of {size} bytes from the daemon, limit {self.max_bytes}")
            if byte < 0x80:
                end = index + 1 + size
                if len(self.buffer) < end:
                    return None
                message = bytes(self.buffer[index + 1 : end])
                del self.buffer[:end]
                return message
            shift += 7
        if len(self.buffer) >= 10:
            raise P2PDaemonError("malformed length from the daemon")
        return None


class Delimited(asyncio.Protocol):
    """A connection to or from the daemon that carries varint-delimited protobuf, at least at its start."""

    transport: asyncio.Transport

    def __init__(self, max_bytes: int) -> None:
        self.reader = DelimitedReader(max_bytes)
        self.is_lost = False
        self.is_headed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        try:
            while not self.is_headed and (message := self.reader.next()) is not None:
                self.is_headed = not self.received(message)
        except Exception as error:  # noqa: BLE001 - one bad message must cost this connection, not the loop
            log.warning("dropping a connection to the daemon: %r", error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.lost(exc)

    def send(self, message: Any) -> None:
        """Write one protobuf message."""
        self.transport.write(varint(message.ByteSize()) + message.SerializeToString())

    def received(self, message: bytes) -> bool:
        """Handle one message; False if it was the last one, and what follows belongs to `switch`."""
        raise NotImplementedError

    def lost(self, exc: Exception | None) -> None:
        """The connection is gone."""

    def switch(self, protocol: asyncio.Protocol) -> None:
        """Hand the connection, and whatever has come already, to another protocol."""
        self.is_headed = True
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if self.reader.buffer:
            protocol.data_received(bytes(self.reader.buffer))
            self.reader.buffer.clear()
        if self.is_lost:
            protocol.connection_lost(None)


def varint(value: int) -> bytes:
    """An unsigned LEB128 number."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
