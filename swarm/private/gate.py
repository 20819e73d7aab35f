"""Who is let in: one process's view of its private swarm, its own membership included. Pure: the time comes in.

a peer's passport ──admit──► Proven: peer id and member          its certificates ─► `swarm.private.certificates`
statements ────────learn──► new ones, to be passed on            who is out       ─► `swarm.private.revocations`
"""

from collections.abc import Iterable

from swarm.errors import AccessDenied
from swarm.identity import Identity
from swarm.private.certificates import Member, Passport, Proven, check_time, read_passport
from swarm.private.credentials import Credentials
from swarm.private.revocations import Revocation, Revocations


class Gate:
    """Checks the members of a private swarm.

    Args:
        credentials: our own, and by its authority everybody's.
        identity: of this process.
    """

    def __init__(self, credentials: Credentials, identity: Identity) -> None:
        self.credentials = credentials
        self.member = credentials.member
        self.authority = credentials.authority_der
        self.passport = credentials.passport_for(identity)
        self.revocations = Revocations(self.authority)

    def admit(self, passport: Passport, now: float) -> Proven:
        """Whom a passport proves to be there.

        Raises:
            PeerMisbehaved: it proves nothing here.
            AccessDenied: it did so once: the invitation has expired or was revoked.
        """
        proven = read_passport(passport, self.authority)
        self.check(proven, now)
        return proven

    def check(self, proven: Proven, now: float) -> None:
        """Whether somebody is a member still.

        Raises:
            AccessDenied: for the ears of that peer.
        """
        check_time(proven.member, now, whose="your")
        self.revocations.check(proven.member, whose="your")

    def is_good(self, member: Member, now: float) -> bool:
        """Whether an invitation has neither expired nor been revoked."""
        return now < member.expires_at and self.revocations.find(member) is None

    def check_ourselves(self, now: float) -> None:
        """Whether we still belong to the swarm.

        Raises:
            AccessDenied: why not.
        """
        check_time(self.member, now, whose="your")
        self.revocations.check(self.member, whose="your")

    def check_may_announce(self) -> None:
        """Whether our role lets us announce anything.

        Raises:
            AccessDenied: it does not.
        """
        if not self.member.role.may_announce:
            raise AccessDenied(
                f"your invitation {self.member} is for using the swarm {self.credentials.swarm}, not for serving in it:"
                " ask for one with --role server"
            )

    def learn(self, statements: Iterable[Revocation], now: float) -> list[Revocation]:
        """Take revocations from a peer; returns those that were new.

        Raises:
            PeerMisbehaved: one is not signed by who may.
        """
        return self.revocations.add(statements, now)
