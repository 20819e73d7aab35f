"""How busy a server says it is."""

import pytest

from swarm.server.load import WINDOW_S, LoadMeter


def test_waiting_is_load_and_fades():
    """Alone: none. Waiting as long as computing: half. An idle minute later: none."""
    meter = LoadMeter()
    for now in range(5):
        meter.record(float(now), queue_s=0.0, compute_s=0.1, num_tokens=1)
    assert meter.waiting_share(5.0) == 0.0
    for now in range(5, 100):
        meter.record(float(now), queue_s=0.1, compute_s=0.1, num_tokens=1)
    assert meter.waiting_share(100.0) == pytest.approx(0.5, abs=0.01)
    assert meter.tokens_per_s(100.0) == pytest.approx(1.0, rel=0.1)
    assert meter.waiting_share(100.0 + 10 * WINDOW_S) == 0.0 and meter.tokens_per_s(300.0) < 1e-6


def test_means_are_of_lately_and_nothing_is_no_time():
    """What batches took in the last seconds; zeros before the first and long after the last."""
    meter = LoadMeter()
    assert meter.mean_s(0.0) == (0.0, 0.0)
    for now in range(100):
        meter.record(float(now), queue_s=0.0, compute_s=1.0, num_tokens=1)
    for now in range(100, 200):
        meter.record(float(now), queue_s=0.02, compute_s=0.1, num_tokens=1)
    assert meter.mean_s(200.0) == pytest.approx((0.02, 0.1), rel=0.01)
    assert meter.mean_s(200.0 + 30 * WINDOW_S) == (0.0, 0.0)
