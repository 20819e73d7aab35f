"""The X.509 certificates of a private swarm: who vouches for whom, and what a chain of them proves.

    authority (self-signed) ──signs──► invitation: name, role, expiry ──signs──► passport: the peer id of one process

An invitation's key makes passports, so one file serves any number of processes, each with a peer id of its own, and
TLS libraries check the chain by themselves. All keys are Ed25519, which makes the peer id a form of a passport's key.
What TLS does not look at is checked here: names, roles, extensions. Pure: no files, no sockets; the time comes in.
"""

import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

from swarm.errors import InvalidRequest, InvitationExpired, PeerMisbehaved
from swarm.identity import Identity, peer_id_of

MAX_CERTIFICATE_BYTES = 512
"""Those that are made here have about 270."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
"""Of a swarm or a member."""
CLOCK_SKEW = timedelta(days=1)
"""Certificates are valid from so long before they were made: clocks differ."""
AUTHORITY_LIFETIME = timedelta(days=20 * 365)
_PROCESS = "process"
"""Subject of every passport: its key says which process, and each byte here is in every record."""


class Role(StrEnum):
    """What a member may do besides using the swarm."""

    CLIENT = "client"
    """Reads records and opens sessions."""
    SERVER = "server"
    """Stores and announces records, too."""
    ADMIN = "admin"
    """Revokes the invitations of clients and servers, too."""

    @property
    def may_announce(self) -> bool:
        """Whether its records are stored and believed."""
        return self is not Role.CLIENT

    @property
    def may_revoke(self) -> bool:
        """Whether others believe its revocations."""
        return self is Role.ADMIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What an invitation says.

    Attributes:
        id: the invitation's key, in the form of a peer id.
        name: for people.
        role: what it may do.
        expires_at: unix time after which it is void.
    """

    id: str
    name: str
    role: Role
    expires_at: float

    def __str__(self) -> str:
        return f"{self.name} ({self.role})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """Proof that a peer belongs to a swarm: two certificates in DER, which anybody may see."""

    process: bytes
    invitation: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """A passport that was checked: which peer, and whose process it is; the invitation is in DER."""

    peer_id: str
    member: Member
    invitation: bytes


def make_authority(name: str, key: Ed25519PrivateKey, now: datetime) -> x509.Certificate:
    """The self-signed certificate of a new swarm.

    Raises:
        InvalidRequest: for a bad name.
    """
    subject = _subject(name)
    return _make(subject, key.public_key(), subject, key, now - CLOCK_SKEW, now + AUTHORITY_LIFETIME, authority_depth=1)


def make_invitation(
    authority: x509.Certificate,
    authority_key: Ed25519PrivateKey,
    public_key: Ed25519PublicKey,
    *,
    name: str,
    role: Role,
    now: datetime,
    expires_at: datetime,
) -> x509.Certificate:
    """An invitation into the authority's swarm for the owner of `public_key`.

    Raises:
        InvalidRequest: for a bad name, or an expiry that is past or after the authority's own.
    """
    if not now < expires_at <= authority.not_valid_after_utc:
        latest = authority.not_valid_after_utc
        raise InvalidRequest(f"an invitation can't expire at {expires_at:%F %T}; it is {now:%F %T}, latest {latest:%F}")
    subject = _subject(name, role)
    return _make(subject, public_key, authority.subject, authority_key, now - CLOCK_SKEW, expires_at, authority_depth=0)


def make_passport(invitation: x509.Certificate, key: Ed25519PrivateKey, identity: Identity) -> Passport:
    """The passport of a process with this identity, made with the invitation's key; valid as long as the invitation."""
    process = _make(
        _subject(_PROCESS),
        identity.key.public_key(),
        invitation.subject,
        key,
        invitation.not_valid_before_utc,
        invitation.not_valid_after_utc,
        authority_depth=None,
    )
    return Passport(process=to_der(process), invitation=to_der(invitation))


def to_der(certificate: x509.Certificate) -> bytes:
    """The certificate's bytes."""
    return certificate.public_bytes(Encoding.DER)


def read_authority(data: bytes) -> x509.Certificate:
    """Read an authority's certificate.

    Raises:
        PeerMisbehaved: when it is none.
    """
    certificate = _parse(data)
    _check(certificate, issuer=certificate, depth=1)
    return certificate


@lru_cache(maxsize=4096)
def read_invitation(data: bytes, authority: bytes) -> Member:
    """Read an invitation that the authority (DER) has signed; whether it has expired is not looked at.

    Raises:
        PeerMisbehaved: when it is malformed, or not signed by this authority.
    """
    certificate = _parse(data)
    _check(certificate, issuer=_parse(authority), depth=0)
    try:
        role = Role(_attribute(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME))
    except ValueError as error:
        raise PeerMisbehaved("the invitation names no role") from error
    return Member(
        id=peer_id_of(_public_bytes(certificate)),
        name=_attribute(certificate, NameOID.COMMON_NAME),
        role=role,
        expires_at=certificate.not_valid_after_utc.timestamp(),
    )


@lru_cache(maxsize=4096)
def read_passport(passport: Passport, authority: bytes) -> Proven:
    """Check both signatures of a passport; whether it has expired or was revoked is not looked at.

    Raises:
        PeerMisbehaved: when it is malformed, or proves nothing in this authority's swarm.
    """
    member = read_invitation(passport.invitation, authority)
    certificate = _parse(passport.process)
    _check(certificate, issuer=_parse(passport.invitation), depth=None)
    return Proven(peer_id=peer_id_of(_public_bytes(certificate)), member=member, invitation=passport.invitation)


def peer_id_in(process: bytes) -> str:
    """The peer id in the certificate of a process, which TLS has checked.

    Raises:
        PeerMisbehaved: there is none.
    """
    try:
        return peer_id_of(_public_bytes(_parse(process)))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerMisbehaved(f"a certificate without a readable key: {error}") from error


def check_time(member: Member, now: float, *, whose: str) -> None:
    """Refuse an invitation that has expired.

    Raises:
        InvitationExpired: naming whose it was, and since when.
    """
    if now >= member.expires_at:
        when = datetime.fromtimestamp(member.expires_at, UTC)
        raise InvitationExpired(f"{whose} invitation {member} expired on {when:%Y-%m-%d at %H:%M} UTC")


def _make(
    subject: x509.Name,
    public_key: Ed25519PublicKey,
    issuer: x509.Name,
    issuer_key: Ed25519PrivateKey,
    start: datetime,
    end: datetime,
    *,
    authority_depth: int | None,
) -> x509.Certificate:
    """Sign a certificate; `authority_depth` says how many more links may hang on it, None that it signs nothing."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(_constraints(authority_depth), critical=True)
    )
    return builder.sign(issuer_key, None)


def _check(certificate: x509.Certificate, *, issuer: x509.Certificate, depth: int | None) -> None:
    """That a certificate is of the kind that is made here, and signed by its issuer.

    Raises:
        PeerMisbehaved: it is not.
    """
    try:
        extensions = [(extension.critical, extension.value) for extension in certificate.extensions]
        if extensions != [(True, _constraints(depth))]:
            raise PeerMisbehaved("a certificate of another kind than expected")
        if not NAME.fullmatch(_attribute(certificate, NameOID.COMMON_NAME)):
            raise PeerMisbehaved("a certificate with an impossible name")
        _public_bytes(certificate)
        certificate.verify_directly_issued_by(issuer)
    except InvalidSignature as error:
        raise PeerMisbehaved("a certificate that another authority has signed") from error
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise PeerMisbehaved(f"a malformed certificate: {error}") from error


def _parse(data: bytes) -> x509.Certificate:
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise PeerMisbehaved(f"a certificate of {len(data)} bytes, limit {MAX_CERTIFICATE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CryptographyDeprecationWarning)  # what it only warns of, nobody here makes
            return x509.load_der_x509_certificate(data)
    except (ValueError, x509.InvalidVersion, CryptographyDeprecationWarning) as error:
        raise PeerMisbehaved(f"a malformed certificate: {error}") from error


def _constraints(depth: int | None) -> x509.BasicConstraints:
    return x509.BasicConstraints(ca=depth is not None, path_length=depth)


def _subject(name: str, role: Role | None = None) -> x509.Name:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"name {name!r}: need 1 to 48 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if role is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    return x509.Name(attributes)


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(oid)]
    if len(values) != 1:
        raise PeerMisbehaved(f"a certificate with {len(values)} names of a kind, need 1")
    return values[0]


def _public_bytes(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise PeerMisbehaved("a certificate whose key is not Ed25519")
    return key.public_bytes_raw()
