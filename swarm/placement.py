"""Where a server does most good: which blocks a new one takes, and when another one should move.

    records ─► Holdings ─► Survey: share of each block, value of the swarm
                              ├─► choose_span   a newcomer: where the swarm gains most
                              └─► decide_move   a server: where it would gain more, if that is worth a reload

The *value* of a swarm is a soft minimum of the shares of its blocks (`swarm.shares`): nearly its throughput, but it
also grows when one of two equally weak places is helped. It is measured in tokens per second. Pure: no clock, no
randomness; who may move when, so that not everybody does at once, is the business of `swarm.leases`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from swarm.shares import Floats, shares
from swarm.types import BlockRange

SHARPNESS = 4.0
"""Exponent of the soft minimum."""
FLOOR = 1e-3
"""Part of the mean share that a block without servers is taken to have, to tell one gap from two."""
MAX_MEDIANS = 16.0
"""Nobody's capacity counts for more than so many times the median, whatever it claims."""
NUM_TRIALS = 3
"""Spans that look best by a quick estimate, of which the best by exact shares is taken."""
HYSTERESIS = 0.25
"""A move must gain this part of the server's own capacity, spread over the model ..."""
SMALL_GAIN = 0.1
"""... or, if that is less, this part of what the swarm is worth."""
HORIZON_S = 3600.0
"""Time in which a move must earn what it costs."""
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
    """A span, and what it does for the swarm, by its value in tokens/s."""

    blocks: BlockRange
    before_tps: float
    after_tps: float


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


class Survey:
    """The state of a swarm.

    Args:
        holdings: of all servers, those that load included.
        num_blocks: of the model.
    """

    def __init__(self, holdings: Sequence[Holding], num_blocks: int):
        self.holdings = tuple(holdings)
        self.num_blocks = num_blocks
        self._capacities = _believed([holding.capacity_tps for holding in holdings])

    @cached_property
    def shares(self) -> Floats:
        """Tokens per second that each block gets."""
        return shares([holding.blocks for holding in self.holdings], self._capacities, self.num_blocks)

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
        return FLOOR * max(float(sum(self._capacities)), 1.0) / self.num_blocks

    @cached_property
    def missing(self) -> NDArray[np.bool_]:
        """Of each block, whether nobody holds it."""
        is_missing = np.ones(self.num_blocks, dtype=bool)
        for holding in self.holdings:
            is_missing[holding.blocks.start : holding.blocks.end] = False
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

    def without(self, peer_id: str) -> Self:
        """The swarm without one server."""
        return type(self)([it for it in self.holdings if it.peer_id != peer_id], self.num_blocks)

    def plus(self, holding: Holding) -> Self:
        """The swarm with one server more."""
        return type(self)([*self.holdings, holding], self.num_blocks)


def choose_span(survey: Survey, length: int, capacity_tps: float, peer_id: str = "") -> Choice:
    """Where a newcomer with room for `length` blocks does most good; the lowest blocks among equals."""
    trials = [
        (survey.plus(Holding(peer_id=peer_id, blocks=blocks, capacity_tps=capacity_tps)), blocks)
        for blocks in _promising(survey, length, capacity_tps)
    ]
    after, blocks = max(trials, key=lambda trial: (-trial[0].num_missing, round(trial[0].value_tps, 9)))
    return Choice(blocks=blocks, before_tps=survey.value_tps, after_tps=after.value_tps)


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
    if not survey.num_missing and not may_gain(survey, own):
        return None
    rest = survey.without(own.peer_id)
    moves = []
    earning = [max(0.0, HORIZON_S - seconds) / HORIZON_S for seconds in reload_s[: survey.num_blocks - length + 1]]
    for blocks in _promising(rest, length, own.capacity_tps, earning):
        after = rest.plus(Holding(peer_id=own.peer_id, blocks=blocks, capacity_tps=own.capacity_tps))
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
                blocks=blocks, gain_tps=gain_tps, cost_tokens=cost_tokens, fills_gap=fills_gap, opens_gap=opens_gap
            )
            moves.append((-after.num_missing, profit_tokens, move))
    return max(moves, key=lambda found: found[:2])[2] if moves else None


def may_gain(survey: Survey, own: Holding) -> bool:
    """Whether a move could gain enough; if not, there is no need to look closer.

    The value is concave in the shares, so its gradient bounds the gain. A server works for the neediest blocks of its
    span already; elsewhere it could at best work for the neediest of all.
    """
    need = survey.need()
    difference = float(need.max() - need[own.blocks.start : own.blocks.end].max())
    return difference * own.capacity_tps / survey.num_blocks >= least_gain_tps(survey, own)


def least_gain_tps(survey: Survey, own: Holding) -> float:
    """Smaller gains are no reason to move."""
    return min(HYSTERESIS * own.capacity_tps / survey.num_blocks, SMALL_GAIN * survey.value_tps)


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
    order = np.argsort(-np.round(gains / max(gains.max(), np.finfo(float).tiny), 9), kind="stable")
    return [BlockRange(int(start), int(start) + length) for start in order[:NUM_TRIALS]]


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


def _believed(capacities: Sequence[float]) -> list[float]:
    """The capacities, cut to a multiple of their median."""
    if not capacities:
        return []
    limit = MAX_MEDIANS * float(np.median(capacities))
    return [min(capacity, limit) if limit > 0 else capacity for capacity in capacities]
