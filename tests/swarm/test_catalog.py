"""The list of all models: what most servers say of each, and nothing that is malformed."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.catalog import NUM_SHARDS, ModelEntry, announce_model, list_models, refuse_other_content
from swarm.errors import CheckpointMismatch, PeerTimeout
from swarm.identity import Identity


class FakeNode:
    """Holds what was stored, by key and owner."""

    def __init__(self) -> None:
        self.peer_id = Identity.generate().peer_id
        self.stored: dict[str, dict[str, bytes]] = {}
        self.num_read = 0

    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        self.stored.setdefault(key, {})[subkey] = value
        return True

    async def dht_get_many(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        self.num_read += len(keys)
        return {key: self.stored.get(key, {}) for key in keys}


def entry(number: int, *, name: str = "", num_blocks: int = 30) -> ModelEntry:
    return ModelEntry(digest=f"{number:064x}", name=name or f"model-{number}", num_blocks=num_blocks)


def listed(values: list[bytes], limit: int = 10) -> list[ModelEntry]:
    """What a reader makes of these values, each of another server."""
    node: Any = FakeNode()
    for number, value in enumerate(values):
        shard = node.stored.setdefault(f"swarm/models/v1/{number % NUM_SHARDS}", {})
        shard[f"peer-{number}"] = value
    return asyncio.run(list_models(node, limit))


def test_what_a_server_announces_is_listed() -> None:
    """Under its name for those who know it, and in the list for those who don't."""
    node: Any = FakeNode()
    assert asyncio.run(announce_model(node, entry(1)))
    assert asyncio.run(list_models(node, 10)) == [entry(1)]
    assert {key.rsplit("/", 1)[0] for key in node.stored} == {"swarm/names/v1/model-1", "swarm/models/v1"}


@given(st.lists(st.integers(1, 5), max_size=60), st.integers(1, 5))
def test_models_of_most_servers_come_first_and_each_once(servers: list[int], limit: int) -> None:
    """No more than asked for."""
    found = listed([msgspec.msgpack.encode(entry(number)) for number in servers], limit)
    counts = [servers.count(int(model.digest, 16)) for model in found]
    assert counts == sorted(counts, reverse=True)
    assert len({model.digest for model in found}) == len(found) == min(limit, len(set(servers)))


@given(st.lists(st.binary(max_size=80), max_size=20))
def test_malformed_entries_are_left_out(noise: list[bytes]) -> None:
    """Whatever strangers store, a good entry is found."""
    assert entry(1) in listed([*noise, msgspec.msgpack.encode(entry(1))], limit=100)


def test_one_liar_does_not_rename_or_resize_a_model() -> None:
    """What most servers of a digest say of it counts."""
    honest = [msgspec.msgpack.encode(entry(1))] * 3
    assert listed([msgspec.msgpack.encode(entry(1, name="evil", num_blocks=4000)), *honest]) == [entry(1)]


def named(*digests: int) -> Any:
    """A node that finds so many servers of these contents under one name in every shard."""
    node: Any = FakeNode()
    values = {f"peer-{digest}": msgspec.msgpack.encode(entry(digest, name="same")) for digest in digests}
    node.stored = {f"swarm/names/v1/same/{shard}": values for shard in range(NUM_SHARDS)}
    return node


def test_a_name_with_our_content_among_others_is_found_in_one_shard() -> None:
    """In a large swarm, where each of them has some of all; there a shard is large."""
    node = named(1, 2)
    asyncio.run(refuse_other_content(node, "same", entry(1).digest))
    assert node.num_read == 1


def test_a_name_with_other_content_only_is_refused() -> None:
    """After all shards were asked: a single server of ours would do, wherever it is."""
    node = named(2)
    with pytest.raises(CheckpointMismatch, match="with other content"):
        asyncio.run(refuse_other_content(node, "same", entry(1).digest))
    assert node.num_read == NUM_SHARDS
    node.stored["swarm/names/v1/same/7"] = {"ours": msgspec.msgpack.encode(entry(1, name="same"))}
    asyncio.run(refuse_other_content(node, "same", entry(1).digest))
    asyncio.run(refuse_other_content(named(), "same", entry(1).digest))


def test_a_name_is_not_refused_before_all_that_could_be_read_was_read() -> None:
    """Our content may be in the shard that is missing."""
    node = named(2)
    get_many = node.dht_get_many

    async def most(keys: list[str]) -> dict[str, dict[str, bytes]]:
        found: dict[str, dict[str, bytes]] = await get_many(keys)
        return {key: values for key, values in found.items() if not key.endswith("/7")}

    node.dht_get_many = most
    with pytest.raises(PeerTimeout, match="1 of 1?"):
        asyncio.run(refuse_other_content(node, "same", entry(1).digest))
