"""What fetching weights takes is told from what loading them takes, and how fast they come is learnt."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.weight_files import DOWNLOAD_BYTES_PER_S, MIN_S, MeasuredFiles, later_rate

rates = st.floats(1.0, 1e12)


class FakeHub:
    """Files that come at a rate, and take a while to be looked at once they are here."""

    def __init__(self, directory: Path, bytes_per_s: float):
        self.now, self._directory, self._bytes_per_s = 0.0, directory, bytes_per_s

    def fetch(self, shards):
        return {shard: self._fetch(shard) for shard in shards}

    def is_here(self, shard):
        return (self._directory / shard).is_file()

    def _fetch(self, shard):
        path, num_bytes = self._directory / shard, int(shard)
        if self.is_here(shard):
            self.now += 1.0
        else:
            with path.open("wb") as file:
                file.truncate(num_bytes)
            self.now += num_bytes / self._bytes_per_s
        return path


def test_a_large_file_says_how_fast_files_come(tmp_path):
    """Ten minutes of downloading at 5 MB/s count for all that was thought before."""
    hub = FakeHub(tmp_path, 5e6)
    files = MeasuredFiles(hub, clock=lambda: hub.now)
    assert files.bytes_per_s == DOWNLOAD_BYTES_PER_S
    assert files.fetch(["3000000000"]) == {"3000000000": tmp_path / "3000000000"}
    assert files.bytes_per_s == pytest.approx(5e6) and files.seconds == pytest.approx(600.0)


def test_files_that_are_here_say_nothing_of_the_network(tmp_path):
    """They take their time all the same, which is none of loading."""
    hub = FakeHub(tmp_path, 5e6)
    (tmp_path / "70").write_bytes(bytes(70))
    files = MeasuredFiles(hub, clock=lambda: hub.now)
    assert files.is_here("70") and not files.is_here("80")
    files.fetch(["70"])
    assert files.bytes_per_s == DOWNLOAD_BYTES_PER_S and files.seconds == 1.0


def test_many_small_files_say_little(tmp_path):
    """What they take is the way to the hub and back."""
    rate = DOWNLOAD_BYTES_PER_S
    for _ in range(5):
        rate = later_rate(rate, 1000, 0.1)
    assert rate > 0.9 * DOWNLOAD_BYTES_PER_S


@given(rates, st.integers(0, 1 << 50), st.floats(0.0, 1e6))
def test_the_rate_stays_between_what_was_thought_and_what_was_seen(before, num_bytes, seconds):
    """And it is never nothing: something is divided by it."""
    after = later_rate(before, num_bytes, seconds)
    seen = num_bytes / max(seconds, MIN_S) if num_bytes else before
    assert min(before, seen) * (1 - 1e-9) <= after <= max(before, seen) * (1 + 1e-9) and after > 0
