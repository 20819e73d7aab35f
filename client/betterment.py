"""Whether a session should leave a server for a quicker one, and when: pure, the time comes in as `now`.

    Outlook: the present chain, chains with one other server ─┐
    Decoding: what steps take, how many come ─────────────────┴─► Betterment.look ─► Prospect | None ─► a move
                                                                     ▲── moved, failed ──────────────────┘

A gain counts when it is large beside what a step takes, by prediction as by measurement, and when the steps that are
to come earn what the move costs several times over. It must be seen at several looks, at new records each. Then it
waits: when a new server has joined, a thousand clients see it at once, and whoever goes there makes it slower. So
clients go like a TCP window opens: few in the first half minute, twice as many in the next. Records show every 20 s
what that does to the server, and who has not gone yet thinks again. At last, a session that has moved stays for
minutes, and never goes back: what was wrong about a server once is not tried twice. One whose moves fail tries ever
more seldom, and all sessions of its client ask for more before they try.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swarm.client.prospects import Outlook, Prospect
from swarm.types import Hop

GAIN_SHARE = 0.25
"""Part of a step's time that a move has to save ..."""
GAIN_FLOOR_S = 0.003
"""... and at least so much per step."""
PAYBACK = 3.0
"""So many times over the steps to come must earn what the move costs."""
MAX_STILL_S = 6.0
"""For the sake of speed nobody is made to wait longer at once."""
NUM_LOOKS = 3
"""Looks in a row, each at new records, that must show the gain."""
DOUBLING_S = 30.0
"""In so much time twice as many clients go to the same server ..."""
NUM_DOUBLINGS = 4
"""... until, after so many, all have gone that still want to."""
SETTLE_S = 300.0
"""A session that has moved stays for so long."""
RETRY_S = 60.0
"""So long it stays when a move has failed, twice as long after the next one, and so on ..."""
MAX_RETRY_S = 3600.0
"""... up to this, until one succeeds."""
MOVE_S = 0.5
"""What a move costs a session beside the bytes: the last words of one server, the first of the other."""
TOKEN_BLOCK_S = 4096 * 8 / 100e6
"""Before any move was measured: 8 heads of 128 keys and values in 16 bits, at 100 Mbit/s."""
SMOOTHING = 0.3
"""Weight of the newest move."""
MIN_CHANCE = 0.05
"""However many tries have failed, one in so many is taken to succeed: else nobody would ever find out otherwise."""


class MoveCosts:
    """What moves cost the sessions of one client, by what became of earlier ones."""

    def __init__(self) -> None:
        self._token_block_s = TOKEN_BLOCK_S
        self._chance = 1.0
        """That a try succeeds."""

    def measured(self, hop: Hop, num_tokens: int, seconds: float) -> None:
        """A hop of a session with so many tokens has moved, and the session stood still for so long."""
        known = self._token_block_s
        found = max(0.0, seconds - MOVE_S) / max(1, num_tokens * len(hop.blocks))
        self._token_block_s = (1 - SMOOTHING) * known + SMOOTHING * found
        self._chance += SMOOTHING * (1.0 - self._chance)

    def failed(self) -> None:
        """A try has come to nothing: it is taken to have cost what a move does."""
        self._chance = max(MIN_CHANCE, (1 - SMOOTHING) * self._chance)

    def expected_s(self, hop: Hop, num_tokens: int) -> float:
        """How long a session with so many tokens will stand still."""
        return MOVE_S + self._token_block_s * num_tokens * len(hop.blocks)

    def price_s(self, hop: Hop, num_tokens: int) -> float:
        """The same, with all tries that it takes until one succeeds."""
        return self.expected_s(hop, num_tokens) / self._chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a session goes."""

    hop_s: Mapping[Hop, float]
    """What each hop had of the latest steps, with its ways."""
    num_steps: int
    """Steps that it has done; about as many will follow ..."""
    num_left: int
    """... if there is room for them."""
    num_tokens: int
    """Of all rows, that would have to move."""
    costs: MoveCosts


class Betterment:
    """The decision, for one session.

    Args:
        generator: draws how long this client waits.
    """

    def __init__(self, generator: np.random.Generator):
        self._generator = generator
        self._seen: dict[tuple[Hop, Hop], int] = {}
        """How many looks in a row have shown a gain."""
        self._version: int | None = None
        self._due = 0.0
        self._stays_until = float("-inf")
        self._num_failures = 0
        """Since it moved last."""
        self._ruled_out: set[str] = set()

    def look(self, now: float, outlook: Outlook, decoding: Decoding) -> Prospect | None:
        """The move to make now, if any; the caller tells what became of it.

        Args:
            now: the time in seconds, as in all methods.
            outlook: a look at records that were already looked at changes nothing.
            decoding: the session.
        """
        if outlook.version == self._version:
            return None
        self._version = outlook.version
        if now < self._stays_until:
            return None
        had_lasted = self._lasts
        better = [it for it in outlook.prospects if self._is_worth_it(it, outlook, decoding)]
        self._seen = {(it.hop, it.target): self._seen.get((it.hop, it.target), 0) + 1 for it in better}
        if not self._lasts:
            return None
        if not had_lasted:
            self._due = now + self._wait_s()
        lasting = [it for it in better if self._seen[it.hop, it.target] >= NUM_LOOKS]
        return min(lasting, key=lambda it: it.predicted_s) if now >= self._due else None

    def moved(self, now: float, left: str | None = None) -> None:
        """The session has moved: away from `left` for this, or because a server wanted it."""
        self._num_failures = 0
        self._rest(now + SETTLE_S)
        if left is not None:
            self._ruled_out.add(left)

    def failed(self, now: float, target: str) -> None:
        """The server did not take it; the session is where it was, and rests the longer the more often that happens."""
        self._rest(now + min(MAX_RETRY_S, RETRY_S * 2.0 ** min(self._num_failures, 32)))
        self._num_failures += 1
        self._ruled_out.add(target)

    def _rest(self, until: float) -> None:
        self._seen, self._stays_until = {}, max(until, self._stays_until)

    @property
    def _lasts(self) -> bool:
        return any(count >= NUM_LOOKS for count in self._seen.values())

    def _is_worth_it(self, prospect: Prospect, outlook: Outlook, decoding: Decoding) -> bool:
        if prospect.target.peer_id in self._ruled_out:
            return False
        gain_s = gain_per_step_s(prospect, outlook, decoding)
        if gain_s < max(GAIN_FLOOR_S, GAIN_SHARE * sum(decoding.hop_s.values())):
            return False
        num_steps = min(decoding.num_steps, decoding.num_left)
        still_s = decoding.costs.expected_s(prospect.hop, decoding.num_tokens)
        price_s = decoding.costs.price_s(prospect.hop, decoding.num_tokens)
        return still_s <= MAX_STILL_S and gain_s * num_steps >= PAYBACK * price_s

    def _wait_s(self) -> float:
        """A time at random, later ones exponentially more likely."""
        ahead = self._generator.uniform() * (2.0**NUM_DOUBLINGS - 1.0)
        return DOUBLING_S * float(np.log2(1.0 + ahead))


def gain_per_step_s(prospect: Prospect, outlook: Outlook, decoding: Decoding) -> float:
    """What a step is expected to save: the predicted part of what it was measured to take, where that is less.

    Predictions are compared with each other alone, so that what both have wrong drops out. No more can be saved than
    what the hop has of a step.
    """
    saved_s = outlook.predicted_s - prospect.predicted_s
    if saved_s <= 0.0:
        return 0.0
    measured_s, hop_s = sum(decoding.hop_s.values()), decoding.hop_s.get(prospect.hop, 0.0)
    return min(saved_s * min(1.0, measured_s / outlook.predicted_s), hop_s)
