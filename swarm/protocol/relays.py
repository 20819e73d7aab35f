"""Ways to peers that nobody can connect to; and whether somebody can."""

from typing import Annotated

import msgspec

from swarm.protocol.fields import Message, PeerId, Port, Signature


class Reserve(Message, frozen=True, tag=96):
    """Carry connections to us while this stream is open. First on a `relay` stream; answered by `Reserved`."""


class Reserved(Message, frozen=True, tag=97):
    """The relay will. It opens a `circuit` stream to us for each connection."""

    max_circuits: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    """At once."""


class OpenCircuit(Message, frozen=True, tag=98):
    """Carry a connection to this peer. First on a `relay` stream; `CircuitBytes` of both sides follow."""

    peer_id: PeerId
    is_call_back: bool
    """The peer is rather to connect to us, who can be reached: the stream ends when it has."""


class CircuitOpened(Message, frozen=True, tag=99):
    """First on a `circuit` stream: this peer asked the relay for a connection to us. Answered by `CircuitGreeting`."""

    peer_id: PeerId
    is_call_back: bool


class CircuitGreeting(Message, frozen=True, tag=100):
    """Who answers at the end of a circuit, which no relay can feign."""

    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """SHA-256 of the certificate that it will show."""
    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """To be signed by who asked, as its ticket."""
    signature: Signature
    """By the peer that was asked for, of `swarm.transport.circuits.statement`."""


class CircuitBytes(Message, frozen=True, tag=101):
    """A piece of the TLS connection between the two ends; the body."""


class DialBack(Message, frozen=True, tag=102):
    """Try to connect to us, at the address that we come from. Answered by `DialedBack`."""

    port: Port
    """Of direct connections."""
    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """Of the certificate shown there."""
    control_port: Port
    """Of libp2p."""


class DialedBack(Message, frozen=True, tag=103):
    """Whether that worked."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    """The address that we come from."""
    is_reachable: bool


class AskOffer(Message, frozen=True, tag=104):
    """Ask for a direct way, over a connection through a relay: we may be neighbours. Answered by `DirectOffer`."""


class DirectOffer(Message, frozen=True, tag=105):
    """Where and how to connect directly, as in the offers of `/swarm/offer`; there is no way without hosts."""

    hosts: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=8)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    fingerprint: Annotated[bytes, msgspec.Meta(max_length=32)]
    ticket: Annotated[bytes, msgspec.Meta(max_length=32)]
