"""Message streams between peers: one interface, two carriers (direct TLS 1.3, or a p2p stream), the same frames on both."""

from swarm.transport.limits import Limits
from swarm.transport.stream import EndOfStream, Stream
from swarm.transport.transport import Transport

__all__ = ["EndOfStream", "Limits", "Stream", "Transport"]
