"""Batches under a token budget, a page limit and preemption: every request gets its own tokens, whatever happens."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from swarm.errors import PeerBusy, PeerError
from swarm.server.admission import HOLD_S
from swarm.server.pages import PAGE_SIZE
from swarm.server.residency import ALIGNMENT_PAGES
from swarm.server.scheduler import PAGE_WAIT_S
from swarm.types import BlockRange
from tests.server.engine import Engine, User, make_work
from tests.server.fake_span import FakeDelta, FakeSpan

NUM_PAGES = 12
MAX_TOKENS = 8 * PAGE_SIZE
"""Of one session: together with copies of its rows' last pages it fits into the cache when it is alone."""
ADAPTERS = {"x": 1, "y": 1, "z": 2}
"""Pages of each; a session may use them all."""
PREFIXES = [[float(1000 * prefix + i) for i in range(MAX_TOKENS)] for prefix in range(2)]


class ServerMachine(RuleBasedStateMachine):
    """Random users on a small cache, against what each would have got alone."""

    users = Bundle("users")

    @initialize(
        token_budget=st.sampled_from([5, 16, 40]),
        min_turn=st.sampled_from([0, 8]),
        stateful=st.sampled_from([False, False, True]),
        has_adapters=st.booleans(),
    )
    def start(self, token_budget, min_turn, stateful, has_adapters):
        num_pages = NUM_PAGES + (sum(ADAPTERS.values()) + ALIGNMENT_PAGES * len(ADAPTERS) if has_adapters else 0)
        self.engine = Engine(
            num_pages, token_budget=token_budget, min_turn_tokens=min_turn, stateful=stateful, own_bytes=4 * 1024
        )
        self.stateful, self.has_adapters = stateful, has_adapters
        self.open_users = []
        self.counter = 0.0

    @rule(
        target=users,
        client=st.sampled_from("abc"),
        rows=st.integers(1, 3),
        blocks=st.sampled_from([BlockRange(0, 4), BlockRange(0, 4), BlockRange(1, 3)]),
        adapters=st.lists(st.sampled_from([None, *ADAPTERS]), min_size=3, max_size=3),
    )
    def open(self, client, rows, blocks, adapters=(None,) * 3):
        values = {name: number + 1.0 for number, name in enumerate(ADAPTERS)}
        used = adapters[:rows] if self.has_adapters else []
        for name in filter(None, used):
            self.engine.memory.adapters.add(name, {0: FakeDelta(values[name], ADAPTERS[name])})
        user = User(self.engine, client, rows, blocks, [name and (name, values[name]) for name in used])
        self.open_users.append(user)
        return user

    @rule(name=st.sampled_from([*ADAPTERS]))
    def forget(self, name):
        """An adapter that nobody uses leaves host memory."""
        if all(name not in user.session.adapters for user in self.open_users):
            self.engine.memory.adapters.forget(name)

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
        adapters=st.lists(st.sampled_from([None, None, *ADAPTERS]), min_size=3, max_size=3),
        count=st.sampled_from([16, 33, 40]),
        num_wanted=st.sampled_from([None, 1]),
        turns=st.integers(0, 12),
    )
    def newcomer(self, client, rows, blocks, adapters, count, num_wanted, turns):
        """A user whose prompt begins as that of all newcomers."""
        user = self.open(client, rows, blocks, adapters)
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
        """A step that reorders the rows, among those with the same adapter."""
        rows = range(len(user.rows))
        order = [data.draw(st.sampled_from([i for i in rows if user.values[i] == user.values[row]])) for row in rows]
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

    @rule(
        user=users,
        known=st.sampled_from([0, 16, 33]),
        prefix=st.integers(0, 1),
        turns=st.integers(0, 2),
        count=st.sampled_from([1, 20]),
    )
    def abandon(self, user, known, prefix, turns, count):
        """A step that begins like those of others is dropped, and other tokens come in its place."""
        room = MAX_TOKENS - user.num_tokens
        if self.stateful or (known + count) * len(user.rows) > room:
            return
        user.send([PREFIXES[prefix][len(row) : len(row) + known] + self.fresh(count) for row in user.rows])
        self.run(turns)
        if (base := user.abandon()) is not None:
            user.send([self.fresh(known + count) for _ in user.rows], base=base)

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


ServerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestServer = ServerMachine.TestCase


def rows_of(batch, session):
    """Tokens of each of a session's rows in a batch."""
    return [row.chunk.num_tokens for row in batch.rows if row.session is session]


def test_decode_rows_go_before_a_prompt_and_share_its_batch():
    """A prompt that came first fills only what decoding leaves of the budget, and of the time."""
    engine = Engine(token_budget=32)
    prompt, *decodes = (engine.open() for _ in range(4))
    engine.prompt(prompt, 60)
    for session in decodes:
        engine.decode(session)
    batch = engine.turn()
    assert [row.session for row in batch.rows] == [*decodes, prompt]
    assert rows_of(batch, prompt) == [engine.scheduler.costs.prompt_limit(3, 32 - 3)]


def test_decode_rows_of_many_leave_a_share_to_a_waiting_prompt():
    """However many rows decode, a prompt makes progress in every batch; without one they get the whole budget."""
    engine = Engine(token_budget=32)
    many = engine.open(rows=80)
    engine.decode(many)
    assert engine.turn().num_tokens == 32
    prompt = engine.open()
    engine.prompt(prompt, 200)
    assert rows_of(engine.turn(), prompt) == [8]


def test_a_prompt_next_to_decoding_prolongs_it_by_no_more_than_the_stall():
    """One long prompt during eight decodes: every gap stays below twice the usual, even between their steps."""
    engine = Engine(1024, token_budget=512, seconds=lambda rows, tokens: 0.02 + 0.0005 * rows + 0.002 * tokens)
    sessions = [engine.open() for _ in range(8)]
    last, gaps = dict.fromkeys(sessions, engine.now), {False: [], True: []}
    prompt = None
    for turn in range(900):
        for number, session in enumerate(sessions):
            if not session.jobs and (turn + number) % 3:  # they come and go, so that some batches have none of them
                engine.decode(session, step=turn)
        if turn == 300:
            prompt = engine.open()
            engine.prompt(prompt, 2048)
        batch = engine.turn()
        if not batch.rows:
            engine.now += 0.001
        for session in {row.session for row in batch.rows} & set(sessions):
            gaps[prompt is not None].append(engine.now - last[session])
            last[session] = engine.now
    assert not prompt.jobs
    usual, stalled = (sorted(values)[int(0.99 * len(values))] for values in (gaps[False], gaps[True]))
    assert stalled <= 2 * usual


def test_what_is_done_for_a_client_beside_batches_counts_as_service():
    """While another waits: whose sessions were moved for a second comes after it."""
    engine = Engine(1024, token_budget=64, seconds=lambda rows, tokens: 0.01 + 0.001 * tokens)
    engine.prompt(engine.open("first"), 64)
    engine.run()
    moved, other = engine.open("moved"), engine.open("other")
    engine.prompt(other, 3 * 64, first=500)
    engine.scheduler.used("moved", 1.0)
    engine.prompt(moved, 64, first=100)
    assert [rows_of(engine.turn(), moved) for _ in range(3)] == [[], [], []]
    engine.run()
    assert not moved.jobs and not other.jobs


def test_a_step_without_pages_waits_and_runs_when_pages_are_freed():
    """Nothing runs while the pool is full and nobody can be moved; closing another session lets the step run."""
    engine = Engine(2, host_bytes=0)
    first, second = engine.open(), engine.open()
    engine.prompt(first, 2 * PAGE_SIZE)
    engine.run()
    engine.prompt(second, 2, first=7)
    assert not engine.turn().rows and not engine.scheduler.can_progress and engine.scheduler.num_waiting == 1
    engine.close(first)
    assert engine.scheduler.can_progress and len(engine.turn().rows) == 1
    assert engine.scheduler.num_waiting == 0


def test_a_session_that_waits_is_told_how_long_at_most_once_a_second():
    """The estimate comes from the rate at which pages were given back."""
    engine = Engine(4, host_bytes=0)
    for _ in range(10):
        passing = engine.open()
        engine.prompt(passing, 4 * PAGE_SIZE)
        engine.run()
        engine.close(passing)
        engine.now += 2.0
    holder, waiting = engine.open(), engine.open()
    engine.prompt(holder, 4 * PAGE_SIZE)
    engine.run()
    engine.prompt(waiting, 2 * PAGE_SIZE, first=5)
    for _ in range(8):
        engine.turn()
        engine.now += 0.25
    waits = engine.told[waiting].waits
    assert len(waits) == 2 and waits[0].step_id == 0
    assert 0.5 < waits[0].expected_s < 4.0  # two pages, of which two came back every second, fading


def test_a_step_that_waits_too_long_is_refused_with_both_numbers():
    """After PAGE_WAIT_S without a page the step ends with PeerBusy that names pages needed and free."""
    engine = Engine(2, host_bytes=0)
    holder, late = engine.open(), engine.open()
    engine.prompt(holder, 2 * PAGE_SIZE)
    engine.run()
    engine.prompt(late, PAGE_SIZE + 1, first=5)
    began = engine.now
    while not engine.told[late].failed:
        assert engine.now <= began + PAGE_WAIT_S
        engine.turn()
        engine.now = max(engine.now, engine.scheduler.next_deadline()) if engine.scheduler.num_ready else engine.now
    error = engine.told[late].failed[0].error
    assert isinstance(error, PeerBusy) and "need 2 pages, 0 free" in str(error) and error.retry_after_s >= 1
    assert engine.scheduler.num_ready == engine.scheduler.num_waiting == 0


def test_a_prompt_that_waits_for_its_turn_is_not_refused():
    """Only a want of pages has a deadline; a long queue has none."""
    engine = Engine(seconds=lambda num_decode, num_prompt: 2 * PAGE_WAIT_S)
    sessions = [engine.open() for _ in range(5)]
    for session in sessions:
        engine.prompt(session, 100)
    engine.run()
    assert not any(engine.told[session].failed or engine.told[session].waits for session in sessions)


def test_nobody_takes_pages_before_the_least_served_who_waits_for_them():
    """Small requests of a client that had more don't slip past a large one, though they would fit."""
    engine = Engine(8, host_bytes=0)
    holder, greedy, modest = engine.open("holder"), engine.open("greedy"), engine.open("modest")
    engine.prompt(holder, 4 * PAGE_SIZE)
    engine.prompt(greedy, 2 * PAGE_SIZE, first=50)
    engine.run()
    for client, service in (("greedy", 1000.0), ("modest", 0.0)):
        engine.scheduler.counters.arrive(client)
        engine.scheduler.counters.charge(client, service)
    engine.prompt(modest, 3 * PAGE_SIZE, first=500)
    engine.turn()
    engine.prompt(modest, 1, first=700)
    engine.prompt(greedy, 2 * PAGE_SIZE, first=90)
    engine.turn()
    assert rows_of(engine.turn(), greedy) == []


def test_a_preempted_session_comes_back_with_its_own_pages():
    """The idle give way first, to host memory; a budget of nothing moves nobody."""
    for host_bytes, runs in ((1 << 20, True), (0, False)):
        engine = Engine(4, host_bytes=host_bytes)
        first, second = User(engine, "a", 1), User(engine, "b", 1)
        first.send([[float(i) for i in range(60)]])
        engine.run()
        engine.now += 5.0
        second.send([[float(i) for i in range(100, 160)]])
        engine.turn()
        assert bool(engine.told[second.session].produced) == runs
        assert (first.session.swapped is not None) == runs
        if runs:
            engine.run()
            first.send([[1.0, 2.0]])
            engine.now += 5.0
            engine.run()
            for user in (first, second):
                user.check()
                user.close()
            assert engine.host.used == engine.allocator.num_used == 0


def test_pages_are_moved_for_a_small_part_of_the_time():
    """More sessions than fit, all decoding: each keeps its pages for a turn, and all get their tokens."""
    swaps = {}
    for turn_tokens in (1, 80):
        engine = Engine(16, min_turn_tokens=turn_tokens)
        sessions = [engine.open() for _ in range(8)]
        for number, session in enumerate(sessions):
            engine.prompt(session, 3 * PAGE_SIZE, first=100 * number)
            for step in range(40):
                engine.decode(session, step=step)
        engine.run()
        assert not any(told.failed for told in engine.told.values())
        assert sum(told.num_tokens for told in engine.told.values()) == 8 * (3 * PAGE_SIZE + 40)
        swaps[turn_tokens] = engine.num_swaps
    assert 0 < swaps[80] < swaps[1] / 2


def test_the_second_with_a_prefix_computes_only_what_differs():
    """Its pages are shared and the outputs of the prefix are handed out at once; without a cache all is computed."""
    for stateful, computed in ((False, 36 - 32), (True, 36)):
        engine = Engine(stateful=stateful)
        prefix = [float(i) for i in range(32)]
        first, second = User(engine, "a", 1), User(engine, "b", 1)
        first.send([[*prefix, 1.0, 2.0]])
        engine.run()
        before, pages = engine.span.num_tokens, engine.allocator.num_used
        second.send([[*prefix, 7.0, 8.0, 9.0, 9.0]])
        engine.run()
        assert engine.span.num_tokens - before == computed
        assert engine.allocator.num_used - pages == (3 if stateful else 1)
        for user in (first, second):
            user.check()
            user.close()


def test_a_prompt_that_is_known_as_a_whole_needs_no_batch():
    """All its pages are found, so are those of the work behind it."""
    engine = Engine()
    for client in "ab":
        user = User(engine, client, 1)
        user.send([[float(i) for i in range(48)]], num_works=3)
        before = engine.span.num_tokens
        engine.run()
        user.check()
        assert engine.span.num_tokens - before == (48 if client == "a" else 0)


def test_beams_share_pages_and_copy_only_the_last_one():
    """Two rows that continue the same one share its full pages; the partial page is copied before it is written."""
    engine = Engine(16)
    user = User(engine, "a", 2)
    user.send([[float(i) for i in range(PAGE_SIZE + 3)], [1.0]])
    engine.run()
    user.send([[1.0], [2.0]], order=[0, 0])
    batch = engine.turn()
    first, second = (row.chunk.pages for row in batch.rows)
    assert first[0] == second[0] and first[1] != second[1]
    assert len(batch.moves) == 1 and engine.allocator.num_used == 3
    user.check()


def test_a_step_whose_states_cannot_be_copied_fails_alone():
    """The session is told, nobody else's step fails, and no page is lost."""

    class Unforkable:
        num_bytes, total = 0, 0.0

        def fork(self):
            raise MemoryError("no room")

    engine = Engine(8, stateful=True)
    bad, good = engine.open(rows=2), engine.open()
    engine.decode(bad)
    engine.run()
    bad.rows[0].state = Unforkable()
    engine.submit(bad, make_work([torch.ones(1)] * 2, order=[0, 0], base=[1, 1], step=1))
    engine.decode(good)
    batch = engine.turn()
    assert {row.session for row in batch.rows} == {good}
    assert isinstance(engine.told[bad].failed[0].error, PeerError)
    for session in (bad, good):
        engine.close(session)
    assert engine.allocator.num_used == 0


def test_who_came_with_a_long_prompt_is_not_refused_for_it():
    """Its client is far ahead of the others, who decode for ever in all the pages; it gets turns all the same."""
    engine = Engine(16, min_turn_tokens=16, seconds=lambda num_decode, num_prompt: 0.1)
    long = engine.open("long")
    engine.prompt(long, 10 * PAGE_SIZE)
    engine.run()
    engine.scheduler.counters.arrive("long")
    engine.scheduler.counters.charge("long", 1e6)
    others = [engine.open(f"other {number}") for number in range(6)]
    for number, session in enumerate(others):
        engine.prompt(session, 3 * PAGE_SIZE, first=100 * number + 500)
    for turn in range(1200):
        for session in (long, *others):
            if not session.jobs and session.rows[0].table.length < 11 * PAGE_SIZE:
                engine.decode(session, step=turn)
        engine.turn()
    told = engine.told[long]
    assert told.waits and not told.failed and told.num_tokens >= 10 * PAGE_SIZE + 10


def test_known_pages_are_not_taken_from_those_who_were_promised_room():
    """A prompt whose beginning lies in idle pages takes no more of them than the others leave."""
    engine = Engine(40)
    prefix = [float(i) for i in range(20 * PAGE_SIZE)]
    first, second, many = User(engine, "a", 1), User(engine, "b", 1), User(engine, "c", 30)
    first.send([prefix])
    engine.run()
    first.close()
    assert engine.allocator.num_idle == 20
    second.send([[*prefix, 1.0, 2.0]])
    many.send([[1.0]] * 30)
    engine.run()
    second.check()
    many.check()


def test_dropped_work_leaves_no_keys_behind():
    """A row that waited behind another one of its session gets other tokens: nobody finds them by the dropped ones."""
    engine = Engine(token_budget=32)
    first, second = engine.open("a", rows=2), User(engine, "b", 1)
    begin, dropped, kept = torch.arange(64), torch.arange(100, 132), torch.arange(500, 532)
    engine.submit(first, make_work([begin, dropped], base=[0, 0]))
    engine.turn()
    assert first.jobs and first.rows[1].table.length == 0
    engine.scheduler.drop_queued(first)
    engine.submit(first, make_work([begin, kept], base=[0, 0], step=1))
    engine.run()
    second.send([dropped.tolist()])
    engine.run()
    second.check()


def test_nobody_is_moved_for_pages_that_are_not_needed():
    """Decoding within a page that a session has already takes no pages of others, however full the cache is."""
    engine = Engine(4, min_turn_tokens=1)
    sessions = [engine.open(client) for client in "ab"]
    for number, session in enumerate(sessions):
        engine.prompt(session, PAGE_SIZE + 1, first=100 * number)
    engine.run()
    engine.now += 5.0
    for step in range(5):
        for session in sessions:
            engine.decode(session, step=step)
            engine.run()
    assert engine.num_swaps == 0


def test_a_rollback_into_a_cached_page_needs_no_page():
    """A session that fills the whole cache goes back into a page that is known as a prefix, and writes it anew."""
    engine = Engine(4)
    user = User(engine, "a", 1)
    user.send([[float(i) for i in range(4 * PAGE_SIZE)]])
    engine.run()
    user.send([[1.0]], base=[4 * PAGE_SIZE - 4])
    engine.run()
    user.check()


def test_two_sessions_change_places_when_host_memory_is_full():
    """Who comes back leaves room in host memory for the one that must give way."""
    engine = Engine(4, host_bytes=4 * FakeSpan.page_bytes)
    users = [User(engine, client, 1) for client in "ab"]
    for number, user in enumerate(users):
        user.send([[1000.0 * number + i for i in range(4 * PAGE_SIZE - 4)]])
        engine.run()
        engine.now += 5.0
    for user in users:
        user.send([[1.0]])
        engine.run()
        engine.now += 5.0
        engine.check()
    for user in users:
        user.check()
        user.close()
    assert engine.host.used == 0


def test_who_can_get_no_pages_is_not_waited_for_until_all_are_refused():
    """A session that can't come back keeps its place for a while; then others may have the pages that are free."""
    engine = Engine(10, host_bytes=6 * FakeSpan.page_bytes)
    stuck, holder, other = (User(engine, client, 1) for client in ("stuck", "holder", "other"))
    for number, (user, num_pages) in enumerate([(stuck, 6), (holder, 7)]):  # which don't fit into host memory both
        user.send([[1000.0 * number + i for i in range(num_pages * PAGE_SIZE - 4)]])
        engine.run()
        engine.now += 5.0
    stuck.send([[1.0]])
    engine.turn()
    other.send([[5000.0 + i for i in range(20)]])
    began, waited = engine.now, None
    while engine.scheduler.num_ready:
        if engine.turn().rows:
            waited = engine.now - began
        engine.now = min(max(engine.now, engine.scheduler.next_deadline()), engine.now + 1.0)
    other.check()
    assert HOLD_S - 1 <= waited < PAGE_WAIT_S and engine.told[stuck.session].failed


def test_decode_rows_wait_for_others_that_are_about_to_come_but_no_prompt_does():
    """Two sessions that decode in turn meet in one batch; as soon as a prompt is there, nothing waits."""
    engine = Engine()
    first, second = engine.open("a"), engine.open("b")
    for _ in range(3):
        for session in (first, second):
            engine.decode(session)
        assert len(engine.turn().rows) == 2
        engine.now += 0.020
    engine.decode(first)
    assert engine.scheduler.wait_until(engine.now) > engine.now
    engine.prompt(engine.open("c"), 20)
    assert engine.scheduler.wait_until(engine.now) == engine.now
