"""Where a server does most good: which blocks a new one takes, and when another one should move.

    records ─► Holdings ─► Survey: share of each block, value of the swarm
                              ├─► choose_span   a newcomer: where the swarm gains most
                              └─► decide_move   a server: where it would gain more, if that is worth a reload

The *value* of a swarm is a soft minimum of the shares of its blocks (`swarm.shares`): nearly its throughput, but it
also grows when one of two equally weak places is helped. It is measured in tokens per second. Pure: no clock, no
randomness; who may move when, so that not everybody does at once, is the business of `swarm.leases`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from swarm.shares import MAX_MEDIANS, Floats, Ints, shares_of
from swarm.types import BlockRange

SHARPNESS = 4.0
"""Exponent of the soft minimum."""
FLOOR = 1e-3
"""Part of the mean share that a block without servers is taken to have, to tell one gap from two."""
NUM_TRIALS = 6
"""Spans that look best by a quick estimate, of which the best by exact shares is taken ..."""
SPACING = 0.2
"""... and that are by this part of their length apart, where there are enough: neighbours are much alike."""
HYSTERESIS = 0.25
"""A move must gain this part of the server's own capacity, spread over the model ..."""
SMALL_GAIN = 0.1
"""... or, if that is less, this part of what the swarm is worth ..."""
MEAN_GAIN = 0.5
"""... but in any case this part of what a server brings the swarm on average."""
HORIZON_S = 3600.0
"""Time in which a move must earn what it costs."""
MAX_RIVALS = 8
"""Others of which it is found out whether they would do more good."""
SESSION_TOKENS = 512
"""What moving a session costs: the tokens that have to be run again, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one server holds, or is about to."""

    peer_id: str
    blocks: BlockRange
    capacity_tps: float
    """Tokens per second through one block, with full batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A span, and what it does for the swarm."""

    blocks: BlockRange
    before_tps: float
    """The swarm's throughput without the server ..."""
    after_tps: float
    """... and with it."""
    missing: tuple[int, ...]
    """Blocks that nobody serves then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A server should move."""

    blocks: BlockRange
    gain_tps: float
    cost_tokens: float
    fills_gap: bool
    """Whether it serves blocks that nobody serves: that comes first."""
    opens_gap: bool
    """Whether it leaves others to nobody, though fewer: somebody else may do better."""
    num_missing: int
    """Blocks that nobody serves then."""
    capacity_part: float
    """What part of the swarm's capacity is out of use while this server loads."""


class Survey:
    """The state of a swarm.

    Args:
        holdings: of all servers, those that load included.
        num_blocks: of the model.
    """

    def __init__(self, holdings: Sequence[Holding], num_blocks: int):
        self.holdings = tuple(holdings)
        self.num_blocks = num_blocks
        self._starts = np.array([holding.blocks.start for holding in holdings], dtype=np.int64)
        self._ends = np.array([holding.blocks.end for holding in holdings], dtype=np.int64)
        self._claimed_tps = np.array([holding.capacity_tps for holding in holdings], dtype=np.float64)

    @cached_property
    def shares(self) -> Floats:
        """Tokens per second that each block gets."""
        return shares_of(self._starts, self._ends, self._capacities_tps, self.num_blocks)

    @cached_property
    def _capacities_tps(self) -> Floats:
        """The capacities, cut to a multiple of their median."""
        limit_tps = MAX_MEDIANS * float(np.median(self._claimed_tps)) if self.holdings else 0.0
        return np.minimum(self._claimed_tps, limit_tps) if limit_tps > 0 else self._claimed_tps

    def capacity_part(self, own: Holding) -> float:
        """One server's part of all capacity."""
        total_tps = float(self._capacities_tps.sum())
        return min(1.0, own.capacity_tps / total_tps) if total_tps > 0 else 1.0

    @property
    def throughput_tps(self) -> float:
        """Tokens per second through all blocks."""
        return float(self.shares.min())

    @cached_property
    def value_tps(self) -> float:
        """The soft minimum of the shares; above 0 only when there is a server."""
        return _value(self.shares, self.floor_tps)

    @cached_property
    def floor_tps(self) -> float:
        """What is added to every share."""
        return FLOOR * max(float(self._capacities_tps.sum()), 1.0) / self.num_blocks

    @cached_property
    def missing(self) -> NDArray[np.bool_]:
        """Of each block, whether nobody holds it."""
        size = self.num_blocks + 1
        changes = np.bincount(self._starts, minlength=size) - np.bincount(self._ends, minlength=size)
        is_missing: NDArray[np.bool_] = changes.cumsum()[:-1] == 0
        return is_missing

    @property
    def num_missing(self) -> int:
        """Blocks that nobody holds."""
        return int(self.missing.sum())

    @property
    def weakest(self) -> BlockRange:
        """The first run of blocks with the smallest share."""
        is_weak = self.shares <= self.shares.min() * (1 + 1e-6)
        start = int(is_weak.argmax())
        end = start + 1
        while end < self.num_blocks and is_weak[end]:
            end += 1
        return BlockRange(start, end)

    def need(self) -> Floats:
        """How much the value grows with the share of each block, relative to a balanced swarm."""
        weights: Floats = (self.value_tps / (self.shares + self.floor_tps)) ** (SHARPNESS + 1)
        return weights

    def most_gains_tps(self) -> Floats:
        """A bound of what each server could gain by a move.

        The value is concave in the shares, so its gradient bounds the gain. A server works for the neediest blocks of
        its span already; elsewhere it could at best work for the neediest of all.
        """
        need, blocks = self.need(), np.arange(self.num_blocks)
        neediest = np.maximum.accumulate(np.where(blocks >= blocks[:, None], need, 0.0), axis=1)  # [first, last]
        bounds: Floats = (need.max() - neediest[self._starts, self._ends - 1]) * self._claimed_tps / self.num_blocks
        return bounds

    def without(self, peer_id: str) -> Self:
        """The swarm without one server."""
        index = next((at for at, it in enumerate(self.holdings) if it.peer_id == peer_id), None)
        if index is None:
            return self
        return self._of(
            (*self.holdings[:index], *self.holdings[index + 1 :]),
            np.delete(self._starts, index),
            np.delete(self._ends, index),
            np.delete(self._claimed_tps, index),
        )

    def plus(self, holding: Holding) -> Self:
        """The swarm with one server more."""
        return self._of(
            (*self.holdings, holding),
            np.append(self._starts, holding.blocks.start),
            np.append(self._ends, holding.blocks.end),
            np.append(self._claimed_tps, holding.capacity_tps),
        )

    def _of(self, holdings: tuple[Holding, ...], starts: Ints, ends: Ints, claimed_tps: Floats) -> Self:
        """Another swarm of the same model, by columns that are made already: in large swarms that is most of it."""
        other = type(self).__new__(type(self))
        other.holdings, other.num_blocks = holdings, self.num_blocks
        other._starts, other._ends, other._claimed_tps = starts, ends, claimed_tps
        return other


def choose_span(survey: Survey, length: int, capacity_tps: float, peer_id: str = "") -> Choice:
    """Where a newcomer with room for `length` blocks does most good; the lowest blocks among equals."""
    trials = [
        (survey.plus(Holding(peer_id=peer_id, blocks=blocks, capacity_tps=capacity_tps)), blocks)
        for blocks in _promising(survey, length, capacity_tps)
    ]
    after, blocks = max(trials, key=lambda trial: (-trial[0].num_missing, round(trial[0].value_tps, 9)))
    return Choice(
        blocks=blocks,
        before_tps=survey.throughput_tps,
        after_tps=after.throughput_tps,
        missing=tuple(np.flatnonzero(after.missing).tolist()),
    )


def decide_move(
    survey: Survey, own: Holding, *, reload_s: Sequence[float], num_sessions: int, length: int | None = None
) -> Move | None:
    """Whether and where a server should move; None to stay.

    It moves when that serves blocks which nobody serves, and leaves fewer behind; or when the gain, from when it has
    loaded to HORIZON_S from now, exceeds what the swarm and its sessions lose meanwhile, and is no trifle. It never
    opens a gap for the sake of more throughput.

    Args:
        survey: the swarm, with this server in it.
        own: this server's holding.
        reload_s: seconds to load blocks [i, i + length) for each i.
        num_sessions: that it carries.
        length: how many blocks it can hold; as many as it does by default.
    """
    length = length or len(own.blocks)
    if not survey.num_missing and not may_gain(survey, own, num_sessions):
        return None
    rest = survey.without(own.peer_id)
    moves = []
    earning = [max(0.0, HORIZON_S - seconds) / HORIZON_S for seconds in reload_s[: survey.num_blocks - length + 1]]
    for blocks in _promising(rest, length, own.capacity_tps, earning):
        after = rest.plus(replace(own, blocks=blocks))
        loading_s = reload_s[blocks.start]
        gain_tps = after.value_tps - survey.value_tps
        cost_tokens = loading_s * max(0.0, survey.value_tps - rest.value_tps) + num_sessions * SESSION_TOKENS
        profit_tokens = gain_tps * HORIZON_S * earning[blocks.start] - cost_tokens
        fills_gap = after.num_missing < survey.num_missing
        is_worth_it = gain_tps >= least_gain_tps(survey, own) and profit_tokens > 0
        leaves_gap = rest.num_missing > survey.num_missing
        if blocks != own.blocks and (fills_gap or (is_worth_it and not leaves_gap)):
            opens_gap = bool((after.missing & ~survey.missing).any())
            move = Move(
                blocks=blocks,
                gain_tps=gain_tps,
                cost_tokens=cost_tokens,
                fills_gap=fills_gap,
                opens_gap=opens_gap,
                num_missing=after.num_missing,
                capacity_part=survey.capacity_part(own),
            )
            moves.append((-after.num_missing, profit_tokens, move))
    return max(moves, key=lambda found: found[:2])[2] if moves else None


def still_fills(survey: Survey, own: Holding, blocks: BlockRange) -> bool:
    """Whether a server that has said where it goes still leaves fewer blocks missing by that.

    Another move may be a little better by now; but others count on this one, and leave the gap to it.

    Args:
        survey: the swarm as it is now, with this server in it.
        own: this server's holding.
        blocks: where it goes.
    """
    after = survey.without(own.peer_id).plus(replace(own, blocks=blocks))
    return after.num_missing < survey.num_missing


def better_movers(survey: Survey, own: Holding, move: Move, *, reload_s: float, enough: int = MAX_RIVALS) -> int:
    """How many others, of those that could gain most, would do the swarm more good by a move than this one.

    They are taken to load as fast and to hold as much as now; whether they may move at all is not known.

    Args:
        survey: the swarm, with this server in it.
        own: this server's holding.
        move: what it would do.
        reload_s: seconds to load other blocks.
        enough: so many are not counted further.
    """
    most_tps = survey.most_gains_tps()
    best = [(most_tps[index], survey.holdings[index]) for index in np.argsort(-most_tps)[: MAX_RIVALS + 1]]
    count = 0
    for bound_tps, other in [pair for pair in best if pair[1].peer_id != own.peer_id][:MAX_RIVALS]:
        is_hopeless = not survey.num_missing and bound_tps <= move.gain_tps  # as are all that follow
        if count >= enough or is_hopeless:
            break
        theirs = decide_move(survey, other, reload_s=[reload_s] * survey.num_blocks, num_sessions=0)
        count += theirs is not None and _is_better(theirs, move)
    return count


def _is_better(one: Move, other: Move) -> bool:
    if one.num_missing != other.num_missing:
        return one.num_missing < other.num_missing
    return one.gain_tps > other.gain_tps * (1 + 1e-6)


def may_gain(survey: Survey, own: Holding, num_sessions: int) -> bool:
    """Whether a move could gain enough; if not, there is no need to look closer."""
    need = survey.need()
    difference = float(need.max() - need[own.blocks.start : own.blocks.end].max())
    most_tps = difference * own.capacity_tps / survey.num_blocks  # as `Survey.most_gains_tps`
    return most_tps >= least_gain_tps(survey, own) and most_tps * HORIZON_S > num_sessions * SESSION_TOKENS


def least_gain_tps(survey: Survey, own: Holding) -> float:
    """Smaller gains are no reason to move."""
    least_tps = min(HYSTERESIS * own.capacity_tps / survey.num_blocks, SMALL_GAIN * survey.value_tps)
    return max(least_tps, MEAN_GAIN * survey.value_tps / len(survey.holdings))


def _promising(
    survey: Survey, length: int, capacity_tps: float, earning: Sequence[float] | None = None
) -> list[BlockRange]:
    """The spans that gain most when the server's capacity just fills up the lowest shares, best first.

    Args:
        survey: the swarm without it.
        length: of the spans.
        capacity_tps: of the server.
        earning: by first block, the part of the time in which the server would be loaded.
    """
    gains = _gains(survey.shares + survey.floor_tps, length, capacity_tps)
    if earning is not None:
        gains = gains * np.maximum(earning, 1e-3)  # a gap counts even where it takes long to load
    order: list[int] = np.argsort(-np.round(gains / max(gains.max(), np.finfo(float).tiny), 9), kind="stable").tolist()
    apart: list[int] = []
    for start in order:
        if all(abs(start - other) >= SPACING * length for other in apart):
            apart.append(start)
        if len(apart) == NUM_TRIALS:
            break
    others = [start for start in order[: 2 * NUM_TRIALS] if start not in apart]
    return [BlockRange(start, start + length) for start in [*apart, *others][:NUM_TRIALS]]


def _gains(levels: Floats, length: int, capacity_tps: float) -> Floats:
    """What each span of this length would gain by capacity that fills up its lowest levels like water."""
    windows = np.lib.stride_tricks.sliding_window_view(levels, length)
    lowest = np.sort(windows, axis=1)
    filled = (capacity_tps + lowest.cumsum(axis=1)) / np.arange(1, length + 1)  # level if the first k are filled
    above = np.hstack((lowest[:, 1:], np.full((len(lowest), 1), np.inf)))
    level = filled[np.arange(len(filled)), (filled <= above).argmax(axis=1)]
    gains: Floats = (windows**-SHARPNESS - np.maximum(windows, level[:, None]) ** -SHARPNESS).sum(axis=1)
    return gains


def _value(block_shares: Floats, floor_tps: float) -> float:
    return float(((block_shares + floor_tps) ** -SHARPNESS).mean() ** (-1 / SHARPNESS))
