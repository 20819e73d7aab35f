"""Tests of when packets arrive."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wan.paths import MAX_QUEUE_S, Network, Path

sends = st.lists(
    st.tuples(st.floats(0, 0.1), st.integers(0, 2), st.integers(0, 2), st.integers(20, 1500)), min_size=1, max_size=60
)


def everything(network: Network) -> list[tuple[float, int, bytes]]:
    return list(network.arrivals(1e9))


@given(sends, st.floats(0, 0.1), st.floats(0, 0.1), st.integers(0, 5))
def test_packets_keep_their_order_and_take_no_less_than_their_delay(events, delay_s, jitter_s, seed):
    """Whatever the jitter, each direction is first in, first out."""
    network = Network(Path(delay_s=delay_s, jitter_s=jitter_s), {}, Random(seed))
    now, sent = 0.0, {}
    for index, (pause, source, destination, size) in enumerate(events):
        now += pause
        packet = index.to_bytes(2, "big") + bytes(size)
        network.send(now, source, destination, packet)
        sent[index] = (now, source, destination)
    seen: dict[tuple[int, int], int] = {}
    arrived = everything(network)
    for due, destination, packet in arrived:
        index = int.from_bytes(packet[:2], "big")
        when, source, to = sent[index]
        assert to == destination
        assert due >= max(when, when + delay_s - jitter_s - 1e-9)
        assert seen.get((source, to), -1) < index
        seen[source, to] = index
    assert len(arrived) == len(events)


@given(sends, st.integers(0, 5))
def test_a_rate_is_never_exceeded(events, seed):
    """What arrived in a window fits through the rate; what didn't fit into the queue was dropped."""
    rate_bps = 1e6
    network = Network(Path(rate_bps=rate_bps), {}, Random(seed))
    now = 0.0
    for pause, _, _, size in events:
        now += pause
        network.send(now, 0, 1, bytes(size))
    arrived = everything(network)
    assert len(arrived) + network.num_dropped == len(events)
    for (first, _, _), (second, _, packet) in pairwise(arrived):
        assert second - first >= 8 * len(packet) / rate_bps - 1e-9
    assert all(due <= now + MAX_QUEUE_S + 8 * 1500 / rate_bps for due, _, _ in arrived)


def test_loss_is_seeded():
    """The same seed loses the same packets; another one others, about as many."""

    def survivors(seed: int) -> list[bytes]:
        network = Network(Path(loss=0.3), {}, Random(seed))
        for index in range(500):
            network.send(0.0, 0, 1, index.to_bytes(2, "big"))
        return [packet for _, _, packet in everything(network)]

    assert survivors(1) == survivors(1) != survivors(2)
    assert 300 < len(survivors(1)) < 400


def test_paths_of_pairs_hold_in_both_directions_and_can_be_replaced():
    """A pair's own path goes before the default."""
    network = Network(Path(delay_s=1), {(0, 1): Path(delay_s=5)}, Random(0))
    network.send(0.0, 1, 0, b"own")
    network.send(0.0, 0, 2, b"default")
    network.set_default(Path(delay_s=2))
    network.send(0.0, 2, 1, b"new")
    assert [(due, packet) for due, _, packet in everything(network)] == [(1, b"default"), (2, b"new"), (5, b"own")]


@pytest.mark.parametrize("bad", [{"delay_s": -1.0}, {"loss": 1.5}, {"rate_bps": -1.0}, {"jitter_s": -0.1}])
def test_impossible_paths_are_refused(bad):
    """A typo in a benchmark is an error, not a strange network."""
    with pytest.raises(ValueError, match="must"):
        Path(**bad)
