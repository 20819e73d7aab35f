"""Where peers are in the network: points whose distances predict round trips that nobody has measured.

Vivaldi (Dabek et al., SIGCOMM 2004): three dimensions and a height, which stands for the way from a peer to the
network's core. Each peer measures a few others, and moves itself a little after each measurement, so that ten thousand
peers know their distances with a handful of pings each.

    measured round trip to a peer, its place ─moved─► our place ─announced─► round_trip_s(any peer, any other)

Pure; knows neither peers nor messages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import InvalidRequest

NUM_DIMENSIONS = 3
MAX_COORDINATE_S = 3.0
"""Places further from the origin than this are refused; a round trip round the world takes 0.3 s."""
MAX_SAMPLE_S = 5.0
"""Longer round trips say something about a peer's trouble, not about its place."""
MIN_HEIGHT_S = 1e-5
GAIN = 0.5
"""Part of the error that one measurement against a place without errors removes."""
MIN_ERROR = 0.1
"""No place of another peer is trusted more than if it were known this well, whatever the peer says ..."""
MAX_STEP_S = 0.02
"""... and no measurement moves ours further: one liar among several neighbours is outvoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point in the space of round trips.

    Attributes:
        position: three coordinates in seconds.
        height_s: part of every round trip that does not depend on where the other one is.
        error: how far off, relatively, this place's predictions are; 1 for one that is not known yet.

    Raises:
        InvalidRequest: for a coordinate, height or error out of range.
    """

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    height_s: float = MIN_HEIGHT_S
    error: float = 1.0

    def __post_init__(self) -> None:
        if not all(-MAX_COORDINATE_S <= x <= MAX_COORDINATE_S for x in self.position):
            raise InvalidRequest(f"position {self.position}, limit {MAX_COORDINATE_S} s")
        if not (0.0 <= self.height_s <= MAX_COORDINATE_S and 0.0 <= self.error <= 1.0):
            raise InvalidRequest(
                f"height {self.height_s} s and error {self.error}, ranges 0..{MAX_COORDINATE_S} and 0..1"
            )


def round_trip_s(a: Place, b: Place) -> float:
    """The predicted round trip between two places."""
    return math.dist(a.position, b.position) + a.height_s + b.height_s


def moved(own: Place, other: Place, measured_s: float, direction: Sequence[float]) -> Place:
    """Our place after a measurement.

    Args:
        own: where we were.
        other: where the other says that it is.
        measured_s: the round trip to it.
        direction: three random numbers, for the first step apart of two peers at the same point.
    """
    if not 0.0 < measured_s <= MAX_SAMPLE_S:
        return own
    predicted_s = round_trip_s(own, other)
    sample_error = min(1.0, abs(predicted_s - measured_s) / measured_s)
    weight = own.error / (own.error + max(other.error, MIN_ERROR))
    error = min(1.0, sample_error * GAIN * weight + own.error * (1.0 - GAIN * weight))
    step_s = min(max(GAIN * weight * (measured_s - predicted_s), -MAX_STEP_S), MAX_STEP_S)
    scale = step_s / max(predicted_s, MIN_HEIGHT_S)
    distance_s = predicted_s - own.height_s - other.height_s
    shift_s = scale * distance_s
    if distance_s < MIN_HEIGHT_S:  # at the same point: half of a step apart goes in any direction
        shift_s = 0.5 * max(step_s, 0.0)
    position = [
        _clamped(x + shift_s * unit) for x, unit in zip(own.position, _away(own, other, direction), strict=True)
    ]
    height_s = own.height_s + scale * (own.height_s + other.height_s)
    return Place(
        position=(position[0], position[1], position[2]),
        height_s=min(max(height_s, MIN_HEIGHT_S), MAX_COORDINATE_S),
        error=error,
    )


def located(own: Place, samples: Sequence[tuple[Place, float]], directions: Sequence[Sequence[float]]) -> Place:
    """Our place after going over the same few measurements again and again, once per direction: for newcomers.

    Args:
        own: where we were.
        samples: places of others and the measured round trips to them.
        directions: three random numbers per step.
    """
    for index, direction in enumerate(directions if samples else ()):
        own = moved(own, *samples[index % len(samples)], direction)
    return own


def _away(own: Place, other: Place, direction: Sequence[float]) -> list[float]:
    """The unit vector from the other to us, or in a random direction where there is none."""
    difference = [a - b for a, b in zip(own.position, other.position, strict=True)]
    if math.hypot(*difference) < MIN_HEIGHT_S:
        difference = list(direction)
    length = math.hypot(*difference)
    return [x / length for x in difference] if length > 0 else [1.0, 0.0, 0.0]


def _clamped(value: float) -> float:
    return min(max(value, -MAX_COORDINATE_S), MAX_COORDINATE_S)
