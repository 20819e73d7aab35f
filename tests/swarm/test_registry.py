"""Server records: packing, and what is refused of what peers claim."""

import struct
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.adapters.notes import MAX_NOTES, AdapterNote
from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.identity import Identity
from swarm.network import Node, NodeConfig
from swarm.registry import MAX_RECORD_BYTES, Registry, ServerRecord, read_shard, shard_key, shard_of
from swarm.types import BlockRange, ServerState

MODEL = "ab" * 32
PEER = Identity.generate().peer_id
RECORD = ServerRecord(
    peer_id=PEER,
    model=MODEL,
    blocks=BlockRange(0, 24),
    state=ServerState.ONLINE,
    decode_tps=812.5,
    load=0.25,
    kv_free_tokens=65536,
    quantization="int8",
    dtype="bfloat16",
    public_name="Zoë's box",
    version="0.1.0",
    expires_at=1.8e9,
)

names = st.text(max_size=32).filter(lambda text: len(text.encode(errors="ignore")) <= 32 and text.isprintable())
records = st.builds(
    ServerRecord,
    peer_id=st.just(PEER),
    model=st.just(MODEL),
    blocks=st.tuples(st.integers(0, 4000), st.integers(1, 96)).map(lambda pair: BlockRange(pair[0], sum(pair))),
    state=st.sampled_from(ServerState),
    decode_tps=st.floats(0, 1e9, width=32),
    load=st.floats(0, 1, width=32),
    kv_free_tokens=st.integers(0, (1 << 48) - 1),
    quantization=names,
    dtype=names,
    public_name=names,
    version=names,
    expires_at=st.floats(0, 1e11),
    adapters=st.lists(
        st.builds(
            AdapterNote,
            short=st.binary(min_size=4, max_size=4),
            max_rank=st.integers(0, 127).map(lambda steps: 8 * steps),
            on_device=st.booleans(),
        ),
        max_size=MAX_NOTES,
    ).map(tuple),
)


def decode(data: bytes) -> ServerRecord:
    """Decode as the record of PEER for MODEL."""
    return ServerRecord.decode(data, peer_id=PEER, model=MODEL)


@given(records)
def test_a_record_survives_the_wire(record: ServerRecord):
    """Every valid record is read back as it was written, and is small."""
    data = record.encode()
    assert decode(data) == record
    assert len(data) <= 41 + 4 * 33 + 5 * MAX_NOTES <= MAX_RECORD_BYTES


def test_a_usual_record_is_compact():
    """With its signature (64 bytes) a usual record has about 142 bytes, and with as many adapters as may be, 303."""
    notes = tuple(AdapterNote.of(f"{number:064x}", 16, on_device=True) for number in range(MAX_NOTES))
    assert len(RECORD.encode()) + 64 + 2 <= 143
    assert len(replace(RECORD, adapters=notes).encode()) + 64 + 3 <= 304


def test_adapters_are_recognised_and_their_number_is_bounded():
    """By the beginning of their digest; rank and place are there; beyond the limit they are left out."""
    digests = [f"{number:08x}" + "0" * 56 for number in range(MAX_NOTES + 8)]
    notes = tuple(AdapterNote.of(digest, 12, on_device=digest == digests[1]) for digest in digests)
    found = decode(replace(RECORD, adapters=notes).encode()).adapters
    assert len(found) == MAX_NOTES and found[0].is_about(digests[0]) and not found[0].is_about(digests[1])
    assert [note.on_device for note in found[:3]] == [False, True, False] and found[0].max_rank == 16


@given(st.binary(max_size=MAX_RECORD_BYTES + 10))
def test_garbage_is_a_misbehaving_peer_and_nothing_else(data: bytes):
    """Any bytes either are a record or raise PeerMisbehaved."""
    with suppress(PeerMisbehaved):
        decode(data)


@given(records, st.data())
def test_damage_never_raises_anything_else(record: ServerRecord, data: st.DataObject):
    """A record with changed, missing or additional bytes is another valid record or is refused."""
    encoded = bytearray(record.encode())
    index = data.draw(st.integers(0, len(encoded) - 1))
    encoded[index] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(encoded), bytes(encoded[:index]), bytes(encoded) + b"x"):
        with suppress(PeerMisbehaved):
            decode(damaged)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"\x01", "format 1"),
        (1, b"\x09", "ServerState"),
        (2, struct.pack("!HH", 24, 24), "24:24"),
        (2, struct.pack("!HH", 0, 60000), "0:60000"),
        (6, struct.pack("!f", -1.0), "decode_tps -1.0"),
        (6, struct.pack("!f", float("nan")), "decode_tps nan"),
        (6, struct.pack("!f", float("inf")), "decode_tps inf"),
        (10, struct.pack("!f", 1.5), "load 1.5"),
        (14, struct.pack("!Q", 1 << 60), "free tokens"),
        (22, struct.pack("!d", float("nan")), "expires_at nan"),
    ],
)
def test_a_field_out_of_range_is_refused(offset: int, value: bytes, reason: str):
    """Each numeric field is checked; the error says which and what."""
    data = bytearray(RECORD.encode())
    data[offset : offset + len(value)] = value
    with pytest.raises(PeerMisbehaved, match=reason):
        decode(bytes(data))


def test_an_oversized_record_is_refused_before_it_is_read():
    """More than 512 bytes are not looked at."""
    with pytest.raises(PeerMisbehaved, match="600 bytes, limit 512") as caught:
        decode(bytes(600))
    assert caught.value.peer_id == PEER


def test_names_that_would_upset_a_terminal_are_refused():
    """Control characters and overlong names are refused on both sides."""
    with pytest.raises(InvalidRequest, match="printable"):
        replace(RECORD, public_name="\x1b[2Jboo")
    with pytest.raises(InvalidRequest, match="40 bytes"):
        replace(RECORD, public_name="é" * 20)


def test_a_record_in_the_wrong_shard_is_ignored():
    """A shard holds the records of its own peers only, and bad ones don't hide good ones."""
    shard = shard_of(PEER)
    values = {"not a peer": b"", PEER: RECORD.encode(), "x": b"garbage"}
    assert list(read_shard(values, model=MODEL, shard=shard)) == [RECORD]
    assert list(read_shard(values, model=MODEL, shard=(shard + 1) % 16)) == []


class FakeNode:
    """A node whose DHT is a dictionary."""

    def __init__(self, identity: Identity, table: dict[str, dict[str, bytes]]):
        self.peer_id, self.table = identity.peer_id, table

    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        self.table.setdefault(key, {})[subkey] = value
        return True

    async def dht_get_many(self, keys: list[str]) -> dict[str, dict[str, bytes]]:
        return {key: dict(self.table.get(key, {})) for key in keys}


async def test_lookup_leaves_out_offline_expired_and_far_future_records():
    """Only records that are valid now are returned."""
    table: dict[str, dict[str, bytes]] = {}
    now = time.time()
    expected = set()
    for state, expires_at in [
        (ServerState.ONLINE, now + 60),
        (ServerState.JOINING, now + 60),
        (ServerState.OFFLINE, now + 60),
        (ServerState.ONLINE, now - 1),
        (ServerState.ONLINE, now + 1e6),
    ]:
        node = FakeNode(Identity.generate(), table)
        record = replace(RECORD, peer_id=node.peer_id, state=state, expires_at=expires_at)
        assert await Registry(node).announce(record, 60)  # type: ignore[arg-type]
        if state is not ServerState.OFFLINE and now < expires_at < now + 1000:
            expected.add(record)
    assert set(await Registry(node).lookup(MODEL)) == expected  # type: ignore[arg-type]
    assert await Registry(node).lookup("cd" * 32) == []  # type: ignore[arg-type]


async def test_announcing_for_another_peer_is_refused():
    """A record must carry the announcer's own id and a sane life time."""
    node = FakeNode(Identity.generate(), {})
    with pytest.raises(InvalidRequest, match=node.peer_id):
        await Registry(node).announce(RECORD, 60)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="ttl of 0 s"):
        await Registry(node).announce(replace(RECORD, peer_id=node.peer_id), 0)  # type: ignore[arg-type]


async def test_records_travel_through_a_real_dht():
    """An announcement is found by another peer, and a later OFFLINE one replaces it."""
    async with (
        await Node.start(NodeConfig(host="127.0.0.1")) as first,
        await Node.start(NodeConfig(host="127.0.0.1", initial_peers=first.addresses)) as server,
        await Node.start(NodeConfig(client_mode=True, initial_peers=first.addresses)) as client,
    ):
        record = replace(RECORD, peer_id=server.peer_id, expires_at=time.time() + 60)
        assert await Registry(server).announce(record, 60)
        assert await Registry(client).lookup(MODEL) == [record]
        assert await Registry(server).lookup(MODEL) == [record]
        offline = replace(record, state=ServerState.OFFLINE, expires_at=time.time() + 61)
        assert await Registry(server).announce(offline, 60)
        assert await Registry(client).lookup(MODEL) == []
        stale = replace(record, expires_at=offline.expires_at - 1)
        assert not await Registry(server).announce(stale, 60)
        assert shard_key(MODEL, shard_of(server.peer_id)).endswith(f"/{shard_of(server.peer_id)}")
