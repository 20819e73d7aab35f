"""Adapters on the device: attached when they are needed, kept while they are held, gone when others need the pages."""

from swarm.errors import AdapterError, PeerError
from swarm.server.admission import MAX_ATTACHES
from swarm.server.host_pages import Attach, CopyPage, Detach, carry_out
from swarm.server.pages import PAGE_SIZE
from tests.server.engine import Engine, User
from tests.server.fake_span import FakeDelta

NAMES = [f"adapter {number}" for number in range(8)]


def add(engine, *names, num_pages=2):
    for name in names:
        engine.memory.adapters.add(name, {0: FakeDelta(NAMES.index(name) + 1.0, num_pages)})


def user_of(engine, name, client="a", num_pages=2):
    add(engine, name, num_pages=num_pages)
    return User(engine, client, 1, adapters=[(name, NAMES.index(name) + 1.0)])


def attached(engine):
    return set(engine.memory.adapters.attached)


def test_rows_of_one_session_use_different_adapters_and_none():
    """Each row's outputs are those of its own adapter, in one batch."""
    engine = Engine()
    add(engine, *NAMES[:2])
    user = User(engine, "a", 3, adapters=[(NAMES[0], 1.0), None, (NAMES[1], 2.0)])
    user.send([[5.0, 6.0]] * 3)
    assert len(engine.turn().rows) == 3
    user.check()


def test_an_idle_adapter_stays_until_its_pages_are_needed():
    """The next session finds it attached; when keys and values need the room, the one used longest ago goes, whole."""
    engine = Engine(16, min_turn_tokens=1)
    for name in NAMES[:3]:
        user = user_of(engine, name)
        user.send([[1.0]])
        engine.run()
        user.close()
    assert engine.allocator.num_used == 0 and engine.allocator.num_idle == 6 and attached(engine) == {*NAMES[:3]}
    again = user_of(engine, NAMES[0])
    again.send([[1.0]])
    assert not any(isinstance(move, Attach) for move in engine.turn().moves)
    long = User(engine, "b", 1)
    long.send([[float(i) for i in range(11 * PAGE_SIZE)]])
    engine.run()
    assert attached(engine) == {NAMES[0], NAMES[2]}
    long.check()
    again.check()


def test_an_adapter_in_use_is_not_evicted_for_another():
    """With room for two, three sessions take turns: one moves to host memory and lets go of its adapter."""
    engine = Engine(6, min_turn_tokens=4)
    users = [user_of(engine, name, client) for name, client in zip(NAMES[:3], "abc", strict=True)]
    for step in range(12):
        for user in users:
            user.send([[float(step)]])
        engine.run()
        engine.check()
    assert engine.num_swaps and engine.memory.adapters.num_attached > 3
    for user in users:
        user.check()
        user.close()
    assert engine.allocator.num_used == 0


def test_sequences_make_room_for_an_adapter():
    """Pages in pieces are put together: what was in the way lies elsewhere then, unharmed, shared prefixes as well."""
    engine = Engine(24)
    users = [User(engine, client, 2) for client in "abcdef"]
    for number, user in enumerate(users):
        user.send([[1000.0 * number + i for i in range(PAGE_SIZE + 4)]] * 2)
        engine.run()
    for user in users[::2]:
        user.close()
    engine.allocator.trim(0)
    holes = engine.allocator.num_free
    late = user_of(engine, NAMES[0], num_pages=holes - 4)
    late.send([[1.0]])
    batch = engine.turn()
    assert any(isinstance(move, CopyPage) for move in batch.moves) and attached(engine) == {NAMES[0]}
    engine.check()
    for user in users[1::2]:
        user.send([[7.0], [8.0]])
    engine.run()
    for user in (late, *users[1::2]):
        user.check()
        user.close()
    assert engine.allocator.num_used == 0


def test_adapters_that_stand_in_the_way_are_no_reason_to_wait():
    """Where no run of pages can be had, an adapter gets memory beside them, as long as there is some."""
    for own_bytes, is_placed in ((4 * 1024, True), (1024, False)):
        engine = Engine(16, own_bytes=own_bytes)
        pages = engine.allocator.allocate(16)
        engine.allocator.free(pages[::2])
        engine.memory.adapters._by_page = dict.fromkeys(pages[1::2])
        user = user_of(engine, NAMES[0])
        user.send([[1.0]])
        engine.turn()
        assert (NAMES[0] in attached(engine)) == is_placed
        assert bool(engine.scheduler.num_waiting) != is_placed
        if is_placed:
            user.check()


def test_a_run_is_made_of_what_was_used_longest_ago():
    """Idle pages go for an adapter: of all places, the one whose pages nobody has looked at for long."""
    engine = Engine(8)
    for first in (0, 100):
        session = User(engine, "a", 1)
        session.send([[float(first + i) for i in range(2 * PAGE_SIZE)]])
        engine.run()
        session.close()
    engine.allocator.allocate(4, after=7)
    old = sorted(list(engine.allocator._idle)[:2])
    user = user_of(engine, NAMES[0])
    user.send([[1.0]])
    engine.scheduler.memory.adapters._soon.clear()
    engine.scheduler.memory.adapters.hold([user.session])
    assert engine.memory.adapters._seated[NAMES[0]].pages == old


def test_prefetch_takes_blank_pages_only():
    """An adapter that was added comes to the device before any work for it, unless something would have to go."""
    engine = Engine(5)
    add(engine, *NAMES[:3])
    engine.turn()
    assert attached(engine) == {*NAMES[:2]} and engine.allocator.num_used == 0
    engine.turn()
    assert attached(engine) == {*NAMES[:2]}


def test_few_adapters_come_before_one_batch():
    """Others run meanwhile: a crowd of new adapters stalls nobody for longer than it takes to attach a few."""
    engine = Engine(64)
    decoding = User(engine, "z", 1)
    users = [user_of(engine, name, name) for name in NAMES]
    engine.memory.adapters._soon.clear()
    for user in (decoding, *users):
        user.send([[1.0]])
    batch = engine.turn()
    assert sum(isinstance(move, Attach) for move in batch.moves) == MAX_ATTACHES
    assert {row.session for row in batch.rows} == {decoding.session, *(user.session for user in users[:MAX_ATTACHES])}
    engine.run()
    for user in users:
        user.check()


def test_a_session_with_many_adapters_gets_them_all_at_once():
    """The limit does not keep it from ever running."""
    engine = Engine(64)
    add(engine, *NAMES)
    engine.memory.adapters._soon.clear()
    user = User(engine, "a", len(NAMES), adapters=[(name, NAMES.index(name) + 1.0) for name in NAMES])
    user.send([[1.0]] * len(NAMES))
    engine.run()
    user.check()


def test_what_cannot_be_attached_fails_its_own_sessions_only():
    """The rest of the batch runs, the pages come back, and a later session may try again."""
    engine = Engine()
    bad, good = user_of(engine, NAMES[0]), User(engine, "b", 1)
    engine.span.attach_failure = AdapterError("no such linear")
    for user in (bad, good):
        user.send([[1.0]])
    engine.turn()
    good.check()
    assert engine.told[bad.session].failed[0].error is engine.span.attach_failure
    bad.close()
    assert engine.allocator.num_used == 1 and not attached(engine)
    engine.span.attach_failure = None
    again = user_of(engine, NAMES[0])
    again.send([[1.0]])
    engine.run()
    again.check()


def test_a_batch_that_fails_leaves_no_adapter_half_attached():
    """Who uses an adapter that came with a failed batch is told; later sessions get it anew."""
    engine = Engine()
    user = user_of(engine, NAMES[0])
    user.send([[1.0]])
    batch = engine.scheduler.schedule(engine.now)
    carry_out(batch.moves, engine.span)
    engine._tell(engine.scheduler.fail(batch, PeerError("broken")))
    assert [str(it.error) for it in engine.told[user.session].failed] == ["broken"]
    user.close()
    assert engine.allocator.num_used == 0 and not attached(engine)
    again = user_of(engine, NAMES[0])
    again.send([[1.0]])
    engine.run()
    again.check()


def test_what_failed_is_not_prefetched_for_those_who_failed_with_it():
    """They let go of it only when they close: its pages would be given back once too often."""
    engine = Engine()
    add(engine, *NAMES[:2])
    user = User(engine, "a", 2, adapters=[(NAMES[0], 1.0), (NAMES[1], 2.0)])
    user.send([[1.0], [1.0]])
    batch = engine.scheduler.schedule(engine.now)
    engine._tell(engine.scheduler.fail(batch, PeerError("broken")))
    add(engine, *NAMES[:2])  # another session of theirs is about to come
    engine.turn()
    assert not attached(engine)
    user.close()
    again = user_of(engine, NAMES[0])
    again.send([[1.0]])
    engine.run()
    again.check()
    again.close()
    assert engine.allocator.num_used == 0


def test_a_forgotten_adapter_leaves_the_device():
    """Its pages are blank again, and its slot may be another's."""
    engine = Engine(8)
    user = user_of(engine, NAMES[0])
    user.send([[1.0]])
    engine.run()
    user.close()
    engine.memory.adapters.forget(NAMES[0])
    assert engine.allocator.num_idle == 0
    other = user_of(engine, NAMES[1])
    other.send([[1.0]])
    moves = engine.turn().moves
    assert [type(move) for move in moves] == [Detach, Attach]
    other.check()


def test_equal_prompts_share_pages_only_with_the_same_adapter():
    """What an adapter computes is its own, however equal the tokens are."""
    engine = Engine(64)
    prompt = [float(i) for i in range(PAGE_SIZE)]
    for name, client in ((NAMES[0], "a"), (NAMES[1], "b"), (NAMES[0], "c")):
        user = user_of(engine, name, client)
        user.send([[*prompt, 1.0]], num_wanted=1)
        engine.run()
        user.check()
        user.close()
    assert engine.prefixes.num_hits == 1
