"""A session that goes to another server, with all that it has, while its client goes on."""

from typing import Annotated

import msgspec

from swarm.protocol.fields import (
    Block,
    DType,
    Encoding,
    Length,
    Message,
    NumBytes,
    PeerName,
    PushKey,
    Rows,
    StepId,
    Text,
)


class MoveAway(Message, frozen=True, tag=80):
    """From a server that is about to leave: have the session handed to another server within so long.

    The client answers with a `HandOver`, once it has opened a session for the same blocks elsewhere.
    """

    within_s: Annotated[float, msgspec.Meta(ge=0, le=86400)]


class HandOver(Message, frozen=True, tag=81):
    """Give this session, as it stands, to the empty one that was opened with `push_key` at that peer.

    Answered by `HandedOver` with the same nonce. `peer_id` "" says that there is nobody to give it to.
    """

    nonce: StepId
    peer_id: PeerName
    push_key: PushKey


class HandedOver(Message, frozen=True, tag=82):
    """The other server has the session, and this one does nothing more for it; or it hasn't, and this one goes on.

    What this server had to send to the client was sent before.
    """

    nonce: StepId
    is_done: bool
    text: Text
    """Why not."""


class SentState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a session sends on: the latest step whose outputs began, and which outputs are kept for the receiver."""

    step_id: StepId
    order: Rows | None
    base: Rows
    outputs_from: Rows
    starts: Rows
    """Per row the position of the first output in the body ..."""
    ends: Rows
    """... and the one after the last."""
    dtype: DType
    encoding: Encoding


class SessionState(Message, frozen=True, tag=83):
    """A session on its way to another server: on a `state` stream, behind PushHello and PushAccepted.

    Its bytes follow in `StatePart`s: for each row the numbers of its pages (4 bytes each, little-endian); the cache, as
    the blocks lay it out; the outputs of `sent`, row after row. Answered by `StateTaken`.
    """

    start: Block
    end: Block
    dtype: DType
    """Of keys and values."""
    lengths: Rows
    """Tokens of each row in the cache."""
    num_pages: Length
    """Different pages of all rows."""
    cache_bytes: NumBytes
    step_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    """The latest step that came in."""
    received: Rows
    """Tokens of each row that came in, after this step's order and rollback."""
    outputs_from: Rows
    order: Rows | None
    """What of `lengths` is to be done before the next tokens, where a step has begun without any: `order` and ..."""
    base: Rows | None
    """... rollback; None where there is nothing to be done."""
    sent: SentState | None
    """None before the first output."""


class StatePart(Message, frozen=True, tag=84):
    """Bytes of the state from `offset` on; the body. Parts come in order."""

    offset: NumBytes


class StateTaken(Message, frozen=True, tag=85):
    """The state has come, whole and sound: told to the server that sent it, and to the session's client."""

    step_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    received: Rows
