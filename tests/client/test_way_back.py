"""Who worked on gradients, and for how long, by the client's clock alone."""

import heapq
import itertools

from hypothesis import given
from hypothesis import strategies as st

from swarm.client.pace import Pace
from swarm.client.way_back import MAX_UNDER_WAY, WayBack
from swarm.types import BlockRange, Hop


def make_hops(count: int) -> tuple[Hop, ...]:
    return tuple(Hop(peer_id=f"p{index}", blocks=BlockRange(index, index + 1)) for index in range(count))


class FakeServers:
    """A chain whose servers take known times, one micro-batch after the other; ways take none.

    Args:
        work_s: of each server, per micro-batch.
        shows: whether each server's answers carry gradients.
    """

    def __init__(self, work_s, shows):
        self.work_s, self.shows = work_s, shows
        self.free_at = [0.0] * len(work_s)
        self._events, self._order = [], itertools.count()

    def send(self, run: "FakeRun", number: int, now: float) -> None:
        run.way_back.sent(number, len(self.work_s) - 1, now)
        self._begin(run, number, len(self.work_s) - 1, now)

    def _begin(self, run, number, hop, now) -> None:
        self.free_at[hop] = max(now, self.free_at[hop]) + self.work_s[hop]
        heapq.heappush(self._events, (self.free_at[hop], next(self._order), run, number, hop))

    def work(self, paces) -> list[tuple[tuple[str, ...], float]]:
        """All that was sent: who did each leg, and how long it took by what the client can see."""
        legs = []
        while self._events:
            now, _, run, number, hop = heapq.heappop(self._events)
            if hop:
                self._begin(run, number, hop - 1, now)
            if self.shows[hop] and (leg := run.way_back.answered(number, hop, now)) is not None:
                took_s = paces[hop].took(now, since=leg.since, way_s=0.0)
                legs.append((tuple(it.peer_id for it in leg.hops), took_s))
        return legs


class FakeRun:
    def __init__(self, num_hops: int):
        self.way_back = WayBack(make_hops(num_hops))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_each_server_is_charged_what_it_worked_however_much_waits_for_it(work_s, sendings):
    """Several runs of one client share the servers: what waits for others of ours, in front of any server, is free."""
    servers, paces = FakeServers(work_s, [True] * len(work_s)), [Pace() for _ in work_s]
    sent = sorted((at, index) for index, times in enumerate(sendings) for at in times)
    runs = [FakeRun(len(work_s)) for _ in sendings]
    for number, (at, index) in enumerate(sent):
        servers.send(runs[index], number, at)
    legs = servers.work(paces)
    assert len(legs) == len(sent) * len(work_s)
    for (peer_id,), took_s in legs:
        assert took_s == work_s[int(peer_id[1:])]


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=5), st.integers(1, 6))
def test_servers_whose_answers_show_nothing_share_a_leg_with_the_next_that_does(chain, num_micros):
    """Who says too early that it is done makes nobody look slow; behind the last that shows, nothing is known."""
    work_s, shows = zip(*chain, strict=True)
    servers, run = FakeServers(work_s, shows), FakeRun(len(chain))
    servers.send(run, 0, 0.0)
    expected, members = [], []
    for hop in reversed(range(len(chain))):
        members.insert(0, hop)
        if shows[hop]:
            expected.append((tuple(f"p{it}" for it in members), float(sum(work_s[it] for it in members))))
            members = []
    assert servers.work([Pace() for _ in chain]) == expected
    for number in range(num_micros):
        servers.send(run, number, 1000.0)
    took_s = sum(took for _, took in servers.work([Pace() for _ in chain]))
    assert took_s <= num_micros * sum(work_s)


def test_answers_that_overtake_others_are_put_down_to_both():
    """A server's word may come after that of the server in front of it; later ones don't count twice."""
    way_back = WayBack(make_hops(3))
    way_back.sent(7, 2, 10.0)
    leg = way_back.answered(7, 1, 12.0)
    assert [hop.peer_id for hop in leg.hops] == ["p1", "p2"] and leg.since == 10.0
    assert way_back.answered(7, 2, 12.5) is None
    leg = way_back.answered(7, 0, 13.0)
    assert [hop.peer_id for hop in leg.hops] == ["p0"] and leg.since == 12.0
    assert way_back.answered(8, 0, 13.0) is None  # nobody knows since when


def test_what_passes_the_client_begins_when_it_has_gone_out():
    """What it waits for the client's own line is not the server's."""
    way_back = WayBack(make_hops(2))
    way_back.sent(0, 1, 10.0)
    assert way_back.answered(0, 1, 11.0).since == 10.0
    way_back.sent(0, 0, 15.0)
    assert way_back.answered(0, 0, 16.0).since == 15.0


def test_micro_batches_that_never_come_back_are_forgotten():
    """Those that begin again do so under another number."""
    way_back = WayBack(make_hops(1))
    for number in range(2 * MAX_UNDER_WAY):
        way_back.sent(number, 0, 0.0)
    assert len(way_back._under_way) == MAX_UNDER_WAY
    assert way_back.answered(0, 0, 1.0) is None
    assert way_back.answered(2 * MAX_UNDER_WAY - 1, 0, 1.0) is not None
