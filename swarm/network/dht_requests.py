"""What strangers may ask of our DHT node, and in what portions it is done.

hivemind handles a request in one go: 4 MiB of records would hold the loop, and everything else that this process does,
for eight seconds of checking signatures. Here a request is refused when it is larger than its kind needs, and a store
is taken apart into portions between which others have their turn.

    request ──check_size──► store_in_portions ──some records──► hivemind's rpc_store ──► one verdict per key
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Any

from swarm.errors import PeerMisbehaved
from swarm.network.hive import DictionaryDHTValue, MSGPackSerializer, dht_pb2

MAX_REQUEST_BYTES = {"rpc_ping": 1 << 10, "rpc_find": 1 << 11, "rpc_store": 4 << 20}
"""Largest request of each kind: each key of a find costs us a search; a store may hand over all that a node holds."""
PORTION = 32
"""Records that are checked before others have their turn: 10 ms."""

Entry = tuple[int, bytes, bytes, bytes, float, bool]
"""Which key of the request, then key, subkey, value, expiry and whether it is for the cache."""


def check_size(name: str, request: Any) -> None:
    """Refuse a request that is too large for its kind.

    Raises:
        PeerMisbehaved: with both sizes.
    """
    limit = MAX_REQUEST_BYTES[name.rpartition(".")[2]]
    if request.ByteSize() > limit:
        raise PeerMisbehaved(f"{name} of {request.ByteSize()} bytes, limit {limit}")


async def store_in_portions(request: Any, store: Callable[[Any], Awaitable[Any]], *, dictionary_tag: bytes) -> Any:
    """Store what is asked, a portion at a time.

    Args:
        request: hivemind's StoreRequest.
        store: stores a small one.
        dictionary_tag: subkey that says that a value is a dictionary of values by subkey.

    Raises:
        PeerMisbehaved: the request's lists don't belong together.
    """
    num_keys = len(request.keys)
    if {len(request.subkeys), len(request.values), len(request.expiration_time), len(request.in_cache)} != {num_keys}:
        raise PeerMisbehaved(f"a store of {num_keys} keys with other numbers of values")
    verdicts = [True] * num_keys
    response = dht_pb2.StoreResponse()
    entries = _entries(request, dictionary_tag, verdicts)
    while portion := list(islice(entries, PORTION)):
        numbers, keys, subkeys, values, expiries, in_cache = zip(*portion, strict=True)
        part = dht_pb2.StoreRequest(
            keys=keys, subkeys=subkeys, values=values, expiration_time=expiries, in_cache=in_cache, peer=request.peer
        )
        answer = await store(part)
        response.peer.CopyFrom(answer.peer)
        for number, is_stored in zip(numbers, answer.store_ok, strict=True):
            verdicts[number] &= is_stored
        request.ClearField("peer")  # that the peer takes part is noted once
        await asyncio.sleep(0)
    response.store_ok.extend(verdicts)
    return response


def _entries(request: Any, dictionary_tag: bytes, verdicts: list[bool]) -> Iterator[Entry]:
    """Every single record; a dictionary that can't be read is refused in `verdicts`."""
    columns = (request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache)
    for number, (key, subkey, value, expiry, in_cache) in enumerate(zip(*columns, strict=True)):
        if subkey != dictionary_tag:
            yield number, key, subkey, value, expiry, in_cache
            continue
        found = _read_dictionary(value)
        verdicts[number] = found is not None
        for name, item in found.data.items() if found is not None else ():
            yield number, key, MSGPackSerializer.dumps(name), item.value, item.expiration_time, in_cache


def _read_dictionary(value: bytes) -> Any:
    """A dictionary of values, or None."""
    try:
        found = MSGPackSerializer.loads(value)
    except Exception:  # noqa: BLE001 - msgpack and hivemind's own types raise whatever they like
        return None
    if not isinstance(found, DictionaryDHTValue):
        return None
    is_sound = all(
        isinstance(name, str) and isinstance(item.value, bytes) and isinstance(item.expiration_time, float)
        for name, item in found.data.items()
    )
    return found if is_sound else None
