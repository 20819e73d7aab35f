"""How quickly servers do a client's training, against what they announce and against each other. Pure.

    a server's answer ─► Pace.took ─► Pace.worked: seconds that work took, and should have taken; both fade
    Paces of all servers ─► typical ─► parts: how much of its free capacity each one is taken to have, 0 to 1

Only the client's own clock counts; no server is asked what its work took. What all servers have in common is held
against none: that training is slower than the prompts by which capacities are measured, that others train, too, or that
the client's own line is slow. So a server is compared with what servers typically gave of what they had announced.
Those that announce much are drawn often, and count for less in that: the typical server is one of the swarm, not one
of the routes.
"""

from collections.abc import Iterable, Mapping

PRIOR_S = 5.0
"""A server is taken to have done what is typical for so long, before anything was seen of it."""
HALF_LIFE_S = 300.0
"""How fast what was seen fades, so that a server which was slow is tried again."""
TOLERANCE = 1.5
"""A server that is slower than it should be by less than this factor is as it should be."""
FADED_S = 0.1
"""Less of what was seen makes no difference."""
LEAST_TYPICAL = 1e-3
"""No more than this is put down to what all have in common."""


class Pace:
    """What training of one client took at one server; `now` is a monotonic time in seconds."""

    def __init__(self) -> None:
        self.weight = 1.0
        """What the server counts in what is typical; less than 1 for one that announces more than others."""
        self._due_s = self._took_s = 0.0
        self._at = self._answered_at = float("-inf")

    def took(self, now: float, *, since: float, way_s: float) -> float:
        """The seconds that the server worked for an answer that has just come; waiting for other work of ours is none.

        Args:
            now: the time.
            since: when it got what it answers.
            way_s: to it and back, which an answer takes besides, as far as others were not waited for meanwhile.
        """
        waited_s = max(0.0, self._answered_at - since)
        self._answered_at = now
        return max(0.0, now - since - max(waited_s, way_s))

    def worked(self, now: float, *, due_s: float, took_s: float, weight: float) -> None:
        """It did what should have taken so long, and took so long. Being quicker makes up for little of later."""
        due_before_s, took_before_s = self.seen(now)
        self._took_s = took_before_s + took_s
        self._due_s = min(due_before_s + due_s, 2 * self._took_s + PRIOR_S)
        self._at, self.weight = now, weight

    def seen(self, now: float) -> tuple[float, float]:
        """Seconds that its work should have taken and that it took, lately."""
        left = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        return self._due_s * left, self._took_s * left

    def has_faded(self, now: float) -> bool:
        """Whether what was seen makes no difference any more."""
        return max(self.seen(now)) < FADED_S

    def part(self, now: float, typical: float) -> float:
        """How much of its free capacity it is taken to have, where this part of it is typical."""
        due_s, took_s = self.seen(now)
        part = (PRIOR_S + due_s / typical) / (PRIOR_S + took_s)
        return part if part < 1 / TOLERANCE else 1.0


def parts(paces: Mapping[str, Pace], now: float) -> dict[str, float]:
    """How much of their free capacity servers are taken to have; those that are missing have all of it."""
    typical = typical_part(paces.values(), now)
    found = {peer_id: pace.part(now, typical) for peer_id, pace in paces.items()}
    return {peer_id: part for peer_id, part in found.items() if part < 1.0}


def typical_part(paces: Iterable[Pace], now: float) -> float:
    """What a server typically gives of what it announces: a median, with one more server, that gives all."""
    ratios = [(1.0, 1.0)]
    for pace in paces:
        due_s, took_s = pace.seen(now)
        if took_s > 0.0:
            ratios.append((min(1.0, due_s / took_s), pace.weight * took_s / (took_s + PRIOR_S)))
    ratios.sort(reverse=True)
    left = sum(weight for _, weight in ratios) / 2
    for ratio, weight in ratios:
        left -= weight
        if left <= 0.0:
            return max(ratio, LEAST_TYPICAL)
    return LEAST_TYPICAL
