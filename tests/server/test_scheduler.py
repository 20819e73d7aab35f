"""Batches under a token budget, a page limit and preemption: every request gets its own tokens, whatever happens."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from swarm.errors import PeerBusy, PeerError
from swarm.server.pages import PAGE_SIZE
from swarm.server.scheduler import PAGE_WAIT_S
from swarm.types import BlockRange
from tests.server.engine import Engine, User, make_work

NUM_PAGES = 12
MAX_TOKENS = 8 * PAGE_SIZE
"""Of one session: together with copies of its rows' last pages it fits into the cache when it is alone."""
PREFIXES = [[float(1000 * prefix + i) for i in range(MAX_TOKENS)] for prefix in range(2)]


class ServerMachine(RuleBasedStateMachine):
    """Random users on a small cache, against what each would have got alone."""

    users = Bundle("users")

    @initialize(
        token_budget=st.sampled_from([5, 16, 40]),
        min_turn=st.sampled_from([0, 8]),
        stateful=st.sampled_from([False, False, True]),
    )
    def start(self, token_budget, min_turn, stateful):
        self.engine = Engine(NUM_PAGES, token_budget=token_budget, min_turn_tokens=min_turn, stateful=stateful)
        self.stateful = stateful
        self.open_users = []
        self.counter = 0.0

    @rule(
        target=users,
        client=st.sampled_from("abc"),
        rows=st.integers(1, 3),
        blocks=st.sampled_from([BlockRange(0, 4), BlockRange(0, 4), BlockRange(1, 3)]),
    )
    def open(self, client, rows, blocks):
        user = User(self.engine, client, rows, blocks)
        self.open_users.append(user)
        return user

    @rule(
        user=users,
        counts=st.lists(st.sampled_from([0, 5, 16, 33, 50]), min_size=3, max_size=3),
        prefix=st.sampled_from([None, 0, 0, 1]),
        num_wanted=st.sampled_from([None, 0, 1, 20]),
        num_works=st.integers(1, 3),
    )
    def prompt(self, user, counts, prefix, num_wanted, num_works):
        """Tokens for each row, which begin like those of others."""
        pieces = []
        for row, count in zip(user.rows, counts, strict=False):
            known = PREFIXES[prefix][len(row) : len(row) + count] if prefix is not None else []
            pieces.append(known + self.fresh(count - len(known)))
        if 0 < sum(map(len, pieces)) <= MAX_TOKENS - user.num_tokens:
            user.send(pieces, num_wanted=num_wanted, num_works=num_works)

    @rule(
        target=users,
        client=st.sampled_from("abc"),
        rows=st.sampled_from([1, 1, 2]),
        blocks=st.sampled_from([BlockRange(0, 4), BlockRange(0, 4), BlockRange(1, 3)]),
        count=st.sampled_from([16, 33, 40]),
        num_wanted=st.sampled_from([None, 1]),
        turns=st.integers(0, 12),
    )
    def newcomer(self, client, rows, blocks, count, num_wanted, turns):
        """A user whose prompt begins as that of all newcomers."""
        user = self.open(client, rows, blocks)
        user.send([PREFIXES[0][:count]] * rows, num_wanted=num_wanted)
        self.run(turns)
        return user

    @rule(user=users, data=st.data(), count=st.sampled_from([1, 20]))
    def roll_back_to_the_prefix(self, user, data, count):
        """Other tokens in the middle of pages that others may know, of a single row or of all."""
        if self.stateful or not all(user.rows):
            return
        base = [data.draw(st.integers(1, min(len(row), 40))) for row in user.rows]
        if sum(base) + count * len(base) <= MAX_TOKENS:
            user.send([self.fresh(count) for _ in user.rows], base=base)
            self.run(data.draw(st.integers(0, 8)))

    @rule(user=users, times=st.integers(1, 3))
    def decode(self, user, times):
        """Steps of one token per row, some of them queued behind each other."""
        for _ in range(times):
            if user.num_tokens + len(user.rows) <= MAX_TOKENS:
                user.send([self.fresh(1) for _ in user.rows])

    @rule(user=users, data=st.data())
    def beams(self, user, data):
        """A step that reorders the rows."""
        order = [data.draw(st.integers(0, len(user.rows) - 1)) for _ in user.rows]
        if sum(len(user.rows[old]) + 1 for old in order) <= MAX_TOKENS:
            user.send([self.fresh(1) for _ in user.rows], order=order)

    @rule(user=users, data=st.data())
    def roll_back(self, user, data):
        """A step that forgets tokens, in the middle of a page, a shared one perhaps."""
        if self.stateful:
            return
        base = [data.draw(st.integers(0, len(row))) for row in user.rows]
        if sum(base) + 2 * len(base) <= MAX_TOKENS:
            user.send([self.fresh(2) for _ in user.rows], base=base)

    @rule(turns=st.integers(1, 5))
    def run(self, turns):
        for _ in range(turns):
            self.engine.turn()

    @rule(seconds=st.sampled_from([0.1, 2.0]))
    def wait(self, seconds):
        self.engine.now += seconds

    @rule(user=consumes(users), finish=st.booleans())
    def close(self, user, finish):
        """A user leaves, with or without waiting for its outputs."""
        if finish:
            self.engine.run()
            user.check()
        user.close()
        self.open_users.remove(user)

    @invariant()
    def pages_are_owned_as_counted(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        for user in self.open_users:
            assert not self.engine.told[user.session].failed
            user.check()
            user.close()
        self.engine.check()
        assert self.engine.allocator.num_used == 0 and self.engine.host.used == 0

    def fresh(self, count):
        """Tokens that nobody else has."""
        self.counter += max(0, count)
        return [self.counter - i for i in range(count)]


ServerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestServer = ServerMachine.TestCase
