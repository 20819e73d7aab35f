"""What the DHT costs: bytes per server, look-ups with 8, 32 and 64 real nodes, and traffic projected to 10,000 servers.

    python tests/bench/bench_dht.py [--nodes 8 32 64] [--records 1250]

Every node is a real peer on loopback that announces one record, as a server does; others' records are put into the
storage of those nodes that would keep them, signed by an identity each, so that keys are as full as in a larger swarm.
A client that has just joined asks what the model's name means (as it does where it finds no server), learns who serves
it, and reads all records; then a server renews its record. What goes over the wire is counted: every call to another
node, with its request and its answer, but not libp2p's frames.

Projected are the bytes that move in a larger swarm, by the sizes measured here and the budget of `swarm.directory`.
"""

import argparse
import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any
from zlib import crc32

import msgspec
from common import judged, print_report

from swarm.adapters.notes import AdapterNote
from swarm.catalog import CATALOG_TTL_S, ModelEntry, _key, _list_key, announce_model, refuse_other_content
from swarm.coordinates import Place
from swarm.directory import (
    COPY_BYTES,
    NUM_COPIES,
    READ_BYTES_PER_S,
    Directory,
    shards_due,
    shards_to_begin,
)
from swarm.identity import Identity
from swarm.leases import Claim
from swarm.network import Node, NodeConfig
from swarm.network.hive import DHTID, DHTRecord, MSGPackSerializer
from swarm.network.records import SignedRecords
from swarm.registry import (
    MAX_PINGS,
    MAX_RELAYS,
    NUM_SHARDS,
    TTL_PERIODS,
    Ping,
    Registry,
    ServerRecord,
    shard_key,
    shard_of,
)
from swarm.server.mover import MAX_SETTLES
from swarm.types import BlockRange, ServerState

MODEL = "ab" * 32
SERVERS = 10_000
PERIOD_S = 20.0
NUM_LOOKS = 10
TTL_S = 600.0
"""Of records here, so that none expires while others are measured."""
NAMES_S = CATALOG_TTL_S / 3
"""How often a server says again what model it serves, in two tables."""
SERVER_READS = (2, 1 + MAX_SETTLES)
"""How often a server that joins reads all records until it has chosen its blocks: at least, and at most."""
MAX_REPLY_BYTES = 4 << 20
"""hivemind refuses larger messages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 32, 64], help="sizes of the swarms")
    parser.add_argument("--records", type=int, default=1250, help="of others, once more with the first of these")
    args = parser.parse_args()
    sizes = {
        "bare": len(make_record("p").encode()),
        "with eight pings": len(make_record("p", num_pings=MAX_PINGS).encode()),
        "with sixteen adapters as well": len(make_record("p", num_pings=MAX_PINGS, num_adapters=16).encode()),
        "and behind relays": len(make_record("p", num_pings=MAX_PINGS, num_adapters=16, is_relayed=True).encode()),
        "claim to move": len(claim().encode()),
    }
    for name, size in sizes.items():
        print(f"{name:>30}: {size} bytes")
    rows = [asyncio.run(measure(size, 0)) for size in args.nodes]
    rows.append(asyncio.run(measure(args.nodes[0], args.records)))
    parts = ("join", "read_all", "name", "renewal", "names")
    titles = (f"{part + ': ms':>14}{'calls':>7}{'kB':>8}" for part in parts)
    print(f"{'nodes':>6}{'records':>9}{'found':>7}{'keys':>6}", *titles)
    for row in rows:
        cells = (f"{row[it]['ms']:14}{row[it]['calls']:7}{row[it]['kB']:8}" for it in parts)
        print(f"{row['nodes']:6}{row['records']:9}{row['found']:7}{row['join']['keys']:6}", *cells)
    stored_bytes = rows[-1]["stored_bytes"]
    print(f"{stored_bytes:.0f} bytes of an answer are one record, in {rows[-1]['copies']:.1f} copies")
    projected = project(SERVERS, stored_bytes, rows)
    for name, value in projected.items():
        print(f"{name:>60}: {value:,.1f}")
    targets = {
        "bytes_of_a_record_in_an_answer": judged(stored_bytes, "<=", COPY_BYTES),
        "keys_of_a_joining_client": judged(max(row["join"]["keys"] for row in rows), "<=", NUM_SHARDS),
        "all_found": judged(min(row["found"] / row["records"] for row in rows), "==", 1.0),
        "a_renewal_among_many_over_few": judged(rows[-1]["renewal"]["kB"] / rows[0]["renewal"]["kB"], "<=", 1.5),
        "largest_key_over_a_reply_at_10000": judged(projected["largest key, kB"] * 1e3 / MAX_REPLY_BYTES, "<=", 1.0),
    }
    print_report("dht", targets, sizes=sizes, rows=rows, projected=projected)


class Wire:
    """Counts what a node asks others for and what it is answered, from now on."""

    def __init__(self, node: Node):
        self._node = node
        self._calls: Counter[str] = Counter()
        self._bytes = 0
        self._keys: list[str] = []
        caller: Any = node._underlay.caller  # type: ignore[union-attr]
        call, search = caller.call_unary_handler, node.dht_get_many

        async def counted(peer_id: Any, name: str, data: bytes) -> bytes:
            self._calls[name.rpartition(".")[2]] += 1
            self._bytes += len(data)
            reply: bytes = await call(peer_id, name, data)
            self._bytes += len(reply)
            return reply

        async def searched(keys: list[str]) -> dict[str, dict[str, bytes]]:
            self._keys += keys
            return await search(keys)

        caller.call_unary_handler = counted
        node.dht_get_many = searched  # type: ignore[method-assign]

    async def measured(self, work: Any) -> dict[str, Any]:
        """What some work takes, and moves."""
        self._calls.clear()
        self._bytes, self._keys[:] = 0, []
        seconds = await _timed(work)
        return {
            "ms": round(1e3 * seconds, 1),
            "calls": self._calls.total(),
            "kB": round(self._bytes / 1e3, 1),
            "keys": len(self._keys),
        }


async def measure(num_nodes: int, num_records: int) -> dict[str, Any]:
    """A swarm of real nodes with so many records besides their own; what announcing and reading take."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        nodes = [first]
        while len(nodes) < num_nodes:
            batch = range(min(8, num_nodes - len(nodes)))
            config = NodeConfig(host="127.0.0.1", initial_peers=tuple(first.addresses))
            started = await asyncio.gather(*(Node.start(config) for _ in batch))
            for node in started:
                stack.push_async_callback(node.close)
            nodes += started
        for node in nodes:
            await _renew(node)
            await _tell_name(node)
        for _ in range(num_records):
            _put(nodes, Identity.generate())
        config = NodeConfig(host="127.0.0.1", client_mode=True, initial_peers=tuple(first.addresses))
        client = await stack.enter_async_context(await Node.start(config))
        wire = Wire(client)
        name = await wire.measured(refuse_other_content(client, "a model", MODEL))
        directory = Directory(Registry(client), model=MODEL, num_blocks=32)
        join = await wire.measured(directory.refresh(max_age_s=15.0))
        known = len(directory.records)
        reads = [await wire.measured(Registry(client).lookup(MODEL)) for _ in range(NUM_LOOKS)]
        found = len(await Registry(client).lookup(MODEL))
        server = Wire(nodes[-1])
        renewals = [await server.measured(_renew(nodes[-1])) for _ in range(NUM_LOOKS)]
        names = await server.measured(_tell_name(nodes[-1]))
        stored_bytes, copies = _stored(nodes, num_nodes + num_records)
    return {
        "nodes": num_nodes,
        "records": num_nodes + num_records,
        "join": join,
        "known_after_joining": known,
        "read_all": _median(reads),
        "worst_read_ms": max(it["ms"] for it in reads),
        "name": name,
        "renewal": _median(renewals),
        "names": names,
        "found": found,
        "stored_bytes": stored_bytes,
        "copies": copies,
    }


def _median(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that took the median time."""
    return sorted(found, key=lambda it: float(it["ms"]))[len(found) // 2]


def project(num_servers: int, stored_bytes: float, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes that move in a swarm of so many servers, by the budget that readers keep.

    Every answer to a search names nodes as well, which is most of what moves in small swarms. That part is taken to be
    what it is in the largest one that was measured; it grows with the logarithm of the number of nodes.

    Args:
        num_servers: in the swarm.
        stored_bytes: one record in an answer.
        rows: what was measured.
    """
    counts = [0] * NUM_SHARDS
    for index in range(num_servers):
        counts[shard_of(f"12D3KooW{index}")] += 1
    joining = sum(counts[shard] for shard in _begun(counts))
    round_s = max(15.0, num_servers * COPY_BYTES * NUM_COPIES / READ_BYTES_PER_S)
    largest = max(rows, key=lambda row: int(row["nodes"]))
    copies_kb = stored_bytes * NUM_COPIES / 1e3
    read_kb = num_servers * copies_kb + _searching_kb(largest, "read_all", copies_kb)
    return {
        "a server renews its record, kB/s": largest["renewal"]["kB"] / PERIOD_S,
        "a server tells its model's name, kB/s": largest["names"]["kB"] / NAMES_S,
        "a key's holders take, kB/s": max(counts) * stored_bytes / PERIOD_S / 1e3,
        "largest key, kB": max(counts) * stored_bytes / 1e3,
        "a client reads, kB/s": read_kb / round_s,
        "shards that it reads each 15 s": len(shards_due([0.0] * NUM_SHARDS, 15.0, 15.0, num_servers)),
        "a joining client knows then, servers": joining,
        "a joining client reads once, kB": joining * copies_kb + _searching_kb(largest, "join", copies_kb),
        "until all shards are read again, s": round_s,
        "a joining server reads until it has chosen, MB, at least": SERVER_READS[0] * read_kb / 1e3,
        "at most": SERVER_READS[1] * read_kb / 1e3,
        "what the name means, kB, which it asks as well": rows[-1]["name"]["kB"] * num_servers / rows[-1]["records"],
    }


def _searching_kb(row: dict[str, Any], part: str, copies_kb: float) -> float:
    """What a read moves besides records."""
    return max(0.0, row[part]["kB"] - row["records"] * copies_kb)


def _begun(counts: Sequence[int]) -> list[int]:
    """The shards that a newcomer reads at once, when they have so many records."""
    read_at, begun = [-math.inf] * NUM_SHARDS, []
    for _ in range(2):
        for shard in shards_to_begin(read_at, sum(counts[shard] for shard in begun), range(NUM_SHARDS)):
            begun.append(shard)
            read_at[shard] = 0.0
    return begun


def make_record(peer_id: str, *, num_pings: int = 0, num_adapters: int = 0, is_relayed: bool = False) -> ServerRecord:
    """A server's record."""
    relays = tuple(Identity.generate().peer_id for _ in range(MAX_RELAYS * is_relayed))
    return ServerRecord(
        peer_id=peer_id,
        model=MODEL,
        blocks=BlockRange(10, 22),
        state=ServerState.ONLINE,
        decode_tps=100.0,
        batch_tps=900.0,
        prefill_tps=4000.0,
        load=0.3,
        kv_free_tokens=16384,
        is_relayed=is_relayed,
        relays=relays,
        place=Place(position=(0.01, 0.02, 0.03), height_s=0.002, error=0.2),
        pings=tuple(Ping(tag=index, rtt_s=0.02) for index in range(num_pings)),
        quantization="int8",
        dtype="bfloat16",
        public_name="somebody",
        version="0.1.0",
        period_s=TTL_S / TTL_PERIODS,
        expires_at=time.time() + TTL_S,
        adapters=tuple(_note(index) for index in range(num_adapters)),
    )


def _note(index: int) -> AdapterNote:
    return AdapterNote.of(f"{index:064x}", 16, on_device=True)


def claim() -> Claim:
    """A server's word that it is about to move."""
    return Claim(peer_id="p", leaves=BlockRange(0, 12), takes=BlockRange(40, 52), expires_at=time.time() + 300)


async def _renew(node: Node) -> None:
    await Registry(node).announce(make_record(node.peer_id, num_pings=MAX_PINGS), TTL_S)


async def _tell_name(node: Node) -> None:
    await announce_model(node, ModelEntry(digest=MODEL, name="a model", num_blocks=32))


def _put(nodes: Sequence[Node], identity: Identity) -> None:
    """Store what another server would have announced at those that are nearest to its keys."""
    entry = msgspec.msgpack.encode(ModelEntry(digest=MODEL, name="a model", num_blocks=32))
    shard = crc32(identity.peer_id.encode()) % NUM_SHARDS
    record = make_record(identity.peer_id, num_pings=MAX_PINGS).encode()
    values = {
        shard_key(MODEL, shard_of(identity.peer_id)): record,
        _key("a model", shard): entry,
        _list_key(shard): entry,
    }
    for key, payload in values.items():
        key_id, expires_at, subkey = DHTID.generate(source=key), time.time() + CATALOG_TTL_S, identity.peer_id
        unsigned = DHTRecord(
            key_id.to_bytes(), MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(payload), expires_at
        )
        value = SignedRecords(identity).sign_value(unsigned)
        for node in sorted(nodes, key=lambda it: key_id.xor_distance(_dht(it).node_id))[:NUM_COPIES]:
            _dht(node).protocol.storage.store_subkey(key_id, subkey, value, expires_at)


def _stored(nodes: Sequence[Node], num_records: int) -> tuple[float, float]:
    """Bytes of one record in an answer, and copies that there are of it."""
    num_bytes = num_copies = 0
    for node in nodes:
        for shard in range(NUM_SHARDS):
            found = _dht(node).protocol.storage.get(DHTID.generate(source=shard_key(MODEL, shard)))
            if found is not None:
                num_bytes += len(MSGPackSerializer.dumps(found.value))
                num_copies += len(found.value)
    return num_bytes / num_copies, num_copies / num_records


def _dht(node: Node) -> Any:
    return node._dht._node


async def _timed(work: Any) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
