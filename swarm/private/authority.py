"""The authority of a private swarm on its owner's disk: makes the swarm, invites, revokes, and remembers whom.

    DIRECTORY/  authority.key (the secret)  authority.crt  peers.txt (where to join)  members.json  revoked.bin

    Authority.create ─► .invite(name, role) ─► Credentials ─► a file for that machine
                        .revoke(name)       ─► Revocation  ─► told to the swarm by `swarm.keys`

No peer ever needs this directory, so it can lie on a machine that is off. It knows nothing of networks.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from swarm.errors import ConfigError, InvalidRequest, PeerMisbehaved
from swarm.private.certificates import (
    Member,
    Role,
    make_authority,
    make_invitation,
    read_authority,
    read_invitation,
    to_der,
)
from swarm.private.credentials import Credentials
from swarm.private.revocations import Revocation, Revocations, decode_revocations, encode_revocations, revoke

MAX_FILE_BYTES = 16 << 20


class Invited(msgspec.Struct, frozen=True, kw_only=True):
    """One line of members.json."""

    id: str
    name: str
    role: Role
    expires_at: float

    @property
    def member(self) -> Member:
        """The same, as peers know it."""
        return Member(id=self.id, name=self.name, role=self.role, expires_at=self.expires_at)


@dataclass(frozen=True)
class Authority:
    """The owner of a private swarm.

    Attributes:
        directory: where it is kept.
        certificate: what all members know of it.
        key: the secret.
    """

    directory: Path
    certificate: x509.Certificate
    key: Ed25519PrivateKey

    @classmethod
    def create(cls, directory: Path, name: str, now: datetime, *, peers: Sequence[str] = ()) -> "Authority":
        """Make a new swarm; `peers` are the addresses by which its members will join, if they are known.

        Raises:
            ConfigError: there is one, or the directory can't be written.
            InvalidRequest: for a bad name.
        """
        key = Ed25519PrivateKey.generate()
        authority = cls(directory, make_authority(name, key, now), key)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_new(
                directory / "authority.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            )
            _write_new(directory / "authority.crt", authority.certificate.public_bytes(Encoding.PEM))
            _write_new(directory / "peers.txt", "".join(f"{peer}\n" for peer in peers).encode())
        except FileExistsError as error:
            raise ConfigError(f"{directory} holds an authority already") from error
        except OSError as error:
            raise ConfigError(f"{error.filename or directory}: {error.strerror}") from error
        return authority

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read an authority.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        try:
            certificate = x509.load_pem_x509_certificate(_read(directory / "authority.crt"))
            key = load_pem_private_key(_read(directory / "authority.key"), password=None)
            read_authority(to_der(certificate))
        except (ValueError, TypeError, UnsupportedAlgorithm, PeerMisbehaved) as error:
            raise ConfigError(f"the authority in {directory} is damaged: {error}") from error
        if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"the authority in {directory} is damaged: its key is another one's")
        return cls(directory, certificate, key)

    @property
    def peers(self) -> tuple[str, ...]:
        """Addresses by which members join."""
        return tuple(_read(self.directory / "peers.txt", default=b"").decode(errors="replace").split())

    @property
    def name(self) -> str:
        """The swarm's name."""
        return self.certificate.subject.rfc4514_string().removeprefix("CN=")

    def invite(
        self, name: str, role: Role, *, lifetime: timedelta, now: datetime, peers: Sequence[str] | None = None
    ) -> Credentials:
        """Invite a machine or a person; the credentials exist only in what is returned.

        Raises:
            InvalidRequest: a bad or taken name or lifetime.
            ConfigError: members.json can't be written.
        """
        with self._locked():
            invited = self.invited()
            revoked = self.revocations(now)
            for other in invited:
                if other.name == name and other.expires_at > now.timestamp() and revoked.find(other.member) is None:
                    raise InvalidRequest(f"{name} is invited already; revoke that first, or choose another name")
            peers = self.peers if peers is None else peers
            credentials = self.credentials(name, role, expires_at=now + lifetime, now=now, peers=peers)
            member = credentials.member
            entry = Invited(id=member.id, name=name, role=role, expires_at=member.expires_at)
            self._write("members.json", msgspec.json.format(msgspec.json.encode([*invited, entry])))
        return credentials

    def credentials(
        self, name: str, role: Role, *, expires_at: datetime, now: datetime, peers: Sequence[str] = ()
    ) -> Credentials:
        """Credentials that nobody is told of: for the authority's own, short visits to its swarm."""
        key = Ed25519PrivateKey.generate()
        invitation = make_invitation(
            self.certificate, self.key, key.public_key(), name=name, role=role, now=now, expires_at=expires_at
        )
        read_invitation(to_der(invitation), to_der(self.certificate))
        return Credentials(self.certificate, invitation, key, tuple(peers))

    def invited(self) -> list[Invited]:
        """Everybody who was ever invited, in order."""
        try:
            return msgspec.json.decode(_read(self.directory / "members.json", default=b"[]"), type=list[Invited])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{self.directory / 'members.json'} is damaged: {error}") from error

    def revoke(self, name: str, now: datetime) -> list[Revocation]:
        """Take back every invitation of this name or id that is still good, or with which one could revoke others.

        An admin's statements outlive its invitation, so one that has expired is revoked to make them void.

        Raises:
            InvalidRequest: nobody of this name was invited, or all of them have expired anyway, or there is no room.
        """
        members = [entry.member for entry in self.invited() if name in (entry.name, entry.id)]
        if not members:
            known = ", ".join(sorted({entry.name for entry in self.invited()})) or "nobody"
            raise InvalidRequest(f"nobody called {name!r} was invited; there are: {known}")
        at, authority = now.timestamp(), to_der(self.certificate)
        wanted = [it for it in members if it.expires_at > at or it.role.may_revoke]
        if not wanted:
            raise InvalidRequest(f"{name} need not be revoked: the invitation has expired")
        with self._locked():
            revocations = self.revocations(now)
            revocations.add((revoke(it, authority, self.key, at) for it in wanted), at)
            statements = [revocations.find(it) for it in wanted]
            if None in statements:
                raise InvalidRequest(f"no room to revoke {name}: {len(revocations)} statements are in force")
            self._write("revoked.bin", encode_revocations(revocations))
        return [entry for entry in statements if entry is not None]

    def revocations(self, now: datetime) -> Revocations:
        """Everybody whom the authority has revoked."""
        revocations = Revocations(to_der(self.certificate))
        try:
            entries = decode_revocations(_read(self.directory / "revoked.bin", default=encode_revocations(())))
            revocations.add(entries, now.timestamp())
        except PeerMisbehaved as error:
            raise ConfigError(f"{self.directory / 'revoked.bin'} is damaged: {error}") from error
        return revocations

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the directory: what two commands write at a time would lose one of them."""
        try:
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"{self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.directory / f".{name}.new"
        try:
            temporary.unlink(missing_ok=True)
            _write_new(temporary, data)
            temporary.replace(self.directory / name)
        except OSError as error:
            raise ConfigError(f"{temporary}: {error.strerror}") from error


def utc_now() -> datetime:
    """The time, to the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def _read(path: Path, *, default: bytes | None = None) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        if default is not None:
            return default
        raise ConfigError(f"{path.parent} holds no authority; make one with `python -m swarm.keys new NAME`") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
