"""Requests to the DHT: refused when too large, and a store in portions is the same store."""

import asyncio
import os
import time
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerMisbehaved
from swarm.identity import Identity
from swarm.network.dht_requests import PORTION, check_size, store_in_portions
from swarm.network.hive import DHTProtocol, DHTRecord, DictionaryDHTValue, MSGPackSerializer, dht_pb2
from swarm.network.records import SignedRecords
from tests.fuzz.dht import DhtHandlers

TAG = DHTProtocol.IS_DICTIONARY
OWNER = Identity.generate()
SUBKEY = msgpack.packb(OWNER.peer_id)


class Store:
    """Takes what hivemind would, and remembers in what portions it came."""

    def __init__(self) -> None:
        self.portions: list[int] = []
        self.taken: list[tuple[bytes, bytes, bytes]] = []

    async def __call__(self, request: Any) -> Any:
        self.portions.append(len(request.keys))
        self.taken += zip(request.keys, request.subkeys, request.values, strict=True)
        return dht_pb2.StoreResponse(store_ok=[value != b"bad" for value in request.values])


def request_of(*entries: tuple[bytes, bytes, bytes]) -> Any:
    """A store of these keys, subkeys and values."""
    return dht_pb2.StoreRequest(
        keys=[key for key, _, _ in entries],
        subkeys=[subkey for _, subkey, _ in entries],
        values=[value for _, _, value in entries],
        expiration_time=[2e9] * len(entries),
        in_cache=[False] * len(entries),
    )


def dictionary(*values: bytes) -> bytes:
    """Values under several subkeys in one."""
    found = DictionaryDHTValue()
    for index, value in enumerate(values):
        found.store(f"peer{index}", value, 2e9)
    return bytes(MSGPackSerializer.dumps(found))


@given(st.lists(st.sampled_from([b"good", b"bad"]), max_size=3 * PORTION))
def test_each_key_gets_its_own_verdict(values: list[bytes]):
    """In order, whatever the portions; none is larger than it may be."""
    store = Store()
    request = request_of(*((bytes([index % 256]), SUBKEY, value) for index, value in enumerate(values)))
    answer = asyncio.run(store_in_portions(request, store, dictionary_tag=TAG))
    assert list(answer.store_ok) == [value == b"good" for value in values]
    assert max(store.portions, default=0) <= PORTION and sum(store.portions) == len(values)


def test_a_dictionary_is_taken_apart():
    """Its values are stored one by one under their subkeys; one bad one makes the verdict of its key bad."""
    store = Store()
    request = request_of(
        (b"a", TAG, dictionary(b"1", b"2")), (b"b", TAG, dictionary(b"1", b"bad")), (b"c", SUBKEY, b"3")
    )
    answer = asyncio.run(store_in_portions(request, store, dictionary_tag=TAG))
    assert list(answer.store_ok) == [True, False, True]
    assert (b"a", MSGPackSerializer.dumps("peer1"), b"2") in store.taken


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb({"a": 1}),
        MSGPackSerializer.dumps([1, 2]),
        b"\xc7\x00\x50",
    ],
)
def test_what_is_no_dictionary_is_refused(value: bytes):
    """And nothing else of the request suffers."""
    store = Store()
    request = request_of((b"a", TAG, value), (b"b", SUBKEY, b"good"))
    answer = asyncio.run(store_in_portions(request, store, dictionary_tag=TAG))
    assert list(answer.store_ok) == [False, True]


def test_lists_of_different_lengths_are_misbehaviour():
    """Keys without values are not guessed at."""
    request = request_of((b"a", SUBKEY, b"x"))
    request.keys.append(b"b")
    with pytest.raises(PeerMisbehaved, match="2 keys with other numbers"):
        asyncio.run(store_in_portions(request, Store(), dictionary_tag=TAG))


def test_a_request_too_large_for_its_kind_is_refused():
    """A find of many keys would cost a search for each."""
    check_size("DHTProtocol.rpc_find", dht_pb2.FindRequest(keys=[bytes(20)] * 64))
    with pytest.raises(PeerMisbehaved, match="limit 2048"):
        check_size("DHTProtocol.rpc_find", dht_pb2.FindRequest(keys=[bytes(20)] * 128))


def test_others_have_their_turn_during_a_large_store():
    """A thousand real records: the loop is never held for more than a portion of them."""
    validator, handlers = SignedRecords(OWNER), DhtHandlers(OWNER)
    expiry = time.time() + 60
    entries = []
    for _ in range(10 * PORTION):
        record = DHTRecord(os.urandom(20), SUBKEY, msgpack.packb(b"x"), expiry)
        entries.append((record.key, SUBKEY, validator.sign_value(record)))
    request = request_of(*entries)
    request.expiration_time[:] = [expiry] * len(entries)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = handlers._loop.create_task(count())
    (number,) = (index for index, name in enumerate(handlers._names) if name.endswith("rpc_store"))
    answer = handlers.call(number, request.SerializeToString())
    counting.cancel()
    handlers.close()
    assert answer is not None and all(dht_pb2.StoreResponse.FromString(answer).store_ok)
    assert turns > 10
