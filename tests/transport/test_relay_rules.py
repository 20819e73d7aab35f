"""The rules of relays: turns and a rate, a vote, an address book."""

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network.relay_book import MAX_PEERS, RelayBook
from swarm.protocol import DialedBack
from swarm.transport.dial_back import gateways, judge
from swarm.transport.relay import RelayLimits, Turns, Turnstile
from swarm.transport.standing import Verdict


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1 << 16)), min_size=1, max_size=60),
    st.integers(1, 60),
)
def test_those_who_wait_at_a_relay_take_turns(arrivals: list[tuple[str, int]], num_first: int):
    """Everybody passes once, and own pieces in order."""
    turns, owners, passed = Turns(), dict[int, tuple[str, int]](), list[int]()
    for number, (key, cost) in enumerate(arrivals):
        owners[turns.arrive(key, cost)] = key, cost
        if number >= num_first and (found := turns.next()) is not None:
            passed.append(found)
    while (found := turns.next()) is not None:
        passed.append(found)
    assert sorted(passed) == sorted(owners)
    for key in "abc":
        own = [number for number in passed if owners[number][0] == key]
        assert own == sorted(own)


@given(st.integers(1, 1 << 16), st.integers(1, 1 << 16))
def test_one_with_many_circuits_is_no_quicker_than_one_with_few(large: int, small: int):
    """Both have more waiting than ever passes: what has passed of each differs by a piece of each at most."""
    turns, passed = Turns(), {"many": 0, "few": 0}
    pairs = [("many", large), ("few", small)]
    pieces = {turns.arrive(key, cost): (key, cost) for key, cost in 200 * pairs}
    for _ in range(100):
        number = turns.next()
        assert number is not None
        key, cost = pieces[number]
        passed[key] += cost
        assert abs(passed["many"] - passed["few"]) <= large + small


@pytest.mark.asyncio
async def test_a_turnstile_keeps_to_its_rate_and_forgets_who_has_gone():
    """A burst passes at once, and no more; somebody who gives up holds nobody up."""
    turnstile = Turnstile(1e4)
    tasks = [asyncio.ensure_future(turnstile.pass_through(key, 600)) for key in "aabab"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 2  # 1000 bytes are a burst: the second begins in it
    tasks[2].cancel()
    started = asyncio.get_running_loop().time()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert asyncio.get_running_loop().time() - started >= 0.05


@pytest.mark.parametrize(("mbit_s", "num_circuits"), [(100, 190), (20, 38), (0.1, 4), (10_000, 256)])
def test_there_are_only_so_many_circuits_that_each_has_its_turn_in_time(mbit_s: float, num_circuits: int):
    """Else heartbeats would wait behind the pieces of all others until their connections are given up."""
    assert RelayLimits(bytes_per_s=mbit_s * 1e6 / 8).num_circuits == num_circuits


def test_routers_are_read_from_the_table_of_routes(tmp_path: Path):
    """They stand for anybody: no verdict is given on them."""
    table = tmp_path / "route"
    table.write_text(
        "Iface\tDestination\tGateway\tFlags\n"
        f"eth0\t00000000\t{int.from_bytes(bytes([172, 17, 0, 1]), sys.byteorder):08X}\t0003\n"
        "eth0\t000011AC\t00000000\t0001\n"
    )
    assert gateways(table) == {"172.17.0.1"}
    assert gateways(tmp_path / "none") == frozenset()


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
