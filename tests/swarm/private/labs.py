"""A private swarm's authority without files, for tests: invitations of any role and age, and everything hostile."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.private.certificates import Role, make_authority, make_invitation, to_der
from swarm.private.credentials import Credentials

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


@dataclass
class Lab:
    """An authority and whom it invites."""

    name: str = "my-lab"
    now: datetime = NOW
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def __post_init__(self) -> None:
        self.certificate: x509.Certificate = make_authority(self.name, self.key, self.now)

    @property
    def der(self) -> bytes:
        """What everybody knows of it."""
        return to_der(self.certificate)

    def invite(
        self, name: str = "gpu1", role: Role = Role.SERVER, *, days: float = 30.0, peers: tuple[str, ...] = ()
    ) -> Credentials:
        """Credentials that expire after so many days."""
        key = Ed25519PrivateKey.generate()
        invitation = make_invitation(
            self.certificate,
            self.key,
            key.public_key(),
            name=name,
            role=role,
            now=self.now,
            expires_at=self.now + timedelta(days=days),
        )
        return Credentials(self.certificate, invitation, key, peers)


def lab_now() -> Lab:
    """A lab whose invitations are good at this moment."""
    return Lab(now=datetime.now(UTC).replace(microsecond=0))
