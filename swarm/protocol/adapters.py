"""An adapter on its way between two peers, part by part, named by its content."""

from typing import Annotated

import msgspec

from swarm.protocol.fields import Block, Digest, Message, NumBytes
from swarm.types import MAX_BLOCKS


class AdapterRequest(Message, frozen=True, tag=15):
    """Send me of this adapter its manifest and what it has for these blocks, in `AdapterPart`s.

    From a server to a client over the session stream, which answers with an `AdapterOffer` on a stream of its own; or
    first message of a stream to a peer's `adapter` service, which sends what it has and ends the stream.
    """

    digest: Digest
    with_manifest: bool
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(max_length=MAX_BLOCKS)]


class AdapterOffer(Message, frozen=True, tag=16):
    """First message of a stream to the `adapter` service: the parts that an `AdapterRequest` asked for follow.

    The server ends the stream when it has checked them all, or fails it with what is wrong with them.
    """

    digest: Digest


class AdapterPart(Message, frozen=True, tag=17):
    """Bytes of the manifest (`block` None) or of one block's shard, from `offset` on; the body. Parts come in order."""

    block: Block | None
    offset: NumBytes
    num_bytes: NumBytes
    """Of the whole manifest or shard."""


class AdapterLoading(Message, frozen=True, tag=18):
    """The session's steps wait for its adapters, of which so many bytes are there; once a second."""

    num_bytes: NumBytes
    total_bytes: NumBytes
    """As far as known by now."""
