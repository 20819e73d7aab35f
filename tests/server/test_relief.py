"""Who is asked to move when a server is short of cache: enough, no more than there is room, and nobody to and fro."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.server.relief import Guest, Replica, sessions_to_move

NOW = 1000.0
names = st.frozensets(st.sampled_from("ab"), max_size=2)
guests = st.lists(
    st.builds(
        Guest,
        key=st.uuids(),
        num_pages=st.integers(0, 20),
        stays_until=st.sampled_from([NOW, NOW + 1.0]),
        adapters=names,
    ),
    max_size=8,
    unique_by=lambda guest: guest.key,
)
replicas = st.lists(st.builds(Replica, free_pages=st.integers(0, 60), adapters=names), max_size=3)


@given(guests, replicas, st.integers(0, 60))
def test_what_is_asked_to_move_is_settled_fits_elsewhere_and_is_needed(
    guests: list[Guest], replicas: list[Replica], num_pages: int
) -> None:
    """Never who has just come, never beyond half of what is free, and nothing once the rest has room."""
    asked = sessions_to_move(guests, replicas, num_pages, NOW)
    assert len(set(asked)) == len(asked)
    moving = [next(guest for guest in guests if guest.key == key) for key in asked]
    assert all(guest.stays_until <= NOW for guest in moving)
    assert sum(guest.num_pages for guest in moving) <= sum(replica.free_pages for replica in replicas) / 2
    left = sum(guest.num_pages for guest in guests) - sum(guest.num_pages for guest in moving[:-1])
    assert not moving or left > num_pages


@given(guests, st.integers(0, 60))
def test_with_room_elsewhere_the_server_is_relieved_of_all_that_may_move(guests: list[Guest], num_pages: int) -> None:
    """If the rest still has no room, that is because it has just come."""
    asked = set(sessions_to_move(guests, [Replica(free_pages=10_000)], num_pages, NOW))
    left = [guest for guest in guests if guest.key not in asked]
    still = [guest for guest in left if guest.num_pages]
    assert sum(guest.num_pages for guest in still) <= num_pages or all(it.stays_until > NOW for it in still)


def guest(key: str, num_pages: int, *adapters: str) -> Guest:
    return Guest(key=key, num_pages=num_pages, stays_until=0.0, adapters=frozenset(adapters))


def test_sessions_of_one_adapter_go_together_and_first_to_where_it_is() -> None:
    """The adapter leaves with them, and others stay that are smaller."""
    here = [guest("a1", 4, "a"), guest("b1", 1, "b"), guest("a2", 3, "a"), guest("plain", 9)]
    there = [Replica(free_pages=100), Replica(free_pages=20, adapters=frozenset("a"))]
    assert sessions_to_move(here, there, 10, NOW) == ["a2", "a1"]
    assert sessions_to_move(here, there, 14, NOW) == ["a2"]


def test_two_servers_that_are_short_leave_each_other_alone() -> None:
    """Nothing moves to where nothing is free."""
    assert sessions_to_move([guest("x", 30), guest("y", 30)], [Replica(free_pages=3)], 40, NOW) == []
