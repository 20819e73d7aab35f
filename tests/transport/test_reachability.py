"""Memory of direct connections that failed."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.transport.reachability import FIRST_PAUSE_S, MAX_PAUSE_S, MAX_PEERS, Reachability


def test_an_unknown_peer_is_worth_an_attempt():
    """Without failures there is no pause, and a success forgets them."""
    memory = Reachability()
    assert memory.should_try("peer", 0.0)
    memory.failed("peer", 0.0)
    assert not memory.should_try("peer", FIRST_PAUSE_S - 0.1)
    memory.succeeded("peer")
    assert memory.should_try("peer", 0.0)


@given(st.integers(1, 40))
def test_the_pause_grows_to_its_limit_and_always_ends(num_failures: int):
    """After any number of failures the peer is tried again, no later than the longest pause."""
    memory = Reachability()
    for _ in range(num_failures):
        memory.failed("peer", 100.0)
    assert not memory.should_try("peer", 100.0 + min(FIRST_PAUSE_S * 2 ** (num_failures - 1), MAX_PAUSE_S) - 0.1)
    assert memory.should_try("peer", 100.0 + MAX_PAUSE_S)


def test_memory_is_bounded():
    """The oldest failures are forgotten when there are too many peers."""
    memory = Reachability()
    for index in range(MAX_PEERS + 1):
        memory.failed(str(index), 0.0)
    assert memory.should_try("0", 0.0) and not memory.should_try("1", 0.0)
