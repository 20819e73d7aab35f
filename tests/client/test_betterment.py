"""When a session leaves a server for a quicker one: late, once, and not together with everybody else."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.betterment import (
    DOUBLING_S,
    GAIN_FLOOR_S,
    GAIN_SHARE,
    MAX_RETRY_S,
    MAX_STILL_S,
    MIN_CHANCE,
    NUM_DOUBLINGS,
    NUM_LOOKS,
    PAYBACK,
    RETRY_S,
    SETTLE_S,
    Betterment,
    Decoding,
    MoveCosts,
)
from swarm.client.prospects import Outlook, Prospect
from swarm.types import BlockRange, Hop

LOOK_S = 15.0
SPANS = (BlockRange(0, 4), BlockRange(4, 8))
FIRST = Hop(peer_id="first", blocks=SPANS[0])
USUAL_S = 0.1
SHARE = st.floats(0.0, 1.0)


def at(peer_id: str) -> Hop:
    """The second hop, at some server."""
    return Hop(peer_id=peer_id, blocks=SPANS[1])


class User:
    """One session of two hops, of which the second has other servers; a look every 15 seconds at new records."""

    def __init__(self, seed: int = 0, *, num_steps: int = 10_000, num_left: int = 10_000, num_tokens: int = 100):
        self.betterment = Betterment(np.random.default_rng(seed))
        self.hop, self.now, self.version = at("old"), 0.0, 0
        self.num_steps, self.num_left, self.num_tokens = num_steps, num_left, num_tokens
        self.costs = MoveCosts()
        self.moves: list[tuple[float, str]] = []

    def least_steps_s(self) -> float:
        """What all steps to come must save for a move."""
        return PAYBACK * self.costs.price_s(self.hop, self.num_tokens)

    def look(self, steps_s: dict[str, float], *, measured_s: float | None = None, is_new: bool = True) -> str | None:
        """See what a step takes with each server; go where that leads, and say where."""
        choice = self.choose(steps_s, measured_s=measured_s, is_new=is_new)
        if choice is None:
            return None
        left, self.hop = self.hop, choice.target
        self.betterment.moved(self.now, left=left.peer_id)
        self.moves.append((self.now, self.hop.peer_id))
        return self.hop.peer_id

    def choose(
        self, steps_s: dict[str, float], *, measured_s: float | None = None, is_new: bool = True
    ) -> Prospect | None:
        """See what a step takes with each server, and say where that leads."""
        self.now, self.version = self.now + LOOK_S, self.version + is_new
        present_s = steps_s[self.hop.peer_id]
        prospects = [
            Prospect(hop=self.hop, target=at(peer_id), predicted_s=step_s)
            for peer_id, step_s in steps_s.items()
            if peer_id != self.hop.peer_id
        ]
        measured_s = present_s if measured_s is None else measured_s
        return self.betterment.look(
            self.now,
            Outlook(version=self.version, predicted_s=present_s, prospects=tuple(prospects)),
            Decoding(
                hop_s={FIRST: measured_s * 0.1, self.hop: measured_s * 0.9},
                num_steps=self.num_steps,
                num_left=self.num_left,
                num_tokens=self.num_tokens,
                costs=self.costs,
            ),
        )


@given(st.integers(0, 1 << 30), st.lists(st.tuples(SHARE, SHARE, SHARE), min_size=60, max_size=60))
def test_noise_moves_nobody(seed, noise):
    """Other servers are better by up to a tenth, and all numbers are off by a tenth: nothing ever happens."""
    user = User(seed)
    for old, new, measured in noise:
        steps_s = {"old": USUAL_S * (0.95 + 0.1 * old), "new": USUAL_S * (0.85 + 0.1 * new)}
        assert user.look(steps_s, measured_s=USUAL_S * (0.95 + 0.1 * measured)) is None


@given(st.integers(0, 1 << 30), st.lists(st.integers(1, NUM_LOOKS - 1), min_size=20, max_size=20))
def test_what_does_not_last_moves_nobody(seed, lengths):
    """A gain that comes and goes, however large, is never seen at three looks in a row."""
    user = User(seed)
    for length in lengths:
        for new_s in [0.001] * length + [USUAL_S]:
            assert user.look({"old": USUAL_S, "new": new_s}) is None


@given(st.integers(0, 1 << 30), st.floats(0.0, 0.9 - GAIN_SHARE), st.data())
def test_a_gain_that_lasts_moves_a_session_once(seed, rest, data):
    """Within minutes, and only once in an hour, though the new server turns out to be no better than the old one."""
    user = User(seed)
    for _ in range(240):
        noise = data.draw(SHARE) * 0.02 if user.now < 60 else 0.0
        new_s = USUAL_S * rest if not user.moves else USUAL_S * 2
        user.look({"old": USUAL_S * (1.0 + noise), "new": new_s})
    [(moved_at, where)] = user.moves
    assert where == "new"
    assert NUM_LOOKS * LOOK_S <= moved_at <= NUM_LOOKS * LOOK_S + NUM_DOUBLINGS * DOUBLING_S + LOOK_S


def test_a_session_leaves_a_disappointing_server_for_a_third_one_after_minutes():
    """Never back, and not at once."""
    user = User()
    for _ in range(60):
        user.look({"old": USUAL_S, "new": USUAL_S / 2 if not user.moves else USUAL_S * 3, "third": USUAL_S * 0.9})
    assert [where for _, where in user.moves] == ["new", "third"]
    assert user.moves[1][0] - user.moves[0][0] >= SETTLE_S + NUM_LOOKS * LOOK_S


def test_the_same_records_seen_again_prove_nothing():
    """Looks count when something was read between them."""
    user = User()
    for _ in range(100):
        assert user.look({"old": USUAL_S, "new": 0.001}, is_new=user.version < NUM_LOOKS - 1) is None


def test_of_several_servers_the_best_that_has_lasted_is_taken():
    """One that has just come, or looks good now and then, has to wait."""
    user = User()
    for number in range(40):
        steps_s = {"old": USUAL_S, "good": 0.04, "better": 0.03, "fickle": (0.01, USUAL_S)[number % 2], "bad": 0.09}
        user.look(steps_s)
    assert [where for _, where in user.moves] == ["better"]


@pytest.mark.parametrize(
    ("steps_s", "measured_s", "session"),
    [
        ({"old": 0.004, "new": 0.004 - GAIN_FLOOR_S * 0.9}, None, {}),
        ({"old": USUAL_S, "new": USUAL_S / 2}, None, {"num_steps": 3}),
        ({"old": USUAL_S, "new": USUAL_S / 2}, None, {"num_left": 3}),
        ({"old": USUAL_S, "new": USUAL_S / 2}, None, {"num_tokens": 1_000_000}),
        ({"old": USUAL_S, "new": USUAL_S / 2}, GAIN_FLOOR_S * 1.9, {}),
        ({"old": USUAL_S, "new": USUAL_S / 2}, USUAL_S * 3, {}),
    ],
    ids=["trifle", "young", "nearly over", "long context", "quicker than predicted", "slow for other reasons"],
)
def test_a_move_must_be_worth_it(steps_s, measured_s, session):
    """By what steps take, by how many will come, and by what has to be sent."""
    user = User(**session)
    assert not any(user.look(steps_s, measured_s=measured_s) for _ in range(100))


def test_who_did_not_take_a_session_is_not_asked_again():
    """The session rests a minute, and goes to another one."""
    user, steps_s = User(), {"old": USUAL_S, "new": 0.01, "spare": 0.02}
    user.betterment.failed(user.now, "new")
    while user.look(steps_s) is None:
        pass
    [(moved_at, where)] = user.moves
    assert where == "spare" and moved_at >= RETRY_S + NUM_LOOKS * LOOK_S


@given(st.integers(0, 1 << 30), st.integers(1, 12))
def test_a_session_whose_moves_fail_tries_ever_more_seldom(seed, num_failures):
    """Each rest is at least twice the one before, up to an hour, though a new server is there each time."""
    user, tries = User(seed), []
    for number in range(num_failures + 1):
        while (where := user.choose({"old": USUAL_S, f"new-{number}": 0.01})) is None:
            pass
        tries.append(user.now)
        user.costs.failed()
        user.betterment.failed(user.now, where.target.peer_id)
    for number in range(num_failures):
        rest_s = min(MAX_RETRY_S, RETRY_S * 2**number)
        longest_s = rest_s + (NUM_LOOKS + 2) * LOOK_S + NUM_DOUBLINGS * DOUBLING_S
        assert rest_s <= tries[number + 1] - tries[number] <= longest_s


def test_a_session_that_has_moved_at_last_is_as_ready_as_before():
    """Failures before a move that succeeded are forgotten."""
    user = User()
    for number in range(8):
        user.betterment.failed(user.now, f"gone-{number}")
    user.betterment.moved(user.now)
    user.now += MAX_RETRY_S
    user.betterment.failed(user.now, "gone")
    failed_at = user.now
    while user.look({"old": USUAL_S, "new": 0.01}) is None:
        pass
    assert user.now - failed_at <= RETRY_S + (NUM_LOOKS + 2) * LOOK_S + NUM_DOUBLINGS * DOUBLING_S


def test_failed_moves_of_one_session_make_those_of_others_dearer():
    """A gain that just pays, while moves succeed, is not worth several tries; a large one is, at any time."""
    least = User().least_steps_s()
    for num_failures, moves in ((0, True), (1, False)):
        user = User(num_steps=math.ceil(least / (USUAL_S / 2)) + 1)
        for _ in range(num_failures):
            user.costs.failed()
        assert any(user.look({"old": USUAL_S, "new": USUAL_S / 2}) for _ in range(30)) == moves
    user = User()
    for _ in range(1000):
        user.costs.failed()
    assert any(user.look({"old": USUAL_S, "new": USUAL_S / 2}) for _ in range(30))


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 10_000), st.integers(1, 80))
def test_a_move_is_priced_by_the_tries_that_it_takes(has_moved, num_tokens, num_blocks):
    """A failure raises the price and a move lowers it; it stays within bounds, and the time to stand still is another
    matter."""
    costs, hop = MoveCosts(), Hop(peer_id="p", blocks=BlockRange(0, num_blocks))
    for is_good in has_moved:
        before, still_s = costs.price_s(hop, num_tokens), costs.expected_s(hop, num_tokens)
        if is_good:
            costs.measured(hop, num_tokens, still_s)
            assert costs.price_s(hop, num_tokens) <= before * (1 + 1e-9)
        else:
            costs.failed()
            assert costs.price_s(hop, num_tokens) >= before
        assert costs.expected_s(hop, num_tokens) == pytest.approx(still_s)
        assert still_s * (1 - 1e-9) <= costs.price_s(hop, num_tokens) <= still_s / MIN_CHANCE * (1 + 1e-9)


def test_a_session_that_a_server_sent_away_stays_for_minutes():
    """It has had its move."""
    user = User()
    user.betterment.moved(user.now)
    while user.look({"old": USUAL_S, "new": 0.01}) is None:
        pass
    assert user.now >= SETTLE_S + NUM_LOOKS * LOOK_S


def test_of_a_thousand_clients_that_see_the_same_server_a_share_goes_per_minute():
    """Few at first, twice as many in each half minute, and at last all."""
    users = [User(seed) for seed in range(1000)]
    when = []
    for user in users:
        user.now = user.betterment._generator.uniform(0.0, LOOK_S)
        first = user.now + NUM_LOOKS * LOOK_S
        while user.look({"old": USUAL_S, "new": 0.01}) is None:
            pass
        when.append(user.now - first)
    counts = np.histogram(when, bins=np.arange(6) * DOUBLING_S)[0] / len(users)
    assert counts[0] < 0.08 and counts[:2].sum() < 0.25 and counts.sum() == 1.0
    assert max(when) <= NUM_DOUBLINGS * DOUBLING_S + LOOK_S


def test_a_crowd_stops_going_where_it_is_no_longer_better():
    """A server that a hundred may use with profit gets twice that at most, though a thousand saw it empty."""
    worthwhile, users = 100, [User(seed) for seed in range(1000)]
    for user in users:
        user.now = user.betterment._generator.uniform(0.0, LOOK_S)
    announced = num_there = 0
    for number in range(40):
        if number % 2 == 0:  # what records say is half a minute old
            announced = num_there
        new_s = USUAL_S * (1.0 - GAIN_SHARE) * (0.2 + 0.8 * announced / worthwhile)
        num_there += sum(user.look({"old": USUAL_S, "new": new_s}) is not None for user in users if not user.moves)
    assert worthwhile <= num_there <= 2 * worthwhile


@given(st.integers(1, 100_000), st.integers(1, 80), st.floats(0.0, 100.0))
def test_moves_cost_what_earlier_ones_took(num_tokens, num_blocks, seconds):
    """Per token and block, beside what any move takes."""
    costs, hop = MoveCosts(), Hop(peer_id="p", blocks=BlockRange(0, num_blocks))
    for _ in range(50):
        costs.measured(hop, num_tokens, seconds)
    assert costs.expected_s(hop, num_tokens) == pytest.approx(max(seconds, 0.5), rel=1e-3, abs=1e-3)
    assert math.isclose(costs.expected_s(hop, 0), 0.5)


def test_nobody_waits_long_at_once_for_the_sake_of_speed():
    """A move that would stand still for longer than that is not made, however much it would earn."""
    hop = Hop(peer_id="a", blocks=BlockRange(0, 40))
    costs = MoveCosts()
    assert costs.expected_s(hop, 100) < MAX_STILL_S < costs.expected_s(hop, 4096)
    found = []
    for num_tokens in (100, 4096):
        machine = Betterment(np.random.default_rng(0))
        target = Hop(peer_id="b", blocks=hop.blocks)
        for look in range(30):
            outlook = Outlook(
                version=look, predicted_s=1.0, prospects=(Prospect(hop=hop, target=target, predicted_s=0.1),)
            )
            decoding = Decoding(hop_s={hop: 1.0}, num_steps=10_000, num_left=10_000, num_tokens=num_tokens, costs=costs)
            if machine.look(15.0 * look, outlook, decoding) is not None:
                found.append(num_tokens)
                break
    assert found == [100]
