"""What a peer may take from us before it is refused, and how long we wait for it."""

from dataclasses import dataclass

from swarm.protocol import CIRCUIT_SERVICE, RELAY_SERVICE
from swarm.rates import Rate

PING_RATE = Rate(burst=64, per_s=8)
OPEN_RATE = Rate(burst=512, per_s=64)
"""Twice the rate of new sessions, each of which takes a stream of its client and one of a server."""
NARROW_SERVICES = frozenset({RELAY_SERVICE, CIRCUIT_SERVICE})
OFFER_RATE = Rate(burst=16, per_s=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a transport.

    Attributes:
        max_streams_per_peer: streams that one peer may have open on us.
        max_streams: streams that all peers together may have open on us.
        max_connections_per_peer: connections of one peer.
        max_connections: connections of all peers, both carriers; beyond, one that carries nothing makes room.
        max_pending_connections: connections that have not said HELLO yet; beyond, the oldest makes room.
        max_message_bytes: meta and body of one message.
        window_bytes: a sender waits when so much of what it sent on a stream has not been consumed.
        narrow_window_bytes: the same on streams of `NARROW_SERVICES`, whose bytes wait at a relay.
        max_buffered_bytes: received and not yet consumed on one connection; a stream that goes beyond is refused.
        max_total_buffered_bytes: the same over all connections.
        ping_period_s: a PING is sent after so much silence.
        silence_timeout_s: a peer that sends nothing for so long is taken for dead.
        hello_timeout_s: TLS handshake and HELLO must be complete after so long.
        frame_timeout_s: a frame that has begun must be complete after so long.
        idle_timeout_s: a connection without streams is closed after so long.
        max_unsent_bytes: a peer that leaves more of our answers unread is given up.
        ping_rate: PINGs of one connection; a peer that sends more is dropped.
        open_rate: streams that one account (a peer, or a member of a private swarm) opens; more are refused ...
        max_refused_opens: ... and a connection on which so many were refused in a row is dropped.
        offer_rate: offers of direct connections that one account asks for.
    """

    max_streams_per_peer: int = 256
    max_streams: int = 4096
    max_connections_per_peer: int = 4
    max_connections: int = 1024
    max_pending_connections: int = 64
    max_message_bytes: int = 64 << 20
    window_bytes: int = 4 << 20
    narrow_window_bytes: int = 256 << 10
    max_buffered_bytes: int = 192 << 20
    max_total_buffered_bytes: int = 1 << 30
    ping_period_s: float = 1.0
    silence_timeout_s: float = 4.0
    hello_timeout_s: float = 5.0
    frame_timeout_s: float = 60.0
    idle_timeout_s: float = 120.0
    max_unsent_bytes: int = 8 << 20
    ping_rate: Rate = PING_RATE
    open_rate: Rate = OPEN_RATE
    max_refused_opens: int = 256
    offer_rate: Rate = OFFER_RATE

    def window_of(self, service: str) -> int:
        """The window of streams to a service."""
        return min(self.narrow_window_bytes, self.window_bytes) if service in NARROW_SERVICES else self.window_bytes


@dataclass(slots=True)
class Traffic:
    """Bytes of all connections of a transport since its start, frames and messages, before encryption."""

    received: int = 0
    sent: int = 0


@dataclass(slots=True)
class Budget:
    """Bytes received and not yet consumed, counted over all connections of a transport."""

    limit: int
    used: int = 0
