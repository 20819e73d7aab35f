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
