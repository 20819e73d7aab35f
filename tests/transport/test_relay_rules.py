"""The pure parts of relays: a rate, a vote, an address book."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.network.relay_book import MAX_PEERS, RelayBook
from swarm.protocol import DialedBack
from swarm.transport.dial_back import Verdict, judge
from swarm.transport.relay import Throttle


@given(st.lists(st.tuples(st.integers(1, 1 << 16), st.floats(0, 0.5)), min_size=1, max_size=50))
def test_a_throttle_never_lets_more_pass_than_its_rate_and_a_burst(pieces: list[tuple[int, float]]):
    """At any moment, counted from the first piece; and it is as quick as that when it always has something to do."""
    throttle, now, passed, rate = Throttle(1e5), 0.0, 0, 1e5
    for size, pause_s in pieces:
        now += pause_s
        at = now + throttle.delay_s(size, now)
        assert passed <= rate * (at + Throttle.BURST_S) + 1e-6
        assert at - now <= passed / rate + 1e-9
        passed += size


def answers(*pairs: tuple[str, bool]) -> list[DialedBack]:
    """What some peers say."""
    return [DialedBack(host=host, is_reachable=yes) for host, yes in pairs]


def test_public_views_count_more_than_those_of_neighbours():
    """A neighbour reaches us where the world does not."""
    assert judge([]) is None
    assert judge(answers(("10.0.0.2", True))) == Verdict(is_reachable=True, host="10.0.0.2", num_answers=1)
    assert judge(answers(("127.0.0.1", False))) is None
    mixed = answers(("10.0.0.2", True), ("10.0.0.2", True), ("8.8.8.8", False))
    assert judge(mixed) == Verdict(is_reachable=False, host="8.8.8.8", num_answers=1)


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_half_of_those_who_can_tell_decide(said: list[bool]):
    """One liar among five changes nothing."""
    verdict = judge(answers(*(("8.8.8.8", yes) for yes in said)))
    assert verdict is not None and verdict.is_reachable == (2 * sum(said) >= len(said))


def test_the_book_of_relays_forgets_who_needs_none_and_is_bounded():
    """A peer that can be reached again is reached directly."""
    book = RelayBook()
    book.learn("a", ["r"])
    assert book.of("a") == ("r",)
    book.learn("a", [])
    assert book.of("a") == () and book.knows("a") and not book.knows("b")
    for number in range(MAX_PEERS + 1):
        book.learn(str(number), ["r"])
    assert not book.knows("0") and book.of("1") == ("r",)
