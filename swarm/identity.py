"""Who a peer is: an Ed25519 key in libp2p's own file format, and the peer id that is derived from it.

The peer id of an Ed25519 key contains the public key itself, so whoever knows a peer's id can check its signatures
without any directory. This module knows nothing of networks or of what is signed.

    file --load--> Identity --peer_id--> announced to everyone
                       |--sign--> 64 bytes --verify(peer_id, ...)--> bool, at any peer

Formats: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md (protobuf keys, identity multihash,
base58btc).
"""

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.errors import ConfigError

SIGNATURE_BYTES = 64
KEY_BYTES = 32
"""A raw public key."""
MAX_PEER_ID_CHARS = 64
"""An Ed25519 peer id has 52 characters, an RSA one 46."""

_PRIVATE_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])  # PrivateKey{key_type: Ed25519, data: 64 bytes}
_PUBLIC_PREFIX = bytes([0x08, 0x01, 0x12, 0x20])  # PublicKey{key_type: Ed25519, data: 32 bytes}
_MULTIHASH_PREFIX = bytes([0x00, 0x24])  # identity hash of 36 bytes
_MAX_FILE_BYTES = 16384


@dataclass(frozen=True)
class Identity:
    """A private Ed25519 key and what follows from it."""

    key: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> "Identity":
        """A new random identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> "Identity":
        """Read the identity file at `path`; where there is none, write a new one (mode 0600).

        Raises:
            ConfigError: when the file can't be read or written, or is no Ed25519 identity.
        """
        path = Path(path).expanduser()
        try:
            if not path.exists():
                identity = cls.generate()
                identity.save(path)
                return identity
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES)
        except FileExistsError:
            return cls.load_or_create(path)  # another process made it just now
        except OSError as error:
            raise ConfigError(f"identity file {path}: {error.strerror or error}") from error
        return cls.from_bytes(data, source=f"identity file {path}")

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "identity") -> "Identity":
        """Read libp2p's protobuf of a private key.

        Raises:
            ConfigError: when it is malformed, of another key type, or its two halves don't belong together.
        """
        if data[:2] == b"\x08\x00":
            raise ConfigError(f"{source} holds an RSA key; swarm needs Ed25519 (delete the file to get a new identity)")
        if len(data) != 68 or not data.startswith(_PRIVATE_PREFIX):
            raise ConfigError(f"{source} is not an Ed25519 key in libp2p's format: {len(data)} bytes, expected 68")
        identity = cls(Ed25519PrivateKey.from_private_bytes(data[4:36]))
        if identity.public_bytes != data[36:]:
            raise ConfigError(f"{source} is damaged: its public key does not belong to its private key")
        return identity

    def to_bytes(self) -> bytes:
        """libp2p's protobuf of the private key (68 bytes)."""
        return _PRIVATE_PREFIX + self.key.private_bytes_raw() + self.public_bytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new identity file that only its owner may read.

        Raises:
            OSError: when it exists already or can't be written.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.to_bytes())

    @cached_property
    def public_bytes(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    @cached_property
    def peer_id(self) -> str:
        """The base58 peer id, "12D3KooW...", as libp2p derives it."""
        return peer_id_of(self.public_bytes)

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        return self.key.sign(data)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"


def peer_id_of(public_bytes: bytes) -> str:
    """The peer id of a raw Ed25519 public key."""
    return base58.b58encode(_MULTIHASH_PREFIX + _PUBLIC_PREFIX + public_bytes).decode()


def key_of(peer_id: str) -> bytes:
    """The raw public key inside a peer id.

    Raises:
        ValueError: where there is none.
    """
    public_key = _public_key(peer_id)
    if public_key is None:
        raise ValueError(f"{peer_id!r} is not the id of an Ed25519 identity")
    return public_key.public_bytes_raw()


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is the peer's signature of `data`; False for ids that don't hold an Ed25519 key."""
    public_key = _public_key(peer_id)
    if public_key is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        public_key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def is_peer_id(text: str) -> bool:
    """Whether `text` is the base58 id of an Ed25519 identity."""
    return _public_key(text) is not None


@lru_cache(maxsize=4096)
def _public_key(peer_id: str) -> Ed25519PublicKey | None:
    """The key inside a base58 peer id, or None where there is none."""
    if len(peer_id) > MAX_PEER_ID_CHARS:
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    prefix = _MULTIHASH_PREFIX + _PUBLIC_PREFIX
    if len(raw) != len(prefix) + 32 or not raw.startswith(prefix):
        return None
    public_bytes = raw[len(prefix) :]
    if peer_id_of(public_bytes) != peer_id:  # base58 reads white space behind it, too: one peer has one id
        return None
    return Ed25519PublicKey.from_public_bytes(public_bytes)
