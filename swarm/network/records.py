"""What may be stored in the DHT: values signed by the peer whose id is their subkey, small and short-lived.

Every node applies this to what others ask it to store and to what others answer, so a peer can neither overwrite
another's record, nor replay it under another key or with another expiry, nor make readers choke on malformed bytes.
hivemind calls `validate` for every entry of every answer; verdicts are cached, because an Ed25519 check costs 0.1 ms.

    value in the DHT = packed | proof | signature
        packed    = msgpack bin(payload)
        proof     = nothing; in a private swarm the passport of the signer
        signature = Ed25519(domain | key id | len(subkey) | subkey | expiry | packed | proof), 64 bytes
"""

import math
import struct
import time
from collections.abc import Callable
from hashlib import blake2b
from heapq import heapify
from typing import Any

from swarm.errors import SwarmError
from swarm.identity import MAX_PEER_ID_CHARS, SIGNATURE_BYTES, Identity, verify
from swarm.network.hive import DHTLocalStorage, DHTRecord, MSGPackSerializer, RecordValidatorBase
from swarm.private.certificates import Passport
from swarm.private.gate import Gate

MAX_PAYLOAD_BYTES = 1024
MAX_LIFETIME_S = 3600.0
"""Records expire at most this far in the future (and a minute, for clocks that differ)."""
MAX_KEYS = 16384
"""Keys stored by one node."""
MAX_SUBKEYS = 2048
"""Peers per key, so that an answer stays below the 4 MiB that break a find call."""

_DOMAIN = b"swarm dht record 1"
_MAX_VERDICTS = 65536


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's validator hook: signs our own records, checks everybody's.

    Args:
        identity: signs what this node stores.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._verdicts: dict[bytes, bool] = {}

    def sign_value(self, record: Any) -> bytes:
        """The value of our own record with its signature behind it."""
        body = bytes(record.value) + self.proof
        return body + self._identity.sign(_signed_bytes(record, body))

    def strip_value(self, record: Any) -> bytes:
        """The value without what proves it."""
        return bytes(record.value[: _packed_length(record.value)])

    def validate(self, record: Any) -> bool:
        """Whether a record may be stored or believed. Never raises, whatever the record holds."""
        owner = _owner(record.subkey)
        body, signature = bytes(record.value[:-SIGNATURE_BYTES]), bytes(record.value[-SIGNATURE_BYTES:])
        if owner is None or not _is_expiry(record.expiration_time):
            return False
        length = _packed_length(body)
        if not 0 < length <= len(body) or not self.is_proof(body[length:], owner):
            return False
        signed = _signed_bytes(record, body)
        digest = blake2b(signed + signature, digest_size=16).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = self._verdicts[digest] = verify(owner, signed, signature)
            if len(self._verdicts) > _MAX_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]
        return verdict

    @property
    def proof(self) -> bytes:
        """What stands between our own values and their signatures: nothing, the peer id proves itself."""
        return b""

    def is_proof(self, data: bytes, owner: str) -> bool:
        """Whether what stands there shows that `owner` may store records."""
        return not data

    def merge_with(self, other: Any) -> bool:
        """Two of us are one of us."""
        return isinstance(other, SignedRecords)


class MemberRecords(SignedRecords):
    """The same in a private swarm: each record shows the passport of its owner, whose role must be to serve.

    So what a client, a stranger, or somebody who was thrown out has stored does not exist, whoever hands it on.

    Args:
        identity: signs what this node stores.
        gate: knows the members.
    """

    def __init__(self, identity: Identity, gate: Gate) -> None:
        super().__init__(identity)
        self._gate = gate

    @property
    def proof(self) -> bytes:
        """Our passport: two lengths (2 bytes each) and certificates."""
        passport = self._gate.passport
        return b"".join(len(part).to_bytes(2, "big") + part for part in (passport.process, passport.invitation))

    def is_proof(self, data: bytes, owner: str) -> bool:
        """Whether it is the owner's passport, and good at this moment."""
        middle = 2 + int.from_bytes(data[:2], "big")
        process, invitation = data[2:middle], data[middle + 2 :]
        if len(data) != middle + 2 + int.from_bytes(data[middle : middle + 2], "big"):
            return False
        try:
            proven = self._gate.admit(Passport(process=process, invitation=invitation), time.time())
        except SwarmError:
            return False
        return proven.peer_id == owner and proven.member.role.may_announce


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage with a limit on the peers under one key, and on what it remembers of values it replaced."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Store one peer's value; a newcomer is refused where the key is full."""
        found = self.get(key)
        if found is not None and not isinstance(found.value, bytes):
            known = found.value.data.get(subkey)
            if known is not None and known.expiration_time >= expiration_time:
                return False
            if known is None and len(found.value) >= MAX_SUBKEYS:
                return False
            _compact(found.value)
        _compact(self)
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def has_other_than(self, subkey: Any) -> bool:
        """Whether there are values under other subkeys."""
        values = (value for _, (value, _) in self.items() if not isinstance(value, bytes))
        return any(other != subkey for value in values for other, _ in value.items())

    def drop_invalid(self, validate: Callable[[Any], bool]) -> None:
        """Drop values that don't pass `validate` any more."""
        for key, (values, _) in self.items():
            keep_valid(key.to_bytes(), values, validate)


def keep_valid(key: bytes, values: Any, validate: Callable[[Any], bool]) -> None:
    """Drop values of a key that don't pass `validate`, and keep all others."""
    for subkey, (value, expiration_time) in list(values.items()):
        if not validate(DHTRecord(key, MSGPackSerializer.dumps(subkey), value, expiration_time)):
            del values.data[subkey], values.key_to_heap[subkey]


def _compact(storage: Any) -> None:
    """hivemind's storages keep an entry for every value that was ever replaced, until that one would have expired."""
    if len(storage.expiration_heap) > 2 * len(storage.data) + 64:
        storage.expiration_heap[:] = storage.key_to_heap.values()
        heapify(storage.expiration_heap)


def _owner(subkey: bytes) -> str | None:
    """The peer id that a subkey (a msgpack string of 32 to 64 characters) names, or None."""
    if len(subkey) < 3 or subkey[0] != 0xD9 or subkey[1] != len(subkey) - 2 or subkey[1] > MAX_PEER_ID_CHARS:
        return None
    return subkey[2:].decode("ascii", errors="replace")


def _packed_length(value: bytes) -> int:
    """Bytes of the msgpack byte string within the size limit with which `value` begins, 0 where it does not."""
    if len(value) >= 2 and value[0] == 0xC4:
        return 2 + value[1]
    if len(value) >= 3 and value[0] == 0xC5 and (size := int.from_bytes(value[1:3], "big")) <= MAX_PAYLOAD_BYTES:
        return 3 + size
    return 0


def _is_expiry(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value <= time.time() + MAX_LIFETIME_S + 60


def _signed_bytes(record: Any, value: bytes) -> bytes:
    return b"".join(
        (
            _DOMAIN,
            record.key,
            len(record.subkey).to_bytes(2, "big"),
            record.subkey,
            struct.pack(">d", record.expiration_time),
            value,
        )
    )
