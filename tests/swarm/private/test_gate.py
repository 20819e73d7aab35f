"""One process's view of its private swarm: who comes in, and whether it belongs there itself."""

from datetime import timedelta

import pytest

from swarm.errors import AccessDenied, InvitationExpired, InvitationRevoked, PeerMisbehaved
from swarm.identity import Identity
from swarm.private.certificates import Role
from swarm.private.gate import Gate
from swarm.private.revocations import revoke
from tests.swarm.private.labs import NOW, Lab

LAB = Lab()
NOW_S = NOW.timestamp()


def gate_of(role: Role = Role.SERVER, *, days: float = 30.0) -> Gate:
    """A process of a new member."""
    return Gate(LAB.invite("me", role, days=days), Identity.generate())


def test_members_are_let_in_until_they_expire_or_are_revoked():
    """Each refusal says which, in words for the refused one."""
    gate, other = gate_of(), gate_of(Role.CLIENT, days=1)
    proven = gate.admit(other.passport, NOW_S)
    assert gate.is_good(proven.member, NOW_S)
    later = (NOW + timedelta(days=2)).timestamp()
    assert not gate.is_good(proven.member, later)
    with pytest.raises(InvitationExpired, match=r"your invitation me \(client\) expired"):
        gate.admit(other.passport, later)
    gate.learn([revoke(proven.member, LAB.der, LAB.key, NOW_S)], NOW_S)
    assert not gate.is_good(proven.member, NOW_S)
    with pytest.raises(InvitationRevoked, match=r"your invitation me \(client\) was revoked"):
        gate.admit(other.passport, NOW_S)


def test_strangers_are_not_let_in():
    """Another authority's members are strangers."""
    stranger = Gate(Lab().invite(), Identity.generate())
    with pytest.raises(PeerMisbehaved):
        gate_of().admit(stranger.passport, NOW_S)


def test_a_process_knows_when_it_is_out_itself():
    """By the clock, or by a statement that it has heard."""
    gate = gate_of(days=1)
    gate.check_ourselves(NOW_S)
    with pytest.raises(InvitationExpired):
        gate.check_ourselves((NOW + timedelta(days=2)).timestamp())
    gate.learn([revoke(gate.member, LAB.der, LAB.key, NOW_S)], NOW_S)
    with pytest.raises(InvitationRevoked):
        gate.check_ourselves(NOW_S)


def test_a_client_is_told_what_it_would_need_to_serve():
    """The message names the role."""
    for role in (Role.SERVER, Role.ADMIN):
        gate_of(role).check_may_announce()
    with pytest.raises(AccessDenied, match="--role server"):
        gate_of(Role.CLIENT).check_may_announce()
