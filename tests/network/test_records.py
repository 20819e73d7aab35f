"""What the DHT stores and believes: records signed by the peer that their subkey names, for that key and expiry."""

import time
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.identity import Identity
from swarm.network.hive import DHTID, DHTRecord
from swarm.network.records import MAX_LIFETIME_S, MAX_PAYLOAD_BYTES, MAX_SUBKEYS, BoundedStorage, SignedRecords

OWNER = Identity.generate()
VALIDATOR = SignedRecords(OWNER)
KEY = DHTID.generate(source="key").to_bytes()


def make_record(payload: Any = b"payload", *, owner: str = OWNER.peer_id, expires_in_s: float = 60.0) -> Any:
    """A record as hivemind hands it to the validator, signed by OWNER."""
    packed, subkey = msgpack.packb(payload, use_bin_type=True), msgpack.packb(owner)
    record = DHTRecord(KEY, subkey, packed, time.time() + expires_in_s)
    return replace(record, value=VALIDATOR.sign_value(record))


@given(st.binary(max_size=MAX_PAYLOAD_BYTES))
def test_a_signed_record_is_valid_and_stripped_to_its_payload(payload: bytes):
    """What we sign is accepted, by us and by others, and comes out as it went in."""
    record = make_record(payload)
    assert SignedRecords(Identity.generate()).validate(record)
    assert msgpack.unpackb(VALIDATOR.strip_value(record)) == payload


@pytest.mark.parametrize(
    "change",
    [
        {"key": DHTID.generate(source="other key").to_bytes()},
        {"subkey": msgpack.packb(Identity.generate().peer_id)},
        {"expiration_time": time.time() + 61.0},
        {"subkey": msgpack.packb("nobody")},
        {"subkey": msgpack.packb(None)},
        {"subkey": b""},
        {"value": b""},
        {"value": b"\xc4\x01a" + bytes(64)},
        {"expiration_time": float("nan")},
        {"expiration_time": float("inf")},
        {"expiration_time": "soon"},
    ],
)
def test_a_record_moved_or_changed_is_refused(change: dict[str, Any]):
    """A signature holds for one key, subkey, expiry and value."""
    record = make_record()
    assert VALIDATOR.validate(record)
    assert not VALIDATOR.validate(replace(record, **change))


@pytest.mark.parametrize("payload", ["text", 7, None, [b"list"], bytes(MAX_PAYLOAD_BYTES + 1)])
def test_only_small_byte_strings_are_stored(payload: Any):
    """A signed value that is not one byte string of at most 1 KiB would upset readers, so nobody takes it."""
    assert not VALIDATOR.validate(make_record(payload))


def test_a_record_that_lives_too_long_is_refused():
    """The expiry bounds how long a dead peer is remembered."""
    assert VALIDATOR.validate(make_record(expires_in_s=MAX_LIFETIME_S))
    assert not VALIDATOR.validate(make_record(expires_in_s=MAX_LIFETIME_S + 120))


@given(st.binary(max_size=100), st.binary(max_size=200), st.floats())
def test_no_record_breaks_the_validator(subkey: bytes, value: bytes, expiration_time: float):
    """Any subkey, value and expiry is judged, and nothing is raised."""
    assert not VALIDATOR.validate(DHTRecord(KEY, subkey, value, expiration_time))


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch):
    """The second look at a record does not verify its signature again."""
    validator, record = SignedRecords(OWNER), make_record()
    assert validator.validate(record)
    monkeypatch.setattr("swarm.network.records.verify", lambda *_: pytest.fail("verified twice"))
    assert validator.validate(record)


def test_a_key_has_room_for_so_many_peers():
    """A full key takes no new subkeys, and still updates those that it has."""
    storage, key, expires_at = BoundedStorage(), DHTID.generate(source="key"), time.time() + 60
    for index in range(MAX_SUBKEYS):
        assert storage.store_subkey(key, str(index), b"value", expires_at)
    assert not storage.store_subkey(key, "one too many", b"value", expires_at)
    assert storage.store_subkey(key, "0", b"newer", expires_at + 1)
