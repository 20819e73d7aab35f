"""What a chain of certificates proves, and everything that proves nothing."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest, InvitationExpired, PeerMisbehaved
from swarm.identity import Identity, peer_id_of
from swarm.private.certificates import (
    MAX_CERTIFICATE_BYTES,
    Member,
    Passport,
    Role,
    check_time,
    make_authority,
    make_passport,
    peer_id_in,
    read_authority,
    read_invitation,
    read_passport,
    to_der,
)
from tests.swarm.private.labs import NOW, Lab

LAB = Lab()
CREDENTIALS = LAB.invite("gpu7", Role.SERVER)
IDENTITY = Identity.generate()
PASSPORT = CREDENTIALS.passport_for(IDENTITY)


def certificate(
    issuer: x509.Name,
    issuer_key: Ed25519PrivateKey,
    *,
    extensions: list[tuple[x509.ExtensionType, bool]],
    **subject: str,
) -> bytes:
    """A certificate as somebody else might make it."""
    names = {"CN": NameOID.COMMON_NAME, "OU": NameOID.ORGANIZATIONAL_UNIT_NAME}
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(names[key], value) for key, value in subject.items()]))
        .issuer_name(issuer)
        .public_key(Ed25519PrivateKey.generate().public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return to_der(builder.sign(issuer_key, None))


def test_a_passport_proves_who_a_peer_is_and_whose_process():
    """The peer id of the process, and name, role and expiry of the member."""
    proven = read_passport(PASSPORT, LAB.der)
    assert proven.peer_id == IDENTITY.peer_id == peer_id_in(PASSPORT.process)
    member = proven.member
    assert (member.name, member.role) == ("gpu7", Role.SERVER) and str(member) == "gpu7 (server)"
    assert member.id == peer_id_of(CREDENTIALS.key.public_key().public_bytes_raw())
    assert member.expires_at == (NOW + timedelta(days=30)).timestamp()
    assert proven.invitation == PASSPORT.invitation


def test_one_invitation_makes_passports_for_many_processes():
    """Different peers, one member."""
    other = read_passport(CREDENTIALS.passport_for(Identity.generate()), LAB.der)
    first = read_passport(PASSPORT, LAB.der)
    assert other.member == first.member and other.peer_id != first.peer_id


def test_certificates_are_small():
    """Two of them are in every record, so each byte counts."""
    assert len(PASSPORT.process) < 270 and len(PASSPORT.invitation) < 290


def test_roles_differ_in_what_they_may_do():
    """A client may not announce, a server may, an admin may revoke, too."""
    assert [(role.may_announce, role.may_revoke) for role in (Role.CLIENT, Role.SERVER, Role.ADMIN)] == [
        (False, False),
        (True, False),
        (True, True),
    ]


def test_an_authority_of_the_same_name_is_another_one():
    """Names prove nothing, keys do."""
    with pytest.raises(PeerMisbehaved, match="another authority"):
        read_passport(PASSPORT, Lab().der)


def test_a_passport_must_be_signed_by_its_own_invitation():
    """Neither by another member's key, nor by the authority itself, nor may an invitation pass for a passport."""
    other = LAB.invite("gpu8")
    swapped = Passport(process=PASSPORT.process, invitation=to_der(other.invitation))
    forged = make_passport(CREDENTIALS.invitation, other.key, IDENTITY)
    invitation_alone = Passport(process=PASSPORT.invitation, invitation=PASSPORT.invitation)
    invitation_twice = Passport(process=to_der(other.invitation), invitation=PASSPORT.invitation)
    for passport in (swapped, forged, invitation_alone, invitation_twice):
        with pytest.raises(PeerMisbehaved):
            read_passport(passport, LAB.der)


def test_a_member_can_not_invite_others():
    """What an invitation's key signs is a process, whatever it claims to be: the chain ends there."""
    key = CREDENTIALS.key
    issuer = CREDENTIALS.invitation.subject
    for constraints in (
        x509.BasicConstraints(ca=True, path_length=0),
        x509.BasicConstraints(ca=False, path_length=None),
    ):
        data = certificate(issuer, key, extensions=[(constraints, True)], CN="friend", OU="admin")
        with pytest.raises(PeerMisbehaved):
            read_invitation(data, LAB.der)


@pytest.mark.parametrize(
    "subject",
    [
        {"CN": "x"},
        {"CN": "x", "OU": "god"},
        {"OU": "server"},
        {"CN": "-x", "OU": "server"},
        {"CN": "a b", "OU": "server"},
    ],
)
def test_an_invitation_without_a_proper_name_and_role_is_none(subject: dict[str, str]):
    """Even if the authority should have signed it."""
    constraints = [(x509.BasicConstraints(ca=True, path_length=0), True)]
    data = certificate(LAB.certificate.subject, LAB.key, extensions=constraints, **subject)
    with pytest.raises(PeerMisbehaved):
        read_invitation(data, LAB.der)


@pytest.mark.parametrize(
    "extensions",
    [
        [],
        [(x509.BasicConstraints(ca=True, path_length=0), False)],
        [(x509.BasicConstraints(ca=True, path_length=1), True)],
        [(x509.BasicConstraints(ca=False, path_length=None), True)],
        [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (x509.SubjectAlternativeName([x509.DNSName("x")]), False),
        ],
    ],
)
def test_a_certificate_with_other_extensions_is_of_another_kind(extensions: list[tuple[x509.ExtensionType, bool]]):
    """Exactly one extension, so that nothing can be meant that is not looked at."""
    data = certificate(LAB.certificate.subject, LAB.key, extensions=extensions, CN="x", OU="server")
    with pytest.raises(PeerMisbehaved, match="another kind"):
        read_invitation(data, LAB.der)


def test_other_kinds_of_keys_are_refused():
    """Only Ed25519 keys become peer ids."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
    with pytest.raises(PeerMisbehaved, match="not Ed25519"):
        read_authority(to_der(builder.sign(key, SHA256())))


def test_expiry_is_named_with_its_day():
    """Good until the second, then an error that says since when."""
    member = Member(id="x", name="gpu7", role=Role.SERVER, expires_at=NOW.timestamp())
    check_time(member, NOW.timestamp() - 1, whose="your")
    with pytest.raises(InvitationExpired, match=r"your invitation gpu7 \(server\) expired on 2026-11-27 at 12:00 UTC"):
        check_time(member, NOW.timestamp(), whose="your")


@pytest.mark.parametrize("days", [0, -1, 366 * 21])
def test_an_expiry_that_can_not_be_is_refused(days: float):
    """In the past, or after the authority's own."""
    with pytest.raises(InvalidRequest, match="can't expire"):
        LAB.invite(days=days)


@pytest.mark.parametrize("name", ["", "x" * 49, "a b", "ä", "-", "a/b", "a\nb"])
def test_impossible_names_are_refused(name: str):
    """They end up in file names, logs and tables."""
    with pytest.raises(InvalidRequest, match="name"):
        LAB.invite(name)
    with pytest.raises(InvalidRequest, match="name"):
        make_authority(name, LAB.key, NOW)


def test_an_oversized_certificate_is_not_parsed():
    """The size is looked at first."""
    with pytest.raises(PeerMisbehaved, match=f"limit {MAX_CERTIFICATE_BYTES}"):
        read_invitation(bytes(MAX_CERTIFICATE_BYTES + 1), LAB.der)


@given(st.integers(0, 600), st.integers(0, 600), st.binary(min_size=1, max_size=8))
def test_a_damaged_passport_proves_nothing_and_raises_nothing_else(first: int, second: int, noise: bytes):
    """Wherever bytes are changed, in either certificate, it is the peer's fault."""
    process, invitation = bytearray(PASSPORT.process), bytearray(PASSPORT.invitation)
    for data, offset in ((process, first % len(process)), (invitation, second % len(invitation))):
        data[offset : offset + len(noise)] = noise
    if (bytes(process), bytes(invitation)) != (PASSPORT.process, PASSPORT.invitation):
        with pytest.raises(PeerMisbehaved):
            read_passport(Passport(process=bytes(process), invitation=bytes(invitation)), LAB.der)
