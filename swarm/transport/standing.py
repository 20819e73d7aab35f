"""Whether others can connect to us, as far as we know, and when to ask some of them again. Pure: time comes as `now`.

    what those who were asked say ─► heard ─┐
    somebody has connected to us  ─► came  ─┼─► is_reachable, host; due_at: when to ask next
    our network seems changed     ─► hint  ─┘

It does not follow every word. What speaks against what is known must be said twice in a row, and three times before we
take ourselves for reachable again, which must wait longer after each change: so a router that comes and goes does not
have the swarm told of it every minute. Whoever connects to us from outside proves more than anybody's word.
"""

import ipaddress
from dataclasses import dataclass
from random import Random

PERIOD_S = 900.0
"""How often some are asked while nothing speaks against what is known; while others connect to us, every ..."""
MAX_UNASKED_S = 3600.0
"""... so often: they show one port of two."""
CONFIRM_S = 20.0
"""How soon they are asked again when something does. Each of them answers every 15 s."""
NUM_LOST, NUM_FOUND = 2, 3
"""Verdicts in a row that make us hidden, or reachable at another address; and reachable where we were not."""
HOLD_S, MAX_HOLD_S = 120.0, 3600.0
"""After a change we don't become reachable (elsewhere) for so long, twice as long after each one more ..."""
CALM_S = 3600.0
"""... in so many seconds."""
MAX_MUTE = 8
"""So often the time until then doubles while nobody can tell."""
JITTER = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What others said of us.

    Attributes:
        is_reachable: whether most of them could connect to us.
        host: the address under which most of them see us.
        num_answers: how many could tell.
    """

    is_reachable: bool
    host: str
    num_answers: int


class Standing:
    """What we know of ourselves.

    Args:
        verdict: what others said first; None where nobody could tell.
        rng: spreads the questions of many peers over time.
        now: the time in seconds, as in all methods.
    """

    def __init__(self, verdict: Verdict | None, rng: Random, now: float) -> None:
        self.is_known = verdict is not None
        """Whether anybody has said or shown that it is so."""
        self.is_reachable = verdict is None or verdict.is_reachable
        self.host = "" if verdict is None else verdict.host
        """Where others see us; empty while nobody has said."""
        self._rng = rng
        self._against: tuple[bool, str] | None = None
        """What was said last, where that is not what is known ..."""
        self._num_against = 0
        """... and how often in a row."""
        self._hinted_at = float("-inf")
        """When a change was hinted at that nobody has spoken of since."""
        self._num_mute = 0
        """How often in a row nobody could tell whether there was one."""
        self._changes: list[float] = []
        self._held_until = self._asked_at = float("-inf")
        self.due_at = now
        """When to ask."""
        self._answered(now)

    def heard(self, verdict: Verdict | None, now: float, *, asked_at: float | None = None) -> bool:
        """Some were asked, at that time or now; whether something is known now that was not."""
        self._answered(now)
        if verdict is None or self._is_narrow(verdict):
            if self._num_against or self._hinted_at > float("-inf"):
                self._ask_on(now)
            return False
        self._num_mute = 0
        if self._hinted_at <= (now if asked_at is None else asked_at):
            self._hinted_at = float("-inf")
        is_news = self._said(verdict, now)
        if self._hinted_at > float("-inf"):  # while they were asked: what they say may be of before
            self.due_at = min(self.due_at, now + self._spread(CONFIRM_S))
        return is_news

    def _said(self, verdict: Verdict, now: float) -> bool:
        said = verdict.is_reachable, verdict.host if verdict.is_reachable else ""
        if said == (self.is_reachable, self.host if self.is_reachable else ""):
            return self._confirmed(verdict.host)
        if verdict.is_reachable and now < self._held_until:
            self.due_at = self._held_until + self._spread(CONFIRM_S)
            return False
        self._num_against = self._num_against + 1 if said == self._against else 1
        self._against = said
        if self._num_against < (NUM_FOUND if verdict.is_reachable and not self.is_reachable else NUM_LOST):
            self.due_at = now + self._spread(CONFIRM_S)
            return False
        self.is_reachable, self.host = verdict.is_reachable, verdict.host
        self._confirmed(verdict.host)
        self._hold(now)
        return True

    def came(self, host: str, now: float) -> bool:
        """Somebody has connected to us from this address; whether something is known now that was not."""
        if not self.is_reachable:
            if _is_public(host):
                self.hint(now)  # one of two ports is open
            return False
        if not self._is_outside(host) or self._num_against:  # one of two ports may be closed by now
            return False
        self.due_at = max(self.due_at, min(now + self._spread(PERIOD_S), self._asked_at + MAX_UNASKED_S))
        return self._confirmed(self.host)

    def hint(self, now: float) -> None:
        """Something speaks for a change: ask soon."""
        self._hinted_at = now
        soon = max(now, self._asked_at + CONFIRM_S)
        self.due_at = min(self.due_at, soon if self.is_reachable else max(soon, self._held_until))

    def _answered(self, now: float) -> None:
        self._asked_at = now
        self.due_at = now + self._spread(PERIOD_S)

    def _ask_on(self, now: float) -> None:
        """Nobody could tell, but something is to be told: ask again soon, then ever more seldom."""
        self.due_at = min(self.due_at, now + self._spread(CONFIRM_S) * 2.0**self._num_mute)
        self._num_mute = min(self._num_mute + 1, MAX_MUTE)

    def _confirmed(self, host: str) -> bool:
        is_news, self.is_known, self.host = not self.is_known, True, host
        self._against, self._num_against = None, 0
        return is_news

    def _hold(self, now: float) -> None:
        self._changes = [at for at in self._changes if at > now - CALM_S] + [now]
        self._held_until = now + min(HOLD_S * 2.0 ** (len(self._changes) - 1), MAX_HOLD_S)

    def _is_narrow(self, verdict: Verdict) -> bool:
        """Whether only neighbours spoke, while others have seen us in the world."""
        return _is_public(self.host) and not _is_public(verdict.host)

    def _is_outside(self, host: str) -> bool:
        """Whether who comes from there is no neighbour; in a swarm that is private addresses only, nobody is."""
        if host == self.host or ipaddress.ip_address(host).is_loopback:
            return False
        return _is_public(host) or (bool(self.host) and not _is_public(self.host))

    def _spread(self, seconds: float) -> float:
        return seconds * (1.0 + JITTER * (2.0 * self._rng.random() - 1.0))


def _is_public(host: str) -> bool:
    return bool(host) and ipaddress.ip_address(host).is_global
