"""A server that starts waits for a DHT that is slow, and for nothing else."""

import logging

import pytest

from swarm.errors import CheckpointMismatch, PeerTimeout
from swarm.server.patience import FIRST_PAUSE_S, MAX_PAUSE_S, PATIENCE_S, patiently


class Slow:
    """Answers after some failures; time passes while it is waited for."""

    def __init__(self, num_failures: float, error: Exception) -> None:
        self.now, self.num_failures, self.error, self.pauses = 0.0, num_failures, error, list[float]()

    async def ask(self) -> str:
        if len(self.pauses) < self.num_failures:
            self.now += 3.0
            raise self.error
        return "answer"

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    async def answered(self) -> str:
        return await patiently(self.ask, now=lambda: self.now, sleep=self.sleep)


async def test_a_slow_dht_is_asked_again_and_the_owner_is_told(caplog: pytest.LogCaptureFixture):
    """After growing pauses, each of which it announces."""
    slow = Slow(4, PeerTimeout("nobody has answered"))
    with caplog.at_level(logging.WARNING):
        assert await slow.answered() == "answer"
    assert slow.pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, MAX_PAUSE_S]
    assert "the DHT does not answer yet (nobody has answered): trying again in 10 s" in caplog.messages


async def test_patience_ends_after_minutes_with_the_reason():
    """In one line."""
    slow = Slow(float("inf"), PeerTimeout("nobody has answered"))
    with pytest.raises(PeerTimeout, match=r"gave up after \d+ s: nobody has answered"):
        await slow.answered()
    assert PATIENCE_S - MAX_PAUSE_S - 3.0 <= slow.now <= PATIENCE_S


async def test_what_trying_again_would_not_mend_ends_it_at_once():
    slow = Slow(1, CheckpointMismatch("other content"))
    with pytest.raises(CheckpointMismatch):
        await slow.answered()
    assert slow.pauses == []
