"""Server records: packing, and what is refused of what peers claim."""

import struct
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.adapters.notes import MAX_NOTES, AdapterNote
from swarm.coordinates import Place
from swarm.errors import InvalidRequest, PeerMisbehaved, PeerTimeout
from swarm.identity import Identity, peer_id_of
from swarm.network import Node, NodeConfig
from swarm.network.relay_book import RelayBook
from swarm.registry import (
    MAX_PINGS,
    MAX_RECORD_BYTES,
    MAX_RELAYS,
    Ping,
    Registry,
    ServerRecord,
    peer_tag,
    read_shard,
    shard_key,
    shard_of,
)
from swarm.types import BlockRange, ServerState

MODEL = "ab" * 32
PEER = Identity.generate().peer_id
RECORD = ServerRecord(
    peer_id=PEER,
    model=MODEL,
    blocks=BlockRange(0, 24),
    state=ServerState.ONLINE,
    decode_tps=812.5,
    batch_tps=9000.0,
    prefill_tps=30000.0,
    load=51 / 255,
    queue_s=0.0123,
    kv_free_tokens=65536,
    place=Place(position=(0.0412, -0.0031, 0.2), height_s=0.0021, error=51 / 255),
    pings=tuple(Ping(tag=peer_tag(str(index)), rtt_s=0.0125) for index in range(MAX_PINGS)),
    quantization="int8",
    dtype="bfloat16",
    public_name="Zoë's box",
    version="0.1.0",
    expires_at=1.8e9,
)

names = st.text(max_size=32).filter(lambda text: len(text.encode(errors="ignore")) <= 32 and text.isprintable())
times = st.integers(0, 65535).map(lambda ticks: ticks / 10_000)
axes = st.integers(-30_000, 30_000).map(lambda ticks: ticks / 10_000)
shares = st.integers(0, 255).map(lambda part: part / 255)
records = st.builds(
    lambda relays, **fields: ServerRecord(is_relayed=relays is not None, relays=relays or (), **fields),
    relays=st.none() | st.lists(st.binary(min_size=32, max_size=32).map(peer_id_of), max_size=MAX_RELAYS).map(tuple),
    peer_id=st.just(PEER),
    model=st.just(MODEL),
    blocks=st.tuples(st.integers(0, 4000), st.integers(1, 96)).map(lambda pair: BlockRange(pair[0], sum(pair))),
    state=st.sampled_from(ServerState),
    decode_tps=st.floats(0, 1e9, width=32),
    batch_tps=st.floats(0, 1e9, width=32),
    prefill_tps=st.floats(0, 1e9, width=32),
    load=shares,
    queue_s=times,
    kv_free_tokens=st.integers(0, (1 << 32) - 1),
    place=st.none() | st.builds(Place, position=st.tuples(axes, axes, axes), height_s=axes.map(abs), error=shares),
    pings=st.lists(st.builds(Ping, tag=st.integers(0, (1 << 32) - 1), rtt_s=times), max_size=MAX_PINGS).map(tuple),
    quantization=names,
    dtype=names,
    public_name=names,
    version=names,
    period_s=st.integers(1, 12000).map(lambda tenths: tenths / 10),
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
    assert len(data) <= 48 + 6 * MAX_PINGS + 32 * MAX_RELAYS + 4 * 33 + 5 * MAX_NOTES <= MAX_RECORD_BYTES


def test_a_usual_record_is_compact():
    """With its signature (64 bytes) and eight pings a usual record stays below 200 bytes; adapters add 5 bytes each."""
    notes = tuple(AdapterNote.of(f"{number:064x}", 16, on_device=True) for number in range(MAX_NOTES))
    assert len(RECORD.encode()) + 64 + 2 <= 200
    assert len(replace(RECORD, adapters=notes).encode()) + 64 + 3 <= 360


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
        (0, b"\x02", "format 2"),
        (1, b"\x09", "ServerState"),
        (2, struct.pack("!HH", 24, 24), "24:24"),
        (2, struct.pack("!HH", 0, 60000), "0:60000"),
        (2, struct.pack("!HH", 30, 31), "30:31, the model has 0:30"),
        (7, struct.pack("!f", -1.0), "decode_tps -1.0"),
        (7, struct.pack("!f", float("nan")), "decode_tps nan"),
        (7, struct.pack("!f", float("inf")), "decode_tps inf"),
        (11, struct.pack("!f", -0.5), "batch_tps -0.5"),
        (15, struct.pack("!f", float("nan")), "prefill_tps nan"),
        (26, struct.pack("!H", 0), "period_s 0.0"),
        (28, struct.pack("!d", float("nan")), "expires_at nan"),
        (28, struct.pack("!d", float("-inf")), "expires_at -inf"),
        (36, struct.pack("!h", 32000), "position"),
        (45, b"\x09", "more than 8 pings"),
    ],
)
def test_a_field_out_of_range_is_refused(offset: int, value: bytes, reason: str):
    """Each numeric field is checked; the error says which and what."""
    data = bytearray(RECORD.encode())
    data[offset : offset + len(value)] = value
    with pytest.raises(PeerMisbehaved, match=reason):
        ServerRecord.decode(bytes(data), peer_id=PEER, model=MODEL, num_blocks=30)


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
        self.peer_id, self.table, self.relays = identity.peer_id, table, RelayBook()

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
        (ServerState.ONLINE, now + 3 * RECORD.period_s + 11.0),
    ]:
        node = FakeNode(Identity.generate(), table)
        record = replace(RECORD, peer_id=node.peer_id, state=state, expires_at=expires_at)
        assert await Registry(node).announce(record, 60)  # type: ignore[arg-type]
        if state is not ServerState.OFFLINE and now < expires_at <= now + 60:
            expected.add(record)
    assert set(await Registry(node).lookup(MODEL)) == expected  # type: ignore[arg-type]
    assert await Registry(node).lookup("cd" * 32) == []  # type: ignore[arg-type]


async def test_a_shard_that_could_not_be_read_is_not_taken_for_an_empty_one():
    """The others are told; who wants all of them learns that some are missing."""
    node = FakeNode(Identity.generate(), {})
    unread = [key for shard in (3, 5) for key in [shard_key(MODEL, shard)]]

    async def most(keys: list[str]) -> dict[str, dict[str, bytes]]:
        return {key: {} for key in keys if key not in unread}

    node.dht_get_many = most  # type: ignore[method-assign]
    registry = Registry(node)  # type: ignore[arg-type]
    assert await registry.lookup_shards(MODEL, [2, 3]) == [[], None]
    with pytest.raises(PeerTimeout, match="14 of 16 shards"):
        await registry.lookup(MODEL)


async def test_lookup_leaves_out_ranges_beyond_the_model_and_records_of_others():
    """A range that the model does not have is refused at the edge, as is a record under somebody else's shard."""
    table: dict[str, dict[str, bytes]] = {}
    node = FakeNode(Identity.generate(), table)
    record = replace(RECORD, peer_id=node.peer_id, expires_at=time.time() + 60)
    assert await Registry(node).announce(record, 60)  # type: ignore[arg-type]
    stranger = Identity.generate().peer_id
    table.setdefault(shard_key(MODEL, (shard_of(stranger) + 1) % 16), {})[stranger] = record.encode()
    assert await Registry(node).lookup(MODEL, num_blocks=24) == [record]  # type: ignore[arg-type]
    assert await Registry(node).lookup(MODEL, num_blocks=23) == []  # type: ignore[arg-type]


def test_a_record_that_was_not_renewed_is_late_long_before_it_expires():
    """One period and three seconds after it was announced the server is in doubt; two periods later it is gone."""
    record = replace(RECORD, period_s=20.0, expires_at=1060.0)
    assert record.is_valid(1000.0) and not record.is_late(1022.0)
    assert record.is_late(1024.0) and record.is_valid(1024.0)
    assert not record.is_valid(1060.0)
    assert not record.is_valid(900.0)  # our clocks differ by more than a record may be ahead


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
