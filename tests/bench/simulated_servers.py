"""Servers without blocks for bench_health: `python -m simulated_servers ADDRESS COUNT` or `... records COUNT`.

    COUNT peers with node, transport, records and an answer to Info; or one DHT node that holds COUNT records
    whose servers are nowhere, signed by an identity each

Prints READY and an address when all is announced, and lives until it is stopped.
"""

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import common  # noqa: F401 - lets us import tests
import msgspec
import uvloop

from swarm.catalog import ModelEntry, _list_key, announce_model
from swarm.identity import Identity
from swarm.network import Node, NodeConfig
from swarm.network.records import SignedRecords
from swarm.protocol import INFO_SERVICE
from swarm.registry import Registry, ServerRecord, shard_key, shard_of
from swarm.transport import Stream, Transport
from tests.health.fakes import DIGEST, make_entry, make_info, make_record

NUM_BLOCKS = 32
SPAN = 8


def main() -> None:
    """Run what the command line says."""
    kind, count = sys.argv[1], int(sys.argv[2])
    uvloop.run(hold_records(count) if kind == "records" else be_servers(kind, count))


async def be_servers(address: str, count: int) -> None:
    """`count` peers that announce themselves and answer."""
    async with AsyncExitStack() as stack:
        for first in range(0, count, 8):
            started = await asyncio.gather(*(_start(address) for _ in range(first, min(first + 8, count))))
            for number, node in enumerate(started, first):
                stack.push_async_callback(node.close)
                await _serve(stack, node, number)
        print(f"READY {address}", flush=True)
        await asyncio.Event().wait()


async def hold_records(count: int) -> None:
    """One DHT node, whose storage has `count` servers' records as if they had stored them."""
    async with await Node.start(NodeConfig(host="127.0.0.1")) as node:
        storage: Any = node._dht._node.protocol.storage
        entry = make_entry(NUM_BLOCKS)
        for number in range(count):
            identity = Identity.generate()
            record = _record(identity.peer_id, number)
            _put(storage, identity, shard_key(DIGEST, shard_of(identity.peer_id)), record.encode())
            _put(storage, identity, _list_key(number % 16), msgspec.msgpack.encode(entry))
        print(f"READY {node.addresses[0]}", flush=True)
        await asyncio.Event().wait()


async def _start(address: str) -> Node:
    return await Node.start(NodeConfig(host="127.0.0.1", initial_peers=(address,)))


async def _serve(stack: AsyncExitStack, node: Node, number: int) -> None:
    transport = Transport(node, listen=("127.0.0.1", 0))
    await stack.enter_async_context(transport)
    record = _record(node.peer_id, number)

    async def answer(stream: Stream) -> None:
        await stream.receive()
        await stream.send(make_info(record))

    transport.serve(INFO_SERVICE, answer)
    await Registry(node).announce(record, 600.0)
    await announce_model(node, ModelEntry(digest=DIGEST, name="simulated", num_blocks=NUM_BLOCKS))


def _record(peer_id: str, number: int) -> ServerRecord:
    start = number * 5 % (NUM_BLOCKS - SPAN + 1)
    name = f"server-{number}"
    return make_record(
        peer_id, f"{start}:{start + SPAN}", public_name=name, period_s=200.0, expires_at=time.time() + 600
    )


def _put(storage: Any, identity: Identity, key: str, payload: bytes) -> None:
    """Store a value as its owner would have, through the same checks and signatures."""
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils import MSGPackSerializer

    key_id, expires_at = DHTID.generate(source=key), time.time() + 600
    records = SignedRecords(identity)
    subkey = MSGPackSerializer.dumps(identity.peer_id)
    record = DHTRecord(key_id.to_bytes(), subkey, MSGPackSerializer.dumps(payload), expires_at)
    signed = DHTRecord(record.key, subkey, records.sign_value(record), expires_at)
    assert records.validate(signed)
    assert storage.store_subkey(key_id, identity.peer_id, signed.value, expires_at)


if __name__ == "__main__":
    main()
