"""Places predict round trips that nobody has measured, and bad input cannot break them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import MAX_COORDINATE_S, MAX_STEP_S, Place, located, moved, round_trip_s
from swarm.errors import InvalidRequest

coordinates = st.floats(-MAX_COORDINATE_S, MAX_COORDINATE_S)
places = st.builds(
    Place,
    position=st.tuples(coordinates, coordinates, coordinates),
    height_s=st.floats(0.0, MAX_COORDINATE_S),
    error=st.floats(0.0, 1.0),
)


@pytest.fixture(scope="module")
def towns():
    """200 peers in 8 towns, each with its own access line: the true round trip between any two."""
    rng = np.random.default_rng(1)
    points = rng.uniform(0.0, 0.08, (8, 2))[rng.integers(0, 8, 200)] + rng.normal(0.0, 0.002, (200, 2))
    access = rng.exponential(0.004, 200) + 0.001
    return np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + access[:, None] + access[None]


def settle(towns, liar=None, *, lie=None):
    """The places of all peers after each has pinged 4 neighbours and 4 others, 20 times; always the liar among them."""
    rng = np.random.default_rng(2)
    own = [Place() for _ in range(200)]
    for round_ in range(20):
        for a in range(200):
            chosen = [*np.argsort(towns[a])[1:5], *rng.choice(200, 4)]
            if liar is not None:
                chosen[-1] = liar
            for b in chosen:
                if a != b:
                    other = lie(round_) if b == liar else own[b]
                    own[a] = moved(own[a], other, towns[a, b] * rng.lognormal(0.0, 0.05), rng.normal(size=3))
    return own


@pytest.fixture(scope="module")
def settled(towns):
    """The places of peers that all tell the truth."""
    return settle(towns)


def test_a_handful_of_pings_each_predicts_the_other_round_trips(towns, settled):
    """The median prediction over all pairs is within 10 %, and peers know about how good they are."""
    errors = [abs(round_trip_s(settled[a], settled[b]) / towns[a, b] - 1.0) for a in range(200) for b in range(a)]
    assert np.median(errors) < 0.10
    assert np.median([place.error for place in settled]) < 0.15


def test_a_newcomer_finds_its_place_with_few_pings(towns, settled):
    """Eight measured round trips, gone over several times, predict those to the other 191."""
    rng = np.random.default_rng(3)
    samples = [(settled[b], towns[0, b]) for b in rng.choice(np.arange(1, 200), 8, replace=False)]
    place = located(Place(), samples, rng.normal(size=(64, 3)))
    errors = [abs(round_trip_s(place, settled[b]) / towns[0, b] - 1.0) for b in range(1, 200)]
    assert np.median(errors) < 0.15


def far_away(round_):
    """The end of the world, and the other end of it the next time; known for certain."""
    return Place(position=((-1.0) ** round_ * MAX_COORDINATE_S, 0.0, 0.0), error=0.0)


def test_one_liar_among_eight_does_not_throw_the_others_from_their_places(towns):
    """All measure it each time, and are told with all certainty that it is where it can't be."""
    own = settle(towns, liar=0, lie=far_away)
    errors = [abs(round_trip_s(own[a], own[b]) / towns[a, b] - 1.0) for a in range(1, 200) for b in range(1, a)]
    assert np.median(errors) < 0.25


def test_a_newcomer_that_meets_a_liar_finds_its_place_roughly(towns, settled):
    """One of its eight measurements says nonsense."""
    rng = np.random.default_rng(3)
    samples = [(settled[b], towns[0, b]) for b in rng.choice(np.arange(1, 200), 8, replace=False)]
    samples[3] = far_away(0), 0.02
    place = located(Place(), samples, rng.normal(size=(64, 3)))
    errors = [abs(round_trip_s(place, settled[b]) / towns[0, b] - 1.0) for b in range(1, 200)]
    assert np.median(errors) < 0.5


@given(places, places, st.floats(-1.0, 1e9), st.tuples(*[st.floats(-1.0, 1.0)] * 3))
def test_whatever_others_claim_a_place_stays_in_range_and_moves_no_further_than_the_error(
    own, other, measured, direction
):
    """Liars can shift a place by no more than a part of what the measurement was off, nor than MAX_STEP_S."""
    new = moved(own, other, measured, direction)
    assert math.isfinite(round_trip_s(new, other))
    assert math.dist(new.position, own.position) <= 0.5 * abs(measured - round_trip_s(own, other)) + 1e-9
    assert math.dist(new.position, own.position) <= MAX_STEP_S + 1e-9


@given(places, places)
def test_a_measurement_brings_the_prediction_closer(own, other):
    """The prediction never overshoots the measured value."""
    measured = 0.05
    before, after = round_trip_s(own, other), round_trip_s(moved(own, other, measured, (1.0, 0.0, 0.0)), other)
    assert abs(after - measured) <= abs(before - measured) + 1e-4


@pytest.mark.parametrize(
    "bad", [{"position": (math.nan, 0.0, 0.0)}, {"height_s": -1.0}, {"error": math.inf}, {"position": (9.0, 0.0, 0.0)}]
)
def test_impossible_places_are_refused(bad):
    """NaN, negative heights and places beyond the world."""
    with pytest.raises(InvalidRequest):
        Place(**bad)
