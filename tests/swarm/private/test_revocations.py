"""Revocations: who may say them, and that they mean the same in whatever order they come."""

import itertools
from datetime import timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvitationRevoked, PeerMisbehaved
from swarm.private import revocations as module
from swarm.private.certificates import Role, to_der
from swarm.private.credentials import Credentials
from swarm.private.revocations import (
    Revocation,
    Revocations,
    decode_revocations,
    encode_revocations,
    revoke,
)
from tests.swarm.private.labs import NOW, Lab

LAB = Lab()
SERVER, CLIENT = LAB.invite("gpu7", Role.SERVER), LAB.invite("ana", Role.CLIENT)
ADMIN, ROGUE = LAB.invite("root", Role.ADMIN), LAB.invite("rogue", Role.ADMIN)
NOW_S = NOW.timestamp()


def by_authority(whom: Credentials) -> Revocation:
    """The authority revokes somebody."""
    return revoke(whom.member, LAB.der, LAB.key, NOW_S)


def by_admin(whom: Credentials, admin: Credentials = ADMIN) -> Revocation:
    """An admin, or who would like to be one, does."""
    return revoke(whom.member, LAB.der, admin.key, NOW_S, signer=to_der(admin.invitation))


def knowing(*statements: Revocation) -> Revocations:
    """A peer that has heard these."""
    known = Revocations(LAB.der)
    known.add(statements, NOW_S)
    return known


def test_the_authority_can_revoke_everybody():
    """Clients, servers, admins; others stay."""
    for whom in (SERVER, CLIENT, ADMIN):
        known = knowing(by_authority(whom))
        with pytest.raises(InvitationRevoked, match=r"your invitation .* was revoked on 2026-11-27 at 12:00 UTC"):
            known.check(whom.member, whose="your")
        known.check(ROGUE.member, whose="your")


def test_an_admin_can_revoke_servers_and_clients_but_no_admins():
    """Nor itself: that takes the authority."""
    known = knowing(by_admin(SERVER), by_admin(CLIENT), by_admin(ROGUE), by_admin(ADMIN))
    assert known.find(SERVER.member) and known.find(CLIENT.member)
    assert known.find(ROGUE.member) is None and known.find(ADMIN.member) is None


@pytest.mark.parametrize("signer", [SERVER, CLIENT])
def test_others_can_not_revoke(signer: Credentials):
    """Their statements are misbehaviour, and change nothing."""
    known = knowing()
    with pytest.raises(PeerMisbehaved, match="who may not"):
        known.add([by_admin(CLIENT, signer)], NOW_S)
    assert len(known) == 0


def test_a_revoked_admin_leaves_nothing_behind():
    """Whatever it has revoked is restored, in both orders, and it can revoke nobody any more."""
    for statements in itertools.permutations([by_admin(SERVER, ROGUE), by_authority(ROGUE), by_admin(CLIENT)]):
        known = knowing(*statements)
        assert known.find(SERVER.member) is None and known.find(CLIENT.member) and known.find(ROGUE.member)
        assert len(known) == 2


def test_an_expired_admin_says_nothing_new_and_can_still_be_revoked():
    """A statement made too late by its own word is refused; one dated back is void when the authority says so."""
    old = LAB.invite("old", Role.ADMIN, days=1)
    later = (NOW + timedelta(days=2)).timestamp()
    late = revoke(SERVER.member, LAB.der, old.key, later, signer=to_der(old.invitation))
    known = knowing()
    with pytest.raises(PeerMisbehaved, match="who may not"):
        known.add([late], later)
    known.add([by_admin(SERVER, old)], later)
    assert known.find(SERVER.member)
    known.add([revoke(old.member, LAB.der, LAB.key, later)], later)
    assert known.find(SERVER.member) is None and known.find(old.member)


@given(
    st.permutations([by_authority(SERVER), by_authority(ROGUE), by_admin(CLIENT), by_admin(SERVER, ROGUE)]), st.data()
)
def test_any_order_and_any_repetition_gives_the_same(statements: list[Revocation], data: st.DataObject):
    """So peers agree however the statements reached them, and their digests show it."""
    again = data.draw(st.lists(st.sampled_from(statements), max_size=4))
    one = knowing(*statements, *again)
    other = knowing(*statements[::-1])
    assert one.digest == other.digest != knowing().digest
    assert {entry.member for entry in one} == {entry.member for entry in other}


@pytest.mark.parametrize("field", ["member", "at", "until", "signature"])
def test_a_changed_statement_is_misbehaviour(field: str):
    """The signature covers everything."""
    changes = {"member": CLIENT.member.id, "at": NOW_S + 1, "until": NOW_S + 2, "signature": bytes(64)}
    for entry in (by_authority(SERVER), by_admin(SERVER)):
        with pytest.raises(PeerMisbehaved, match="wrong signature"):
            knowing().add([msgspec.structs.replace(entry, **{field: changes[field]})], NOW_S)


def test_statements_of_another_swarm_mean_nothing_here():
    """Neither the other authority's, nor those of its admins."""
    other = Lab()
    admin = other.invite("root", Role.ADMIN)
    foreign = revoke(SERVER.member, other.der, other.key, NOW_S)
    foreign_admin = revoke(SERVER.member, other.der, admin.key, NOW_S, signer=to_der(admin.invitation))
    for entry in (foreign, foreign_admin):
        with pytest.raises(PeerMisbehaved):
            knowing().add([entry], NOW_S)


def test_a_statement_is_forgotten_when_the_invitation_has_expired():
    """Then nobody needs it; what an admin said stays void for as long as the authority lives."""
    known = knowing(by_authority(SERVER), by_authority(ROGUE), by_admin(CLIENT))
    later = (NOW + timedelta(days=31)).timestamp()
    assert known.add([by_authority(SERVER), by_admin(CLIENT, ROGUE)], later) == []
    assert [entry.member for entry in known] == [ROGUE.member.id]


def test_what_is_new_is_told_once():
    """So that peers pass on nothing twice."""
    known = knowing()
    assert known.add([by_authority(SERVER), by_admin(SERVER)], NOW_S) == [by_authority(SERVER), by_admin(SERVER)]
    assert known.add([by_authority(SERVER), by_admin(SERVER)], NOW_S) == []


def test_admins_can_not_fill_the_room_of_the_authority(monkeypatch: pytest.MonkeyPatch):
    """Nor that of each other: everybody has some of its own, and what there is no room for is not known."""
    monkeypatch.setattr(module, "MAX_BY_ADMIN", 2)
    monkeypatch.setattr(module, "MAX_ADMINS", 2)
    statements = [by_admin(LAB.invite(f"c{index}", Role.CLIENT)) for index in range(5)]
    known = knowing(*statements)
    assert [known.has(entry) for entry in statements] == [True, True, False, False, False] and len(known) == 2
    assert known.add([by_authority(SERVER)], NOW_S) and known.find(SERVER.member)
    assert known.add([by_admin(CLIENT, ROGUE)], NOW_S) and known.has(by_admin(CLIENT, ROGUE))
    third = LAB.invite("third", Role.ADMIN)
    assert known.add([by_admin(CLIENT, third)], NOW_S) == []
    known.add([by_authority(ROGUE)], NOW_S)
    assert known.find(CLIENT.member) is None and known.add([by_admin(CLIENT, third)], NOW_S)


def test_statements_survive_the_wire():
    """Encoded and decoded they are what they were, and a small message."""
    statements = (by_authority(SERVER), by_admin(CLIENT))
    data = encode_revocations(statements)
    assert decode_revocations(data) == statements and len(data) < 700


@given(st.binary(max_size=200))
def test_garbage_is_the_peers_fault(data: bytes):
    """Any bytes are statements or misbehaviour."""
    try:
        decode_revocations(data)
    except PeerMisbehaved:
        return


@given(st.integers(0, 600), st.binary(min_size=1, max_size=4))
def test_damaged_statements_revoke_nobody_else(offset: int, noise: bytes):
    """Changed bytes give the same statement, or misbehaviour."""
    data = bytearray(encode_revocations([by_admin(CLIENT)]))
    offset %= len(data)
    data[offset : offset + len(noise)] = noise
    known = knowing()
    try:
        known.add(decode_revocations(bytes(data)), NOW_S)
    except PeerMisbehaved:
        return
    assert {entry.member for entry in known} <= {CLIENT.member.id}
