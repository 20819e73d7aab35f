"""Who leaves for a new connection: those that only sit there, never those that work, and never for nothing."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerBusy
from swarm.transport.limits import Limits
from swarm.transport.places import YOUNG_S, make_place

LIMITS = Limits(max_connections=6, max_pending_connections=3, max_connections_per_peer=2)
NOW = 100.0


@dataclass(frozen=True)
class Place:
    """A connection as the rules see it."""

    peer_id: str = "a"
    is_greeted: bool = True
    is_ours: bool = False
    made_at: float = 0.0
    idle_since: float | None = None


places = st.builds(
    Place,
    peer_id=st.sampled_from("abc"),
    is_greeted=st.booleans(),
    is_ours=st.booleans(),
    made_at=st.floats(0, NOW),
    idle_since=st.none() | st.floats(0, NOW),
)


@given(st.lists(places, max_size=9), st.sampled_from(["", "a", "b"]))
def test_who_works_or_is_new_never_leaves(there: list[Place], newcomer: str):
    """Whoever leaves has said nothing, or has no streams, for a while; and only when the places are taken."""
    try:
        leaving = make_place(there, newcomer, LIMITS, NOW)
    except PeerBusy:
        return
    if leaving is None:
        assert len(there) < LIMITS.max_connections
        return
    assert leaving in there
    assert leaving.idle_since is not None or (not leaving.is_greeted and not leaving.is_ours)
    assert NOW - (leaving.made_at if leaving.idle_since is None else leaving.idle_since) >= YOUNG_S


def test_the_oldest_that_has_not_said_hello_makes_room():
    """An honest newcomer is let in although silent ones hold all the places for greetings."""
    silent = [Place(is_greeted=False, made_at=time) for time in (20.0, 10.0, 30.0)]
    assert make_place(silent, "", LIMITS, NOW) == silent[1]


def test_silent_connections_of_our_own_making_stay():
    """They are not the strangers against whom the limit stands."""
    ours = [Place(is_greeted=False, is_ours=True)] * 4
    assert make_place(ours, "", LIMITS, NOW) is None


def test_one_peer_can_not_hold_all_places_for_greetings():
    """Where its identity is known, as on p2p streams, its own silent connections count against it."""
    silent = [Place(peer_id="a", is_greeted=False)] * 2
    with pytest.raises(PeerBusy, match="2 connections of yours have not said HELLO"):
        make_place(silent, "a", LIMITS, NOW)
    assert make_place(silent, "b", LIMITS, NOW) is None


def test_an_idle_connection_makes_room_and_busy_ones_do_not():
    """The one that has been idle longest; when all are at work, the newcomer is refused."""
    busy = [Place()] * 4
    idle = [Place(idle_since=50.0), Place(idle_since=40.0)]
    assert make_place([*busy, *idle], "", LIMITS, NOW) == idle[1]
    with pytest.raises(PeerBusy, match="no room"):
        make_place([*busy, Place(), Place()], "", LIMITS, NOW)
    with pytest.raises(PeerBusy, match="no room"):
        make_place([*busy, *[Place(idle_since=NOW - YOUNG_S / 2)] * 2], "", LIMITS, NOW)
