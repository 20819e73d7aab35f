"""Newcomers go where the swarm gains most, servers move only when it pays, and gaps come first."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swarm import placement
from swarm.placement import Holding, Survey, better_movers, choose_span, decide_move, may_gain, still_fills
from swarm.types import BlockRange
from tests.bench.flow import max_flow


def survey(num_blocks, *holdings):
    """A swarm of (start, end, capacity)."""
    return Survey(
        [
            Holding(peer_id=str(index), blocks=BlockRange(start, end), capacity_tps=capacity)
            for index, (start, end, capacity) in enumerate(holdings)
        ],
        num_blocks,
    )


@st.composite
def surveys(draw, covered=False):
    """Up to 8 servers over 12 blocks."""
    holdings = []
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, 11))
        holdings.append((start, draw(st.integers(start + 1, 12)), draw(st.floats(1.0, 100.0))))
    return survey(12, *holdings, *([(0, 6, 5.0), (6, 12, 5.0)] if covered else []))


def decide(swarm, index, reload_s=60.0, num_sessions=0):
    return decide_move(swarm, swarm.holdings[index], reload_s=[reload_s] * 12, num_sessions=num_sessions)


def test_the_first_servers_tile_the_model():
    """Equal servers that come one after the other cover all blocks once before any block twice."""
    swarm = survey(12)
    for index in range(3):
        blocks = choose_span(swarm, 4, 10.0).blocks
        swarm = swarm.plus(Holding(peer_id=str(index), blocks=blocks, capacity_tps=10.0))
    assert swarm.num_missing == 0
    assert swarm.throughput_tps == pytest.approx(10.0 / 4)


def test_a_newcomer_strengthens_the_weakest_blocks():
    """It takes the range that limits the swarm, and says what that was worth."""
    choice = choose_span(survey(12, (0, 4, 40.0), (4, 8, 10.0), (8, 12, 40.0)), 4, 20.0)
    assert choice.blocks == BlockRange(4, 8)
    assert choice.after_tps > 2 * choice.before_tps


@given(surveys(), st.integers(1, 12), st.floats(1.0, 100.0))
def test_a_newcomer_never_leaves_more_blocks_missing_than_it_must(swarm, length, capacity):
    """Among all spans it takes one that fills the most gaps."""
    blocks = choose_span(swarm, length, capacity).blocks

    def missing(start):
        span = BlockRange(start, start + length)
        return swarm.plus(Holding(peer_id="new", blocks=span, capacity_tps=capacity)).num_missing

    assert len(blocks) == length and blocks.end <= 12
    assert missing(blocks.start) == min(missing(start) for start in range(12 - length + 1))


@given(surveys(covered=True), st.data())
def test_no_move_ever_opens_a_gap_or_lowers_the_value(swarm, data):
    """In a swarm that covers everything, whoever moves leaves no block without a server, not even while it loads."""
    index = data.draw(st.integers(0, len(swarm.holdings) - 1))
    move = decide(swarm, index)
    if move is not None:
        own = swarm.holdings[index]
        rest = swarm.without(own.peer_id)
        moved = rest.plus(Holding(peer_id=own.peer_id, blocks=move.blocks, capacity_tps=own.capacity_tps))
        assert rest.num_missing == moved.num_missing == 0
        assert moved.value_tps - swarm.value_tps == pytest.approx(move.gain_tps)
        assert move.gain_tps >= placement.least_gain_tps(swarm, own)
        assert decide(moved, len(moved.holdings) - 1) is None or move.gain_tps > 0


@given(surveys(), st.data())
def test_the_quick_check_never_hides_a_move(swarm, data):
    """A server that could gain enough is never told that it need not look."""
    index = data.draw(st.integers(0, len(swarm.holdings) - 1))
    num_sessions = data.draw(st.integers(0, 30))
    quick = may_gain(swarm, swarm.holdings[index], num_sessions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "may_gain", lambda *_: True)
        move = decide(swarm, index, num_sessions=num_sessions)
    assert quick or move is None or move.fills_gap


@given(surveys(), st.data())
def test_a_move_into_a_gap_holds_until_somebody_else_has_filled_it(swarm, data):
    """Right after it was decided, and no longer when another server holds the same blocks."""
    own = swarm.holdings[data.draw(st.integers(0, len(swarm.holdings) - 1))]
    move = decide_move(swarm, own, reload_s=[60.0] * 12, num_sessions=0)
    assume(move is not None)
    assert still_fills(swarm, own, move.blocks) == move.fills_gap
    filled = swarm.plus(Holding(peer_id="other", blocks=move.blocks, capacity_tps=own.capacity_tps))
    assert not still_fills(filled, own, move.blocks)


@given(surveys())
def test_single_moves_come_to_an_end(swarm):
    """When one server after the other moves, the swarm settles: no server goes round in circles."""
    for _ in range(60):
        moves = [(index, move) for index in range(len(swarm.holdings)) if (move := decide(swarm, index)) is not None]
        if not moves:
            return
        index, move = moves[0]
        own = swarm.holdings[index]
        swarm = swarm.without(own.peer_id).plus(
            Holding(peer_id=own.peer_id, blocks=move.blocks, capacity_tps=own.capacity_tps)
        )
    pytest.fail("still moving")


def test_a_gap_is_filled_by_a_server_that_is_not_needed_where_it_is():
    """One of two replicas moves to the blocks that nobody serves, whatever its sessions and the reload cost."""
    swarm = survey(12, (0, 4, 10.0), (0, 4, 10.0), (4, 8, 10.0))
    move = decide(swarm, 1, reload_s=1e6, num_sessions=100)
    assert move is not None and move.fills_gap and not move.opens_gap and move.blocks == BlockRange(8, 12)
    assert decide(swarm, 2) is None  # it would open as large a gap as it fills


def test_who_would_open_a_smaller_gap_says_so():
    """Of two that could fill 4:6 one leaves nothing behind, the other block 0: that one should wait."""
    swarm = survey(6, (0, 3, 10.0), (1, 4, 10.0))
    first, second = (decide_move(swarm, own, reload_s=[1.0] * 6, num_sessions=0) for own in swarm.holdings)
    assert first is not None and first.fills_gap and first.opens_gap and first.blocks == BlockRange(3, 6)
    assert second is not None and second.fills_gap and not second.opens_gap and second.blocks == BlockRange(3, 6)


def test_a_server_knows_how_many_others_would_do_more_good():
    """The strongest replica would gain most; of equal ones none is better."""
    swarm = survey(12, (0, 6, 15.0), (0, 6, 30.0), (0, 6, 30.0), (6, 12, 10.0))
    counts = []
    for own in swarm.holdings[:3]:
        move = decide_move(swarm, own, reload_s=[60.0] * 12, num_sessions=0)
        assert move is not None
        counts.append(better_movers(swarm, own, move, reload_s=60.0))
    assert counts == [2, 0, 0]


@given(surveys(covered=True))
@settings(max_examples=25)
def test_no_rival_is_overlooked_for_the_sake_of_speed(swarm):
    """The bound that saves looking closer hides nobody, and counting ends where it is told to."""
    for own in swarm.holdings:
        move = decide_move(swarm, own, reload_s=[60.0] * 12, num_sessions=0)
        if move is None:
            continue
        theirs = [
            decide_move(swarm, other, reload_s=[60.0] * 12, num_sessions=0)
            for other in swarm.holdings
            if other.peer_id != own.peer_id
        ]
        gains = [it.gain_tps for it in theirs if it is not None and it.gain_tps > move.gain_tps * (1 + 1e-6)]
        assert better_movers(swarm, own, move, reload_s=60.0) == min(len(gains), placement.MAX_RIVALS)
        assert better_movers(swarm, own, move, reload_s=60.0, enough=1) == min(len(gains), 1)


@given(surveys(covered=True))
def test_somebody_always_goes_first(swarm):
    """Of all that would move, one at least sees nobody who would do more good."""
    moves = [(own, decide_move(swarm, own, reload_s=[60.0] * 12, num_sessions=0)) for own in swarm.holdings]
    better = [better_movers(swarm, own, move, reload_s=60.0) for own, move in moves if move is not None]
    assert not better or min(better) == 0


def test_a_move_that_costs_more_than_it_gains_is_not_made():
    """A long reload, or many sessions, hold a server where it is; neither does in the long run."""
    swarm = survey(12, (0, 6, 30.0), (0, 6, 30.0), (0, 6, 30.0), (6, 12, 10.0), (6, 12, 10.0))
    assert decide(swarm, 0, reload_s=60.0) is not None
    assert decide(swarm, 0, reload_s=1e5) is None
    assert decide(swarm, 0, num_sessions=1000) is None


def test_a_small_swarm_is_not_stirred_up_for_a_trifle(monkeypatch):
    """A weak server could do more elsewhere, and the swarm would hardly notice; where it would, the server moves."""

    def moves(weakest):
        return decide(survey(12, (0, 4, 100.0), (4, 8, weakest), (8, 12, 100.0), (0, 4, 10.0)), 3) is not None

    assert not moves(90.0) and moves(10.0)
    monkeypatch.setattr(placement, "MEAN_GAIN", 0.0)
    assert moves(90.0)


def test_what_part_of_the_swarm_a_server_is_goes_by_capacity():
    """Others may follow it sooner when it is a small one; what it claims counts for 16 times the median at most."""
    swarm = survey(12, *[(start, start + 4, 10.0) for start in (0, 4, 8)] * 33, (0, 4, 10.0))
    assert swarm.capacity_part(swarm.holdings[0]) == pytest.approx(0.01)
    assert survey(12, (0, 12, 10.0)).capacity_part(swarm.holdings[0]) == 1.0
    assert survey(12, (0, 12, 0.0)).capacity_part(swarm.holdings[0]) == 1.0


def test_weights_that_are_on_disk_are_preferred():
    """Of two equally weak places a server takes the one that it can load sooner, though one between would gain more."""
    swarm = survey(12, (0, 4, 90.0), (0, 4, 90.0), (4, 8, 10.0), (8, 12, 10.0))
    own = swarm.holdings[0]
    for near, far in ((4, 8), (8, 4)):
        reload_s = [3500.0] * 12
        reload_s[near], reload_s[far] = 30.0, 600.0
        move = decide_move(swarm, own, reload_s=reload_s, num_sessions=0)
        assert move is not None and move.blocks.start == near


def test_a_server_in_a_balanced_swarm_stays():
    """Nothing to gain, nothing to do."""
    swarm = survey(12, *[(start, start + 4, 10.0) for start in (0, 4, 8)] * 3)
    assert all(decide(swarm, index) is None for index in range(9))


def test_a_liar_cannot_keep_others_away_for_ever():
    """Claimed capacity counts for 16 times the median at most."""
    honest = [(start, start + 4, 10.0) for start in (0, 4, 8)] * 16
    swarm = survey(12, *honest, (0, 4, 1e9))
    assert swarm.shares[0] <= (16 * 10.0 + 16 * 10.0) / 4 + 1e-6
    assert swarm.weakest == BlockRange(4, 12)


def test_the_rule_reaches_nine_tenths_of_what_is_possible_in_random_swarms():
    """24 servers of different sizes and speeds that come one by one, over 32 blocks."""
    ratios = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        lengths, capacities = generator.integers(3, 16, 24), np.exp(generator.uniform(4.0, 6.5, 24))
        swarm = Survey([], 32)
        for index, (length, capacity) in enumerate(zip(lengths, capacities, strict=True)):
            blocks = choose_span(swarm, int(length), float(capacity)).blocks
            swarm = swarm.plus(Holding(peer_id=str(index), blocks=blocks, capacity_tps=float(capacity)))
        assert swarm.throughput_tps == pytest.approx(max_flow([it.blocks for it in swarm.holdings], capacities, 32))
        ratios.append(swarm.throughput_tps / (capacities.sum() / 32))
    assert np.mean(ratios) >= 0.9
