"""Model names and the content that is served under them.

Blocks are announced by content digest (`swarm.registry`). These tables are for people, who know names. One, by name,
tells a peer that a name is served with other content than its own; the other lists all models there are. Every server
adds an entry of its own to both, spread over shards so that no key grows with the swarm.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated
from zlib import crc32

import msgspec

from swarm.errors import CheckpointMismatch, PeerTimeout
from swarm.network.node import Node
from swarm.types import MAX_BLOCKS

CATALOG_TTL_S = 300.0
NUM_SHARDS = 16
MAX_ENTRIES = 1000
"""More entries than this are not looked at under one name ..."""
MAX_LISTED = 16384
"""... and in the list of all models."""


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A model that some server serves."""

    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]


_decoder = msgspec.msgpack.Decoder(ModelEntry)


async def announce_model(node: Node, entry: ModelEntry) -> bool:
    """Say that this model is served here; repeat it before CATALOG_TTL_S has passed."""
    shard = crc32(node.peer_id.encode()) % NUM_SHARDS
    value, expires_at = msgspec.msgpack.encode(entry), time.time() + CATALOG_TTL_S
    stored = [
        await node.dht_store(key, node.peer_id, value, expires_at)
        for key in (_key(entry.name, shard), _list_key(shard))
    ]
    return all(stored)


async def list_models(node: Node, limit: int) -> list[ModelEntry]:
    """The models that servers say they serve, those of most servers first; at most `limit`.

    Entries are claims of strangers: where they differ about one digest, what most of them say counts.
    """
    shards = await node.dht_get_many([_list_key(shard) for shard in range(NUM_SHARDS)])
    entries = _decode_all([value for shard in shards.values() for value in shard.values()][:MAX_LISTED])
    claims: dict[str, Counter[ModelEntry]] = {}
    for entry in entries:
        claims.setdefault(entry.digest, Counter())[entry] += 1
    models = sorted(claims.values(), key=lambda claim: (-claim.total(), min(claim, key=repr).name))
    return [max(claim, key=lambda entry: (claim[entry], repr(entry))) for claim in models[:limit]]


async def refuse_other_content(node: Node, name: str, digest: str) -> None:
    """Check that a name means to us what it means to the swarm.

    Entries are claims of strangers, so other content is no objection once anybody serves ours, too. So one shard will
    do, where there are many servers; which one is random, lest all ask the same nodes.

    Raises:
        CheckpointMismatch: when the swarm serves this name with other content only.
        PeerTimeout: when the DHT does not say all that it takes.
    """
    first, *rest = random.sample(range(NUM_SHARDS), NUM_SHARDS)
    others: set[str] = set()
    for shards in ([first], rest):
        others |= {entry.digest for entry in await _lookup_name(node, name, shards)}
        if digest in others:
            return
    if others:
        raise CheckpointMismatch(
            f"the swarm serves {name} with other content ({min(others)[:12]}, ours is {digest[:12]}):"
            " use the same checkpoint and revision"
        )


async def _lookup_name(node: Node, name: str, shards: Sequence[int]) -> list[ModelEntry]:
    """What these shards say is served under a name; malformed entries are left out.

    Raises:
        PeerTimeout: some could not be read.
    """
    found = await node.dht_get_many([_key(name, shard) for shard in shards])
    if len(found) < len(shards):
        raise PeerTimeout(f"{len(shards) - len(found)} of {len(shards)} shards of the names could not be read")
    values = [value for shard in found.values() for value in shard.values()]
    return [entry for entry in _decode_all(values[:MAX_ENTRIES]) if entry.name == name]


def _decode_all(values: Iterable[bytes]) -> Iterator[ModelEntry]:
    """What is well-formed of these values."""
    for value in values:
        try:
            yield _decoder.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue


def _key(name: str, shard: int) -> str:
    return f"swarm/names/v1/{name}/{shard}"


def _list_key(shard: int) -> str:
    return f"swarm/models/v1/{shard}"
