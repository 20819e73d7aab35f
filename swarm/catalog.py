"""Model names and the content that is served under them.

Blocks are announced by content digest (`swarm.registry`). This table is for people, who know names: it tells a peer
that a name is served with other content than its own. Every server adds an entry of its own, spread over shards so that
no key grows with the swarm.
"""

import time
from typing import Annotated
from zlib import crc32

import msgspec

from swarm.errors import CheckpointMismatch
from swarm.network.node import Node
from swarm.types import MAX_BLOCKS

CATALOG_TTL_S = 300.0
NUM_SHARDS = 16
MAX_ENTRIES = 1000
"""More entries than this are not looked at."""


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A model that some server serves."""

    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]


_decoder = msgspec.msgpack.Decoder(ModelEntry)


async def announce_model(node: Node, entry: ModelEntry) -> bool:
    """Say that this model is served here; repeat it before CATALOG_TTL_S has passed."""
    shard = crc32(node.peer_id.encode()) % NUM_SHARDS
    value = msgspec.msgpack.encode(entry)
    return await node.dht_store(_key(entry.name, shard), node.peer_id, value, time.time() + CATALOG_TTL_S)


async def lookup_name(node: Node, name: str) -> frozenset[ModelEntry]:
    """The different models that are served under a name; malformed entries are left out."""
    shards = await node.dht_get_many([_key(name, shard) for shard in range(NUM_SHARDS)])
    values = [value for shard in shards.values() for value in shard.values()]
    entries = set()
    for value in values[:MAX_ENTRIES]:
        try:
            entry = _decoder.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if entry.name == name:
            entries.add(entry)
    return frozenset(entries)


async def refuse_other_content(node: Node, name: str, digest: str) -> None:
    """Check that a name means to us what it means to the swarm.

    Entries are claims of strangers, so other content is no objection once anybody serves ours, too.

    Raises:
        CheckpointMismatch: when the swarm serves this name with other content only.
    """
    others = {entry.digest for entry in await lookup_name(node, name)}
    if others and digest not in others:
        raise CheckpointMismatch(
            f"the swarm serves {name} with other content ({min(others)[:12]}, ours is {digest[:12]}):"
            " use the same checkpoint and revision"
        )


def _key(name: str, shard: int) -> str:
    return f"swarm/names/v1/{name}/{shard}"
