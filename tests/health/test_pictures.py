"""Where things lie in the pictures: inside, apart from each other, and few enough."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.health.history import Point
from swarm.health.pictures import (
    LANE_PX,
    MAP_PX,
    MAX_BARS,
    MAX_EDGES,
    MAX_NODES,
    chart,
    coverage,
    latency_map,
    round_up,
    ticks,
)
from tests.health.fakes import NOW, random_model

models = st.builds(random_model, st.integers(0, 90), num_blocks=st.integers(1, 200), seed=st.integers(0, 1000))


@given(models)
def test_bars_lie_inside_and_never_on_each_other(model):
    """Each is where its blocks are; two in a lane don't overlap; what isn't drawn is counted."""
    picture = coverage(model)
    assert len(picture.bars) <= MAX_BARS
    assert len(picture.bars) + picture.num_hidden == len(model.servers)
    lanes: dict[int, list[tuple[float, float]]] = {}
    for bar in picture.bars:
        assert 0 <= bar.x < bar.x + bar.width <= 100.01 and 0 <= bar.load <= 100
        assert 0 <= bar.y <= picture.height - LANE_PX
        lanes.setdefault(bar.y, []).append((bar.x, bar.x + bar.width))
    for lane in lanes.values():
        lane.sort()
        assert all(end <= start + 0.01 for (_, end), (start, _) in itertools.pairwise(lane))


@given(models)
def test_the_strip_says_for_each_block_how_many_serve_it(model):
    """Runs of equal blocks, side by side, from the first to the last."""
    runs = coverage(model).runs
    assert sum(run.width for run in runs) == pytest.approx(100, abs=0.5)
    lengths = [round(run.width * model.num_blocks / 100) for run in runs]
    unrolled = [run.replicas for run, length in zip(runs, lengths, strict=True) for _ in range(length)]
    assert unrolled == list(model.replicas)
    assert all(a.replicas != b.replicas for a, b in itertools.pairwise(runs))


@given(st.integers(1, 4096))
def test_ticks_are_few_and_include_both_ends(num_blocks: int):
    """From 0 to the number of blocks, in rising order."""
    found = ticks(num_blocks)
    assert found[0] == 0 and found[-1] == num_blocks and len(found) <= 10
    assert found == sorted(set(found))


@given(models)
def test_the_map_has_every_server_inside_and_the_slower_farther_out(model):
    """Radius follows the round trip; links join servers that are on the map."""
    picture = latency_map(model)
    assert len(picture.nodes) <= MAX_NODES and len(picture.edges) <= MAX_EDGES
    places = {(node.x, node.y) for node in picture.nodes}
    assert all(0 <= x <= MAP_PX and 0 <= y <= MAP_PX for x, y in places)
    assert all({(edge.x1, edge.y1), (edge.x2, edge.y2)} <= places for edge in picture.edges)
    assert all(0 <= edge.grade <= 3 for edge in picture.edges)
    radii = sorted((node.server.rtt_ms, (node.x - 200) ** 2 + (node.y - 200) ** 2) for node in picture.nodes)
    assert all(a[1] <= b[1] + 200 for a, b in itertools.pairwise(radii))


def point(value: float) -> Point:
    return Point(at=NOW, coverage=1.0, tokens_per_s=value, sessions=0, opened=0, failed=0, usable=1.0, first_ms=None)


@given(st.lists(st.none() | st.floats(0, 1e9), max_size=96))
def test_a_chart_stays_in_its_box_and_breaks_where_nothing_is_known(values):
    """Every number of the path is within 100 × 100; one stroke per stretch that is known."""
    points = [None if value is None else point(value) for value in values]
    found = chart(points, lambda it: it.tokens_per_s)
    assert all(-0.05 <= float(number) <= 100.05 for number in re.findall(r"-?\d+\.\d+", found.line))
    stretches = sum(
        value is not None and (number == 0 or values[number - 1] is None) for number, value in enumerate(values)
    )
    assert found.line.count("M") == found.area.count("Z") == stretches
    known = [value for value in values if value is not None]
    assert found.last == (known[-1] if known else None)
    assert not known or found.top >= max(known) * (1 - 1e-6)


def test_a_quantity_without_values_draws_nothing():
    """No canary yet: an empty path, a dash as value."""
    found = chart([point(1.0)] * 5, lambda it: it.first_ms)
    assert (found.line, found.last, found.top) == ("", None, 1.0)


@given(st.floats(1e-6, 1e15))
def test_scales_end_at_round_numbers_just_above(value: float):
    """1, 2 or 5 times a power of ten, at most five times the value."""
    top = round_up(value)
    assert value <= top * (1 + 1e-6) and top <= 5.01 * value
