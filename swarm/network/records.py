"""What may be stored in the DHT: values signed by the peer whose id is their subkey, small and short-lived.

Every node applies this to what others ask it to store and to what others answer, so a peer can neither overwrite
another's record, nor replay it under another key or with another expiry, nor make readers choke on malformed bytes.
hivemind calls `validate` for every entry of every answer; verdicts are cached, because an Ed25519 check costs 0.1 ms.

    value in the DHT = packed | signature
        packed    = msgpack bin(payload)
        signature = Ed25519(domain | key id | len(subkey) | subkey | expiry | packed), 64 bytes
"""

import math
import struct
import time
from hashlib import blake2b
from typing import Any

from swarm.identity import MAX_PEER_ID_CHARS, SIGNATURE_BYTES, Identity, verify
from swarm.network.hive import DHTLocalStorage, RecordValidatorBase

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
        return bytes(record.value) + self._identity.sign(_signed_bytes(record, record.value))

    def strip_value(self, record: Any) -> bytes:
        """The value without its signature."""
        return bytes(record.value[:-SIGNATURE_BYTES])

    def validate(self, record: Any) -> bool:
        """Whether a record may be stored or believed. Never raises, whatever the record holds."""
        owner = _owner(record.subkey)
        if (
            owner is None
            or not _is_packed_bytes(record.value[:-SIGNATURE_BYTES])
            or not _is_expiry(record.expiration_time)
        ):
            return False
        signed = _signed_bytes(record, record.value[:-SIGNATURE_BYTES])
        signature = bytes(record.value[-SIGNATURE_BYTES:])
        digest = blake2b(signed + signature, digest_size=16).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = self._verdicts[digest] = verify(owner, signed, signature)
            if len(self._verdicts) > _MAX_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]
        return verdict

    def merge_with(self, other: Any) -> bool:
        """Two of us are one of us."""
        return isinstance(other, SignedRecords)


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage with a limit on the peers under one key."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Store one peer's value; a newcomer is refused where the key is full."""
        found = self.get(key)
        is_shared = found is not None and not isinstance(found.value, bytes)
        if is_shared and subkey not in found.value and len(found.value) >= MAX_SUBKEYS:
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


def _owner(subkey: bytes) -> str | None:
    """The peer id that a subkey (a msgpack string of 32 to 64 characters) names, or None."""
    if len(subkey) < 3 or subkey[0] != 0xD9 or subkey[1] != len(subkey) - 2 or subkey[1] > MAX_PEER_ID_CHARS:
        return None
    return subkey[2:].decode("ascii", errors="replace")


def _is_packed_bytes(value: bytes) -> bool:
    """Whether `value` is exactly one msgpack byte string within the size limit."""
    if len(value) >= 2 and value[0] == 0xC4:
        return value[1] == len(value) - 2
    if len(value) >= 3 and value[0] == 0xC5:
        return int.from_bytes(value[1:3], "big") == len(value) - 3 <= MAX_PAYLOAD_BYTES
    return False


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
