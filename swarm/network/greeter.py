"""Protocols that speak a greeting, then hand the connection over to whoever it was opened for.

    IncomingGreeting ──Hello──► host.on_hello ──► protocol, Welcome   or   error, Refused
    OutgoingGreeting ──Hello──► `answer`: Welcome or Refused ──switch──► protocol

They know TLS transports and the bytes of greetings, not who may come in.
"""

import asyncio
import logging
from typing import Protocol

from swarm.errors import PeerDisconnected, PeerMisbehaved, SwarmError
from swarm.network.greeting import (
    MAX_GREETING_BYTES,
    FrameReader,
    Greeting,
    Hello,
    Refused,
    Welcome,
    decode_greeting,
    encode_greeting,
)
from swarm.private.certificates import Proven

log = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 5.0


class Host(Protocol):
    """Who decides about incoming connections."""

    def on_hello(self, process: bytes, hello: Hello) -> tuple[Proven, asyncio.Protocol, Welcome]:
        """Judge a greeting.

        Args:
            process: the certificate that TLS has seen, in DER.

        Raises:
            SwarmError: why the connection is refused.
        """

    def on_connected(self, transport: asyncio.Transport, proven: Proven) -> None:
        """A connection has been taken."""

    def refusal(self, error: SwarmError, process: bytes, hello: Hello | None) -> Refused:
        """How to tell a peer that it was refused."""

    def on_greeting_over(self, greeting: "IncomingGreeting") -> None:
        """A greeting has come to an end, in whatever way."""


class _Greeting(asyncio.Protocol):
    """A TLS connection before it is handed over."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._reader = FrameReader(MAX_GREETING_BYTES)
        self._next: asyncio.Protocol | None = None
        self.is_lost = False

    @property
    def process(self) -> bytes:
        """The certificate of the other side, in DER."""
        certificate = self.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if certificate is None:
            raise PeerMisbehaved("a TLS connection without a certificate")
        return bytes(certificate)

    @property
    def remote_host(self) -> str:
        """The address from where the connection comes."""
        return str(self._peer_name[0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._peer_name = transport.get_extra_info("peername") or ("",)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        if self.is_over:
            return  # what comes now is for whoever takes over
        try:
            if (piece := self._reader.next()) is not None:
                self.take(decode_greeting(piece))
        except SwarmError as error:
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.fail(PeerDisconnected("closed without a word"))

    @property
    def is_over(self) -> bool:
        """Whether the greeting that was waited for is there, or will not be taken any more."""
        raise NotImplementedError

    def take(self, greeting: Greeting) -> None:
        """A greeting has come."""
        raise NotImplementedError

    def fail(self, error: SwarmError) -> None:
        """It makes no sense, or will not come."""
        raise NotImplementedError

    def switch(self, protocol: asyncio.Protocol) -> None:
        """Hand the connection, and whatever has come already, to another protocol."""
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if self._reader.buffer:
            rest = bytes(self._reader.buffer)
            self._reader.buffer.clear()
            protocol.data_received(rest)
        if self.is_lost:
            protocol.connection_lost(None)


class IncomingGreeting(_Greeting):
    """The listener's side.

    Args:
        host: decides.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self._host = host
        self._hello: Hello | None = None
        self._has_ended = False
        self._timer = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, lambda: self.fail(PeerDisconnected(f"no greeting within {GREETING_TIMEOUT_S:g} s"))
        )

    @property
    def is_over(self) -> bool:
        return self._has_ended

    def data_received(self, data: bytes) -> None:
        if not self.is_over:  # who was refused may talk on for as long as it takes to close
            super().data_received(data)

    def take(self, greeting: Greeting) -> None:
        if not isinstance(greeting, Hello):
            raise PeerMisbehaved(f"{type(greeting).__name__} in place of Hello")
        self._hello = greeting
        proven, protocol, welcome = self._host.on_hello(self.process, greeting)
        self._end()
        self.transport.write(encode_greeting(welcome))
        self._host.on_connected(self.transport, proven)
        self.switch(protocol)

    def fail(self, error: SwarmError) -> None:
        if self.is_over:
            return
        self._end()
        log.info("refused a connection: %s", error)
        if not self.is_lost:
            self.transport.write(encode_greeting(self._host.refusal(error, self.process, self._hello)))
            self.transport.close()
            asyncio.get_running_loop().call_later(1.0, self.transport.abort)  # one that does not read must go, too

    def _end(self) -> None:
        self._has_ended = True
        self._timer.cancel()
        self._host.on_greeting_over(self)


class OutgoingGreeting(_Greeting):
    """The dialler's side; it waits with its Hello until `send`."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: asyncio.Future[Welcome | Refused] = asyncio.get_running_loop().create_future()

    @property
    def is_over(self) -> bool:
        return self.answer.done()

    def send(self, hello: Hello) -> None:
        """Say Hello."""
        self.transport.write(encode_greeting(hello))

    def take(self, greeting: Greeting) -> None:
        if isinstance(greeting, Hello):
            raise PeerMisbehaved("Hello in place of an answer")
        if not self.answer.done():
            self.answer.set_result(greeting)

    def fail(self, error: SwarmError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # retrieved, in case that nobody waits
