"""Who was thrown out of a private swarm: signed statements that peers pass on until everybody has them.

    revoke(...) ──► Revocation ──any order, any way──► Revocations.add at every peer ──► is_revoked(member)

What counts is the same in whatever order it came: a statement of the authority always does, one of an admin about a
client or server does unless the authority has revoked that admin. So admins can't throw each other out, and a rogue one
leaves nothing behind. A statement is forgotten when the invitation it speaks of has expired; when that of the admin who
made it has, it stays, and is void if it says that it was made later.
Pure: no files, no network; the time comes in.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509 import load_der_x509_certificate

from swarm.errors import InvitationRevoked, PeerMisbehaved
from swarm.identity import MAX_PEER_ID_CHARS, peer_id_of, verify
from swarm.private.certificates import MAX_CERTIFICATE_BYTES, Member, read_invitation

MAX_BY_AUTHORITY = 2048
"""Statements of the authority that a peer keeps."""
MAX_BY_ADMIN = 256
"""Those of one admin."""
MAX_ADMINS = 24
"""Admins of whom there are any."""
MAX_REVOCATIONS = MAX_BY_AUTHORITY + MAX_BY_ADMIN * MAX_ADMINS
_DOMAIN = b"swarm revocation 1"

Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class Revocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signed statement."""

    member: Annotated[str, msgspec.Meta(max_length=MAX_PEER_ID_CHARS)]
    """Id of who is revoked."""
    at: Time
    """Unix time of the statement."""
    until: Time
    """When it may be forgotten: the revoked invitation has expired, or the authority of an admin has."""
    signer: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]
    """An admin's invitation, in DER; empty for the authority."""
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_decoder: msgspec.msgpack.Decoder[tuple[Revocation, ...]] = msgspec.msgpack.Decoder(
    Annotated[tuple[Revocation, ...], msgspec.Meta(max_length=MAX_REVOCATIONS)]
)


def revoke(member: Member, authority: bytes, key: Ed25519PrivateKey, now: float, *, signer: bytes = b"") -> Revocation:
    """State that a member is one no more.

    Args:
        member: whom.
        authority: certificate of the swarm's authority, in DER.
        key: of the signer.
        signer: invitation of the admin who signs; empty for the authority.
    """
    # What a revoked admin said must stay void, so this must be known for as long as anything that he said.
    until = _expiry(authority) if member.role.may_revoke else member.expires_at
    unsigned = Revocation(member.id, now, until, signer, bytes(64))
    return msgspec.structs.replace(unsigned, signature=key.sign(_signed_bytes(unsigned, authority)))


def encode_revocations(revocations: Iterable[Revocation]) -> bytes:
    """Statements as msgpack."""
    return msgspec.msgpack.encode(tuple(revocations))


def decode_revocations(data: bytes) -> tuple[Revocation, ...]:
    """Read statements; their signatures are checked by `Revocations.add`.

    Raises:
        PeerMisbehaved: malformed or too many.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerMisbehaved(f"malformed revocations: {error}") from error


class Revocations:
    """The statements that one peer knows.

    Args:
        authority: certificate of the swarm's authority, in DER.
    """

    def __init__(self, authority: bytes) -> None:
        self._authority = authority
        self._authority_id = peer_id_of(_public_bytes(authority))
        self._by_authority: dict[str, Revocation] = {}
        self._by_admins: dict[str, dict[str, Revocation]] = {}
        """By member, then by admin."""
        self._num_of: Counter[str] = Counter()
        """Statements of each admin."""
        self._digest: bytes | None = None

    def __iter__(self) -> Iterator[Revocation]:
        yield from self._by_authority.values()
        for entries in self._by_admins.values():
            yield from entries.values()

    def __len__(self) -> int:
        return len(self._by_authority) + self._num_of.total()

    @property
    def digest(self) -> bytes:
        """Equal for peers that know the same."""
        if self._digest is None:
            by_admins = [f"{member} {admin}" for member, entries in self._by_admins.items() for admin in entries]
            known = sorted([*(f"{member} " for member in self._by_authority), *by_admins])
            self._digest = blake2b("\n".join(known).encode(), digest_size=16).digest()
        return self._digest

    def add(self, statements: Iterable[Revocation], now: float) -> list[Revocation]:
        """Take statements from wherever; returns those that were new.

        Raises:
            PeerMisbehaved: one is not signed by who may; those before it were taken.
        """
        self._forget_expired(now)
        return [entry for entry in statements if entry.until > now and self._add(entry)]

    def find(self, member: Member) -> Revocation | None:
        """The statement that throws a member out, or None."""
        if (entry := self._by_authority.get(member.id)) is not None or member.role.may_revoke:
            return entry
        return next(iter(self._by_admins.get(member.id, {}).values()), None)

    def has(self, statement: Revocation) -> bool:
        """Whether we know that its signer has revoked its member.

        Raises:
            PeerMisbehaved: it names a signer who is none.
        """
        if not statement.signer:
            return statement.member in self._by_authority
        signer = read_invitation(statement.signer, self._authority)
        return signer.id in self._by_admins.get(statement.member, {})

    def check(self, member: Member, *, whose: str) -> None:
        """Refuse who was thrown out.

        Raises:
            InvitationRevoked: naming whom and since when.
        """
        entry = self.find(member)
        if entry is not None:
            when = datetime.fromtimestamp(entry.at, UTC)
            raise InvitationRevoked(f"{whose} invitation {member} was revoked on {when:%Y-%m-%d at %H:%M} UTC")

    def _add(self, entry: Revocation) -> bool:
        if entry.signer:
            signer = read_invitation(entry.signer, self._authority)
            if not signer.role.may_revoke or entry.at >= signer.expires_at:
                raise PeerMisbehaved(f"a revocation of {entry.member} by {signer}, who may not")
            is_known = signer.id in self._by_admins.get(entry.member, {}) or signer.id in self._by_authority
            if is_known or not self._has_room(signer.id):
                return False
            self._verify(entry, signer.id)
            self._by_admins.setdefault(entry.member, {})[signer.id] = entry
            self._num_of[signer.id] += 1
        else:
            if entry.member in self._by_authority or len(self._by_authority) >= MAX_BY_AUTHORITY:
                return False
            self._verify(entry, self._authority_id)
            self._by_authority[entry.member] = entry
            if entry.member in self._num_of:
                self._keep(lambda admin, _: admin != entry.member)
        self._digest = None
        return True

    def _has_room(self, admin: str) -> bool:
        """Whether one more statement of an admin may be kept; none can take another's room."""
        num_made = self._num_of.get(admin)
        return len(self._num_of) < MAX_ADMINS if num_made is None else num_made < MAX_BY_ADMIN

    def _keep(self, is_kept: Callable[[str, Revocation], bool]) -> None:
        """Drop the admins' statements of which that can't be said."""
        kept = {
            member: {admin: entry for admin, entry in entries.items() if is_kept(admin, entry)}
            for member, entries in self._by_admins.items()
        }
        self._by_admins = {member: entries for member, entries in kept.items() if entries}
        self._num_of = Counter(admin for entries in self._by_admins.values() for admin in entries)

    def _verify(self, entry: Revocation, signer: str) -> None:
        if not verify(signer, _signed_bytes(entry, self._authority), entry.signature):
            raise PeerMisbehaved(f"a revocation of {entry.member} with a wrong signature")

    def _forget_expired(self, now: float) -> None:
        if any(entry.until <= now for entry in self):
            self._by_authority = {key: entry for key, entry in self._by_authority.items() if entry.until > now}
            self._keep(lambda _, entry: entry.until > now)
            self._digest = None


def _signed_bytes(entry: Revocation, authority: bytes) -> bytes:
    swarm = blake2b(authority, digest_size=32).digest()
    return _DOMAIN + swarm + msgspec.msgpack.encode((entry.member, entry.at, entry.until))


def _public_bytes(authority: bytes) -> bytes:
    key = load_der_x509_certificate(authority).public_key()
    assert isinstance(key, Ed25519PublicKey)  # its owner has read it with read_authority
    return key.public_bytes_raw()


def _expiry(authority: bytes) -> float:
    return load_der_x509_certificate(authority).not_valid_after_utc.timestamp()
