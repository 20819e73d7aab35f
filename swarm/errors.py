"""Every error that swarm raises, in one tree. The branch answers "whose fault, and what next".

SwarmError
├── RequestError        ours: the same request fails everywhere, so never retry
│   ├── InvalidRequest      a message or argument with a wrong shape, dtype, size or position
│   ├── UnknownModel        no such model name, directory or hub id
│   ├── UnsupportedModel    the block runner would run this model wrongly
│   ├── CheckpointMismatch  same name, different content
│   ├── ProtocolMismatch    the two sides speak different protocol versions
│   ├── AdapterError        an adapter is malformed, not made for this model, or nobody has it
│   ├── ConfigError         a setting of this process can't work (port in use, bad identity file, ...)
│   └── AccessDenied        a private swarm does not let us do that
│       ├── SwarmIsPrivate      we have no invitation
│       ├── InvitationExpired   ours was good until some day
│       └── InvitationRevoked   ours was taken back
├── PeerError           theirs: try another peer; `.peer_id` says whom to blame
│   ├── PeerUnreachable     no connection could be made
│   │   └── RelaysBusy          its relays have no room for now, which says nothing of the peer itself
│   ├── PeerDisconnected    the connection broke
│   ├── PeerTimeout         nothing came before the deadline
│   ├── PeerBusy            refused for now; `.retry_after_s` says when to come back
│   └── PeerMisbehaved      malformed, oversized or out-of-order data
├── RouteNotFound       nobody serves some blocks: wait; `.missing` says which
└── RoundFailed         too few clients came to a round of federated training: wait, or go on alone
"""

from collections.abc import Sequence


class SwarmError(Exception):
    """Base of all errors that swarm raises on purpose."""


class RequestError(SwarmError):
    """Our own fault: the request is wrong and must not be retried as it is."""


class InvalidRequest(RequestError):
    """An argument or a message has a wrong shape, dtype, size, range or position."""


class UnknownModel(RequestError):
    """No embedded model, directory or hub repository has this name."""


class UnsupportedModel(RequestError):
    """The generic block runner would run this model wrongly; the message names the reason."""


class CheckpointMismatch(RequestError):
    """Two peers use the same model name for checkpoints with different content."""


class ProtocolMismatch(RequestError):
    """The peer speaks another version of the protocol."""


class AdapterError(RequestError):
    """An adapter is malformed, not made for this model, or nobody has it."""


class ConfigError(RequestError):
    """A setting of this process cannot work."""


class AccessDenied(RequestError):
    """A private swarm does not let its members do this, or does not let us in at all."""


class SwarmIsPrivate(AccessDenied):
    """The swarm takes invited peers only, and we have shown no invitation."""


class InvitationExpired(AccessDenied):
    """The invitation was good for a time that is over."""


class InvitationRevoked(AccessDenied):
    """The authority of the swarm, or an admin, has taken the invitation back."""


class PeerError(SwarmError):
    """A peer's fault: another peer may do better.

    Args:
        message: what went wrong.
        peer_id: base58 identity of the peer, or None where the peer is not known yet.
    """

    def __init__(self, message: str, *, peer_id: str | None = None):
        super().__init__(message)
        self.peer_id = peer_id


class PeerUnreachable(PeerError):
    """No connection to the peer could be made."""


class RelaysBusy(PeerUnreachable):
    """The relays of a peer refused for now. `retry_after_s` is when the first of them says that it has room."""

    def __init__(self, message: str, *, peer_id: str | None = None, retry_after_s: float = 1.0):
        super().__init__(message, peer_id=peer_id)
        self.retry_after_s = retry_after_s


class PeerDisconnected(PeerError):
    """The connection to the peer broke."""


class PeerTimeout(PeerError):
    """The peer did not answer before the deadline."""


class PeerBusy(PeerError):
    """The peer refused for now. `retry_after_s` is its own estimate of when it has room."""

    def __init__(self, message: str, *, peer_id: str | None = None, retry_after_s: float = 1.0):
        super().__init__(message, peer_id=peer_id)
        self.retry_after_s = retry_after_s


class PeerMisbehaved(PeerError):
    """The peer sent malformed, oversized or out-of-order data."""


class RouteNotFound(SwarmError):
    """No chain of online servers covers all the blocks.

    Args:
        message: what was looked for.
        missing: indices of the blocks that no server holds.
    """

    def __init__(self, message: str, *, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = tuple(missing)


class RoundFailed(SwarmError):
    """Too few clients have come to a round of federated training before its deadline; everything is as before."""
