"""What the DHT costs: bytes per server, look-ups with 8, 32 and 64 real nodes, and traffic projected to 10,000 servers.

    python tests/bench/bench_dht.py [--nodes 8 32 64]

Every node is a real peer on loopback that announces one record, as a server does; a client that has just joined then
asks what the model's name means (as it does where it finds no server), learns who serves it, and reads all records.
Projected are the bytes that a server and a client move, by the sizes measured here and the budget of `swarm.directory`.
"""

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from common import judged, print_report

from swarm.adapters.notes import AdapterNote
from swarm.catalog import refuse_other_content
from swarm.coordinates import Place
from swarm.directory import (
    COPY_BYTES,
    NUM_COPIES,
    READ_BYTES_PER_S,
    Directory,
    shards_due,
    shards_to_begin,
)
from swarm.leases import Claim
from swarm.network import Node, NodeConfig
from swarm.registry import MAX_PINGS, NUM_SHARDS, Ping, Registry, ServerRecord, shard_of
from swarm.types import BlockRange, ServerState

MODEL = "ab" * 32
SERVERS = 10_000
PERIOD_S = 20.0
NUM_LOOKS = 10
SIGNATURE_BYTES = 66
"""What signature and packing add to a record."""
MAX_REPLY_BYTES = 4 << 20
"""hivemind refuses larger messages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 32, 64], help="sizes of the swarms")
    args = parser.parse_args()
    sizes = {
        "bare": len(make_record("p").encode()),
        "with eight pings": len(make_record("p", num_pings=MAX_PINGS).encode()),
        "with sixteen adapters as well": len(make_record("p", num_pings=MAX_PINGS, num_adapters=16).encode()),
        "claim to move": len(claim().encode()),
    }
    for name, size in sizes.items():
        print(f"{name:>30}: {size} bytes")
    rows = [asyncio.run(measure(size)) for size in args.nodes]
    print(f"{'nodes':>6}{'announce ms':>13}{'read all ms: median':>21}{'worst':>8}{'name ms':>9}{'join ms':>9}"
          f"{'searches':>10}{'found':>7}")  # fmt: skip
    for row in rows:
        print(f"{row['nodes']:6}{row['announce_ms']:13}{row['read_ms']:21}{row['worst_ms']:8}{row['name_ms']:9}"
              f"{row['join_ms']:9}{row['searches']:10}{row['found']:7}")  # fmt: skip
    projected = project(SERVERS)
    for name, value in projected.items():
        print(f"{name:>44}: {value:,.1f}")
    targets = {
        "stored_record_bytes": judged(sizes["with eight pings"] + SIGNATURE_BYTES, "<=", COPY_BYTES),
        "searches_of_a_joining_client": judged(max(row["searches"] for row in rows), "<=", 2),
        "all_found": judged(min(row["found"] / row["nodes"] for row in rows), "==", 1.0),
        "largest_key_over_a_reply_at_10000": judged(projected["largest key, kB"] * 1e3 / MAX_REPLY_BYTES, "<=", 1.0),
    }
    print_report("dht", targets, sizes=sizes, rows=rows, projected=projected)


async def measure(num_nodes: int) -> dict[str, Any]:
    """A swarm of real nodes; what announcing and reading take."""
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
        announce_s = [await _timed(_announce(node)) for node in nodes]
        config = NodeConfig(host="127.0.0.1", client_mode=True, initial_peers=tuple(first.addresses))
        client = await stack.enter_async_context(await Node.start(config))
        searches = _count_searches(client)
        name_s = await _timed(refuse_other_content(client, "a model", MODEL))
        searches.clear()
        directory = Directory(Registry(client), model=MODEL, num_blocks=32)
        join_s = await _timed(directory.refresh(max_age_s=15.0))
        num_searches = len(searches)
        read_s = [await _timed(Registry(client).lookup(MODEL)) for _ in range(NUM_LOOKS)]
    return {
        "nodes": num_nodes,
        "announce_ms": round(1e3 * statistics.median(announce_s), 1),
        "join_ms": round(1e3 * join_s, 1),
        "read_ms": round(1e3 * statistics.median(read_s), 1),
        "worst_ms": round(1e3 * max(read_s), 1),
        "name_ms": round(1e3 * name_s, 1),
        "searches": num_searches,
        "found": len(directory.records),
    }


def project(num_servers: int) -> dict[str, float]:
    """Bytes that move in a swarm of so many servers, by the budget that readers keep."""
    counts = [0] * NUM_SHARDS
    for index in range(num_servers):
        counts[shard_of(f"12D3KooW{index}")] += 1
    joining = sum(counts[shard] for shard in _begun(counts))
    round_s = max(15.0, num_servers * COPY_BYTES * NUM_COPIES / READ_BYTES_PER_S)
    return {
        "a server stores, kB/s": NUM_COPIES * COPY_BYTES / PERIOD_S / 1e3,
        "a key's holders take, kB/s": max(counts) * COPY_BYTES / PERIOD_S / 1e3,
        "largest key, kB": max(counts) * COPY_BYTES / 1e3,
        "a client reads, kB/s": num_servers * COPY_BYTES * NUM_COPIES / round_s / 1e3,
        "shards that it reads each 15 s": len(shards_due([0.0] * NUM_SHARDS, 15.0, 15.0, num_servers)),
        "a joining client knows then, servers": joining,
        "a joining client reads once, kB": joining * COPY_BYTES * NUM_COPIES / 1e3,
        "until all shards are read again, s": round_s,
    }


def _begun(counts: Sequence[int]) -> list[int]:
    """The shards that a newcomer reads at once, when they have so many records."""
    read_at, begun = [-math.inf] * NUM_SHARDS, []
    for _ in range(2):
        for shard in shards_to_begin(read_at, sum(counts[shard] for shard in begun), range(NUM_SHARDS)):
            begun.append(shard)
            read_at[shard] = 0.0
    return begun


def make_record(peer_id: str, *, num_pings: int = 0, num_adapters: int = 0) -> ServerRecord:
    """A server's record."""
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
        place=Place(position=(0.01, 0.02, 0.03), height_s=0.002, error=0.2),
        pings=tuple(Ping(tag=index, rtt_s=0.02) for index in range(num_pings)),
        quantization="int8",
        dtype="bfloat16",
        public_name="somebody",
        version="0.1.0",
        expires_at=time.time() + 3 * PERIOD_S,
        adapters=tuple(_note(index) for index in range(num_adapters)),
    )


def _note(index: int) -> AdapterNote:
    return AdapterNote.of(f"{index:064x}", 16, on_device=True)


def claim() -> Claim:
    """A server's word that it is about to move."""
    return Claim(peer_id="p", leaves=BlockRange(0, 12), takes=BlockRange(40, 52), expires_at=time.time() + 300)


async def _announce(node: Node) -> None:
    await Registry(node).announce(make_record(node.peer_id, num_pings=MAX_PINGS), 3 * PERIOD_S)


async def _timed(work: Any) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def _count_searches(node: Node) -> list[int]:
    """The number of keys of each search that a node makes from now on."""
    searches: list[int] = []
    search = node.dht_get_many

    async def counted(keys: list[str]) -> dict[str, dict[str, bytes]]:
        searches.append(len(keys))
        return await search(keys)

    node.dht_get_many = counted  # type: ignore[method-assign]
    return searches


if __name__ == "__main__":
    main()
