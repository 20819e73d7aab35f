"""Message streams between peers: the same frames on two carriers, direct TLS 1.3 and p2p streams."""

from swarm.transport.limits import Limits
from swarm.transport.stream import EndOfStream, Stream
from swarm.transport.transport import Transport

__all__ = ["EndOfStream", "Limits", "Stream", "Transport"]
