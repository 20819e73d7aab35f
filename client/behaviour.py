"""How one server behaved towards one client: failures, and what steps over it took, whatever it says of itself. Pure.

failed ────► penalty_s   seconds that a visit costs more, fading; hindered: until then, since its relays are busy
measured ──► block_s     what a block takes at present load, for a while
         └─► excess_s    what its visits take beyond all that was expected, fading
pace         what training took there, see `client.pace`
"""

from swarm.client.pace import Pace

PENALTY_S = 10.0
"""Cost that one failure adds to a visit ..."""
PENALTY_HALF_LIFE_S = 20.0
"""... and how fast it fades."""
MAX_PENALTIES = 32
MAX_HINDERED_S = 30.0
"""A relay's word counts no longer than this."""
FADED_S = 1e-3
"""Less than this makes no difference."""
SMOOTHING = 0.1
"""Weight of the newest measurement."""
MEASURED_S = 60.0
"""So long a measurement counts more than what the server announces."""
EXCESS_HALF_LIFE_S = 60.0
"""How fast an excess fades when the server is not used, so that it is tried again."""


class Behaviour:
    """What was seen of one server; `now` is a monotonic time in seconds."""

    def __init__(self) -> None:
        self.failed_at = float("-inf")
        self.pace = Pace()
        self._penalty_s = 0.0
        self._hindered_until = float("-inf")
        self._block_s = self._excess_s = 0.0
        self._measured_at = float("-inf")

    def failed(self, now: float) -> None:
        """It failed: it becomes costly for a while, longer when it failed before."""
        self._penalty_s = min(self._failures_s(now) + PENALTY_S, MAX_PENALTIES * PENALTY_S)
        self.failed_at = now

    def hindered(self, now: float, seconds: float) -> None:
        """There is no way to it for so long, which is not its fault: afterwards it is as it was."""
        self._hindered_until = now + min(seconds, MAX_HINDERED_S)

    def measured(self, now: float, *, block_s: float, surprise_s: float) -> None:
        """A step took so long per block, and so much longer than all that was expected, the excess included.

        Args:
            surprise_s: this server's share of that; less than 0 where the step was quicker.
        """
        known = self.block_s(now)
        self._block_s = block_s if known is None else (1 - SMOOTHING) * known + SMOOTHING * block_s
        self._excess_s = max(0.0, self.excess_s(now) + SMOOTHING * surprise_s)
        self._measured_at = now

    def penalty_s(self, now: float) -> float:
        """What its failures, and what hinders us, add to the cost of a visit."""
        return self._failures_s(now) + (PENALTY_S if now < self._hindered_until else 0.0)

    def has_faded(self, now: float) -> bool:
        """Whether nothing of it counts any more."""
        left_s = max(self.penalty_s(now), self.excess_s(now))
        return left_s < FADED_S and self.block_s(now) is None and self.pace.has_faded(now)

    def block_s(self, now: float) -> float | None:
        """Seconds per block and step; None where that was not measured lately."""
        return self._block_s if now - self._measured_at <= MEASURED_S else None

    def excess_s(self, now: float) -> float:
        """What its visits take beyond what was expected."""
        return self._excess_s and float(self._excess_s * 0.5 ** ((now - self._measured_at) / EXCESS_HALF_LIFE_S))

    def _failures_s(self, now: float) -> float:
        return self._penalty_s and float(self._penalty_s * 0.5 ** ((now - self.failed_at) / PENALTY_HALF_LIFE_S))
