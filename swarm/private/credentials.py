"""The small file that lets a machine into a private swarm: an invitation, its key, and the authority's certificate.

    --credentials FILE ──load──► Credentials ──passport_for(identity)──► what a process shows to its peers

PEM, as other tools read and write it, behind a line for people and the addresses of peers to join. Whoever has the file
is the member. Where one comes from: `swarm.private.authority`.
"""

import os
import stat
import time
from dataclasses import dataclass
from functools import cached_property
from logging import getLogger
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from swarm.errors import ConfigError, PeerMisbehaved
from swarm.identity import Identity, peer_id_of
from swarm.private.certificates import (
    Member,
    Passport,
    check_time,
    make_passport,
    read_authority,
    read_invitation,
    to_der,
)

logger = getLogger(__name__)

MAX_FILE_BYTES = 16384
MAX_PEERS = 16
_PEER = "peer "


@dataclass(frozen=True)
class Credentials:
    """Who we are in a private swarm.

    Attributes:
        authority: certificate of the swarm's authority.
        invitation: what it says of us.
        key: the invitation's private key.
        peers: addresses by which to join, as the authority gave them.
    """

    authority: x509.Certificate
    invitation: x509.Certificate
    key: Ed25519PrivateKey
    peers: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Credentials":
        """Read a credentials file.

        Raises:
            ConfigError: it can't be read, or is no such file.
            InvitationExpired: it was good until some day.
        """
        path = Path(path).expanduser()
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
                is_open = bool(os.fstat(file.fileno()).st_mode & (stat.S_IRGRP | stat.S_IROTH))
        except OSError as error:
            raise ConfigError(f"credentials file {path}: {error.strerror or error}") from error
        if is_open:
            logger.warning("credentials file %s can be read by others; chmod 600 it", path)
        credentials = cls.from_bytes(data, source=f"credentials file {path}")
        check_time(credentials.member, time.time(), whose="your")
        return credentials

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "credentials") -> "Credentials":
        """Read the content of a credentials file; whether it has expired is not looked at.

        Raises:
            ConfigError: it is malformed, or its parts don't belong together.
        """
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{source} has over {MAX_FILE_BYTES} bytes, which no credentials have")
        try:
            invitation, authority = x509.load_pem_x509_certificates(data)
            key = load_pem_private_key(data[data.index(b"-----BEGIN PRIVATE KEY-----") :], password=None)
            if not isinstance(key, Ed25519PrivateKey):
                raise ConfigError(f"{source} holds a key of another kind than Ed25519")
            credentials = cls(read_authority(to_der(authority)), invitation, key, _read_peers(data))
            member = credentials.member
        except (ValueError, TypeError, UnsupportedAlgorithm, PeerMisbehaved) as error:
            raise ConfigError(
                f"{source} is none, or damaged: make another with `python -m swarm.keys invite`"
            ) from error
        if member.id != peer_id_of(key.public_key().public_bytes_raw()):
            raise ConfigError(f"{source} is damaged: its key does not belong to its invitation")
        return credentials

    def to_bytes(self) -> bytes:
        """The content of the file."""
        member = self.member
        expiry = self.invitation.not_valid_after_utc
        lines = [
            f"# Invitation into the private swarm {self.swarm}: {member}, until {expiry:%Y-%m-%d %H:%M} UTC.",
            "# Whoever has this file can act as this member.",
            *(_PEER + peer for peer in self.peers),
        ]
        return b"".join(
            (
                ("\n".join(lines) + "\n").encode(),
                self.invitation.public_bytes(Encoding.PEM),
                self.authority.public_bytes(Encoding.PEM),
                self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file that only its owner may read.

        Raises:
            OSError: when it exists already or can't be written.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.to_bytes())

    @cached_property
    def member(self) -> Member:
        """What the invitation says."""
        return read_invitation(to_der(self.invitation), self.authority_der)

    @cached_property
    def authority_der(self) -> bytes:
        """The authority's certificate: what makes this swarm another than all others."""
        return to_der(self.authority)

    @cached_property
    def swarm(self) -> str:
        """The swarm's name, for people."""
        return self.authority.subject.rfc4514_string().removeprefix("CN=")

    def passport_for(self, identity: Identity) -> Passport:
        """What a process with this identity shows to its peers."""
        return make_passport(self.invitation, self.key, identity)

    def __repr__(self) -> str:
        return f"<Credentials {self.swarm} | {self.member}>"


def _read_peers(data: bytes) -> tuple[str, ...]:
    lines = data[: data.index(b"-----BEGIN ")].decode().splitlines()
    return tuple(line.removeprefix(_PEER).strip() for line in lines if line.startswith(_PEER))[:MAX_PEERS]
