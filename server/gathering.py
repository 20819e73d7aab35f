"""How long a batch waits for decode rows that are about to come: a few big batches cost less than many small ones.

    answered(session) ─► away ─► returned(session): how long each session is away between two tokens
                                    └─► until(rows that are ready, cost of batches) ─► when to run

All rows of a batch leave at once, and come back one after the other: from the next servers and the client. Whoever runs
when the first is back splits them up, and the parts never meet again by themselves. So when each session will be back
is foretold from how long it was away before. With batches of n rows that take F + c * n, waiting for m more rows that
are here in h seconds lets all k + m finish at h + F + c * (k + m), instead of k at F + c * k and m one batch later:

    worth it where  h * (k + m) < m * (F - c * k)

which is never true of a session alone, nor of rows from far away or of a batch that is large already. A row that is
late is waited for while that is usual for it. Pure: time enters as `now`.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from swarm.server.step_cost import StepCost

PATIENCE = 1.0
"""How long to wait at most, in fixed costs of a batch."""
DECODING_S = 1.0
"""A session that was answered so recently is about to send its next token."""
GAIN = 0.25
"""Weight of the latest absence in a session's mean and deviation."""
LATE = 2.0
"""Deviations after which a session that is late is not expected any more."""
GRACE_S = 1e-4
"""A batch waits so much longer than until the moment that was foretold."""


@dataclass(slots=True)
class _Decoder:
    """A session that decodes."""

    num_rows: int
    answered_at: float = 0.0
    is_away: bool = False
    mean_s: float | None = None
    """How long it is away; None before it has come back once."""
    deviation_s: float = 0.0

    def learn(self, away_s: float) -> None:
        if self.mean_s is None:
            self.mean_s, self.deviation_s = away_s, away_s / 2
            return
        error = away_s - self.mean_s
        self.mean_s += GAIN * error
        self.deviation_s += GAIN * (abs(error) - self.deviation_s)

    def expected_at(self, now: float) -> float | None:
        """When it will be back; None where it is here, or nobody knows."""
        if not self.is_away or self.mean_s is None:
            return None
        expected = self.answered_at + self.mean_s
        if now <= expected:
            return expected
        return now + self.deviation_s if now <= expected + LATE * self.deviation_s else None


class Gathering:
    """Sessions that decode, and when each will be back.

    Args:
        patience: see PATIENCE; 0 for a server that never waits.
    """

    def __init__(self, patience: float = PATIENCE):
        self._patience = patience
        self._decoders: dict[Hashable, _Decoder] = {}
        """The one that was answered last at the end."""

    def answered(self, session: Hashable, num_rows: int, now: float) -> None:
        """A session got its decode step's outputs."""
        decoder = self._decoders.pop(session, None) or _Decoder(num_rows)
        decoder.answered_at, decoder.is_away = now, True
        self._decoders[session] = decoder

    def returned(self, session: Hashable, now: float) -> None:
        """A session has its next decode step ready."""
        decoder = self._decoders.get(session)
        if decoder is not None and decoder.is_away:
            decoder.is_away = False
            decoder.learn(now - decoder.answered_at)

    def forget(self, session: Hashable) -> None:
        """The session is over."""
        self._decoders.pop(session, None)

    def num_rows(self, now: float) -> int:
        """Rows that decode: they are here, or will be in a moment."""
        while self._decoders:
            session, decoder = next(iter(self._decoders.items()))
            if now - decoder.answered_at <= DECODING_S:
                break
            del self._decoders[session]
        return sum(decoder.num_rows for decoder in self._decoders.values())

    def until(self, num_ready: int, since: float, now: float, costs: StepCost) -> float:
        """When to run a batch of decode rows, unless more come before.

        Args:
            num_ready: rows that could run now.
            since: when the first of them could have run.
            now: the time; what is not after it means "at once".
            costs: of batches.
        """
        if not self._patience or not costs.is_measured:
            return now
        fixed_s, best_gain, best, num_more = costs.seconds(0, 0), 0.0, now, 0
        saved_s = fixed_s - (costs.seconds(num_ready, 0) - fixed_s)
        for expected, num_rows in self._coming(now):
            num_more += num_rows
            gain = num_more * saved_s - (num_ready + num_more) * (expected - now)
            if gain > best_gain:
                best_gain, best = gain, expected + GRACE_S
        return min(best, since + self._patience * fixed_s)

    def _coming(self, now: float) -> list[tuple[float, int]]:
        """(when, rows) of the sessions that are expected, the next one first."""
        found = [(decoder.expected_at(now), decoder.num_rows) for decoder in self._decoders.values()]
        return sorted((expected, num_rows) for expected, num_rows in found if expected is not None)
