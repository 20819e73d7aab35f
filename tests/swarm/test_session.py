"""The session machine in a fake swarm: whatever fails and whatever overtakes what, the outputs are right."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.protocol import LinkFault
from swarm.session import Connect, FindRoute, Hop, Open, Session
from swarm.types import BlockRange
from tests.swarm.fake_chain import CLIENT, Caller, FakeChain, Fault, Trouble, Turn

FIRST, MIDDLE, LAST = 0, 1, 2
"""Links of the hops of `three_hops`, until one is replaced: links count up."""


def three_hops(blocks: BlockRange) -> list[Hop]:
    """A server for every two blocks."""
    starts = range(blocks.start, blocks.end, 2)
    return [Hop(peer_id=f"peer{start}", blocks=BlockRange(start, start + 2)) for start in starts]


def caller(*, num_rows: int = 1, push: bool = True, seed: int = 0, **chain_options: object) -> Caller:
    """A caller of a session over three hops of two blocks each."""
    session = Session(BlockRange(0, 6), batch_size=num_rows, max_length=1000, push=push)
    return Caller(FakeChain(session, seed=seed, find_route=three_hops, **chain_options))  # type: ignore[arg-type]


# -- any failure schedule ---------------------------------------------------------------------------------------

MAX_ROWS = 3
small = st.integers(0, 3)
counts = st.sampled_from([0, 1, 1, 3, 7])
faults = st.builds(
    Fault, at=st.integers(1, 250), trouble=st.sampled_from(list(Trouble)), pick=st.integers(0, MAX_ROWS * 2)
)


@st.composite
def turns(draw: st.DrawFn, num_rows: int) -> Turn:
    """A step that reorders, rolls back, extends and perhaps gives up."""

    def per_row(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return draw(st.tuples(*[values] * num_rows))

    return Turn(
        order=per_row(small) if draw(st.integers(0, 3)) == 3 else None,
        rolled_back=per_row(small) if draw(st.integers(0, 2)) == 2 else (0,) * num_rows,
        num_tokens=per_row(counts),
        num_outputs=per_row(counts),
        max_ticks=draw(st.integers(0, 60)) if draw(st.integers(0, 7)) == 7 else None,
    )


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_failure_schedule_yields_each_rows_own_outputs(data: st.DataObject) -> None:
    """Deaths, broken streams, lost history, beams, rollbacks, chunks, duplicates and impatience change no output."""
    draw = data.draw
    num_rows = draw(st.integers(1, MAX_ROWS), label="rows")
    session = Session(
        BlockRange(0, draw(st.integers(1, 6), label="blocks")),
        batch_size=num_rows,
        max_length=1000,
        push=draw(st.integers(0, 4), label="push") > 0,
    )
    chain = FakeChain(
        session,
        seed=draw(st.integers(0, 1 << 30), label="seed"),
        faults=draw(st.lists(faults, max_size=12), label="faults"),
        max_step_tokens=draw(st.sampled_from([(1000,), (1, 2, 5, 100)]), label="limits"),
        recurrent=draw(st.sampled_from([0.0, 0.3, 1.0]), label="recurrent"),
        duplicates=draw(st.sampled_from([0.0, 0.2]), label="duplicates"),
    )
    user = Caller(chain)
    for turn in draw(st.lists(turns(num_rows), min_size=1, max_size=6), label="turns"):
        user.take(turn)
        for _ in range(draw(st.sampled_from([0, 3, 30]), label="pause")):
            chain.tick()


@pytest.mark.parametrize("seed", range(0, 400, 40))
def test_long_sessions_survive_ceaseless_trouble(seed: int) -> None:
    """Forty seeds each of sessions in which something breaks every dozen ticks."""
    for choices in (random.Random(number) for number in range(seed, seed + 40)):
        num_rows = choices.randint(1, MAX_ROWS)
        session = Session(BlockRange(0, choices.randint(1, 6)), batch_size=num_rows, max_length=10_000)
        troubles = [Fault(at=at, trouble=choices.choice(list(Trouble)), pick=at) for at in range(5, 600, 12)]
        chain = FakeChain(
            session,
            seed=choices.randrange(1 << 30),
            faults=troubles,
            max_step_tokens=(1, 2, 5, 100),
            recurrent=choices.choice([0.0, 0.3]),
            duplicates=0.1,
        )
        user = Caller(chain)
        for _ in range(8):
            user.prompt(*(choices.choice([1, 1, 4]) for _ in range(num_rows)))


EVERY_TROUBLE = [trouble for trouble in Trouble if trouble is not Trouble.REFUSE]


@pytest.mark.parametrize("trouble", EVERY_TROUBLE)
@pytest.mark.parametrize("push", [True, False])
def test_trouble_at_every_moment(trouble: Trouble, push: bool) -> None:
    """Each kind of trouble at each tick of a prompt, a decoding step, a rollback and a permutation of rows."""
    for at in range(1, 110, 2):
        for pick in range(3):
            user = caller(
                num_rows=2,
                push=push,
                seed=at,
                faults=[Fault(at=at, trouble=trouble, pick=pick)],
                max_step_tokens=(2, 3),
            )
            user.prompt(5, 2)
            user.decode()
            user.take(Turn(rolled_back=(2, 0), num_tokens=(1, 0), num_outputs=(1, 0)))
            user.take(Turn(order=(1, 1), rolled_back=(0, 0), num_tokens=(1, 3), num_outputs=(1, 2)))
            assert user.chain.happened[trouble] == 1 or user.chain.clock < at


# -- what crosses which link ------------------------------------------------------------------------------------


def sums(counter: Counter[tuple[int, int]], end: int) -> tuple[int, int]:
    """What went out of an end, and what came in."""
    sent = sum(count for (source, _), count in counter.items() if source == end)
    return sent, sum(count for (_, target), count in counter.items() if target == end)


def ready_to_decode(**options: object) -> Caller:
    """A caller that has sent a prompt of 20 tokens and decoded two; counters at zero."""
    user = caller(**options)  # type: ignore[arg-type]
    user.prompt(20)
    user.decode()
    user.decode()
    user.chain.settle()
    user.chain.tokens.clear()
    user.chain.messages.clear()
    return user


@pytest.mark.parametrize(("push", "num_messages"), [(True, 1), (False, 3)])
def test_a_decoding_step_is_one_message_up_and_one_down_where_servers_push(push: bool, num_messages: int) -> None:
    """With pushing, the client sends one chunk and receives one result; without, one per hop."""
    user = ready_to_decode(push=push)
    user.decode()
    assert sums(user.chain.messages, CLIENT) == (num_messages, num_messages)
    assert user.session.num_pushes == (2 if push else 0)


def test_a_prompt_travels_in_chunks_and_only_its_last_output_returns() -> None:
    """Each hop gets the prompt once, in chunks of its own size, and one hidden state comes back."""
    user = caller(max_step_tokens=(8,))
    user.prompt(20)
    assert user.chain.tokens == {(CLIENT, FIRST): 20, (FIRST, MIDDLE): 20, (MIDDLE, LAST): 20, (LAST, CLIENT): 1}
    assert user.chain.messages[CLIENT, FIRST] == user.chain.messages[FIRST, MIDDLE] == 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        (FIRST, {(CLIENT, 3): 23, (3, MIDDLE): 1, (MIDDLE, LAST): 1, (LAST, CLIENT): 1}),
        (MIDDLE, {(CLIENT, FIRST): 1, (FIRST, 3): 23, (3, LAST): 1, (LAST, CLIENT): 1}),
        (LAST, {(CLIENT, FIRST): 1, (FIRST, MIDDLE): 1, (MIDDLE, 3): 23, (3, CLIENT): 2}),
    ],
)
def test_only_the_lost_span_is_replayed_by_the_one_before_it(
    lost: int, expected: dict[tuple[int, int], int], seed: int
) -> None:
    """A replacement gets all 23 tokens from its feeder; every other link carries the step alone.

    Only a new last hop says twice what it was asked for: its feeder begins with the step before, and its wishes.
    """
    user = ready_to_decode(seed=seed)
    user.session.failed(lost)
    user.decode()
    user.chain.settle()
    assert user.chain.tokens == expected
    assert user.session.num_replays == 1
    assert repr(user.session) == "<Session 3 hops | position 23/1000 | 1 replayed>"


@pytest.mark.parametrize("lost", [FIRST, MIDDLE, LAST])
def test_a_loss_inside_a_step_costs_others_no_more_than_that_step_again(lost: int) -> None:
    """Whenever a server dies while a token is decoded, no other link carries more than that token twice."""
    for at in range(25):
        user = ready_to_decode(seed=at)
        user.begin(Turn.of(1))
        for _ in range(at):
            user.chain.advance()
        user.chain.kill(lost)
        user.finish()
        user.chain.settle()
        user.decode()
        replacement = max(user.session.hops)
        replays = {ends: count for ends, count in user.chain.tokens.items() if ends[1] == replacement}
        others = user.chain.tokens - Counter(replays)
        assert replacement == 3 and list(replays.values()) == [24] and max(others.values()) <= 3


def test_failures_one_step_apart_replay_each_span_once() -> None:
    """A server that came in between two steps is known to hold everything after the first of them."""
    user = ready_to_decode()
    user.session.failed(MIDDLE)
    user.decode()
    user.chain.settle()
    user.session.failed(FIRST)
    user.chain.tokens.clear()
    user.decode()
    user.chain.settle()
    assert user.chain.tokens == {(CLIENT, 4): 24, (4, 3): 1, (3, LAST): 1, (LAST, CLIENT): 1}


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_hops_that_move_between_steps_replay_nothing(which: tuple[int, ...], push: bool) -> None:
    """The next step costs what every step costs, and comes through the other servers."""
    user = ready_to_decode(push=push)
    old = list(user.session.hops)
    for index in which:
        user.chain.move(old[index])
    user.chain.settle()
    new = list(user.session.hops)
    assert [a != b for a, b in zip(old, new, strict=True)] == [index in which for index in range(3)]
    user.decode()
    user.decode()
    assert sum(user.chain.tokens.values()) == 2 * (4 if push else 6)
    assert user.session.num_replays == 0 and user.chain.num_moves == len(which)


@pytest.mark.parametrize("at", range(0, 40, 3))
@pytest.mark.parametrize("push", [True, False])
def test_a_hop_that_moves_inside_a_step_costs_that_step_again_at_most(at: int, push: bool) -> None:
    """Whatever of the step was under way, nothing is lost, and nothing from before it is sent again."""
    for index in range(3):
        user = ready_to_decode(push=push, seed=at)
        # a server that sends to the client keeps no history, so that a rollback after a move may cost a replay
        user.begin(Turn(order=(0,), rolled_back=(2 * push,), num_tokens=(3,), num_outputs=(1,)))
        for _ in range(at):
            user.chain.advance()
        user.chain.move(list(user.session.hops)[index])
        user.finish()
        user.chain.settle()
        user.decode()
        assert user.chain.num_moves == 1 and user.session.num_replays == 0
        assert max(user.chain.tokens.values()) <= 8 + (0 if push else 6)


def test_a_server_that_has_less_than_the_one_before_is_not_taken() -> None:
    """Who says it has the session, and lacks tokens, rows or the step, takes nobody's place."""
    user = ready_to_decode()
    session, link = user.session, list(user.session.hops)[1]
    hop = session.hops[link]
    where = {"max_step_tokens": 8, "can_rollback": True}
    for step_id, received in ((2, (21,)), (-1, (0,)), (2, ()), (2, (22, 22))):
        assert not session.moved(link, session.new_link(), hop, step_id=step_id, received=received, **where)  # type: ignore[arg-type]
    other = Hop(peer_id="p", blocks=BlockRange(0, 1))
    assert not session.moved(link, session.new_link(), other, step_id=2, received=(22,), **where)  # type: ignore[arg-type]
    assert not session.moved(99, session.new_link(), hop, step_id=2, received=(22,), **where)  # type: ignore[arg-type]
    assert list(session.hops)[1] == link
    user.decode()


def test_all_hops_lost_at_once_are_replayed_from_the_client() -> None:
    """With no server left that knows anything, the client's history feeds a new chain."""
    user = ready_to_decode()
    for link in list(user.session.hops):
        user.session.failed(link)
    user.decode()
    assert user.chain.tokens == {(CLIENT, 3): 23, (3, 4): 23, (4, 5): 23, (5, CLIENT): 1}


def test_lost_history_cascades_towards_the_client() -> None:
    """A server without history can't feed the replacement of the next one, and is replaced, too."""
    user = ready_to_decode()
    user.chain.servers[FIRST].out.drop_history()
    user.session.failed(MIDDLE)
    user.decode()
    assert user.session.num_replays == 2
    assert FIRST not in user.session.hops and LAST in user.session.hops
    assert user.chain.tokens[MIDDLE + 2, LAST] <= 1


def test_the_client_keeps_history_for_the_first_hop_alone_and_the_last_hop_none() -> None:
    """Where servers push, memory for replays lies with whoever feeds; results are kept by nobody."""
    user = ready_to_decode()
    one_row = 22 * 8
    assert user.session.history_bytes == one_row
    held = [user.chain.servers[link].out.history_bytes for link in (FIRST, MIDDLE, LAST)]
    assert held == [one_row, one_row, 0]
    star = ready_to_decode(push=False)
    assert star.session.history_bytes == 3 * one_row
    assert not any(star.chain.servers[link].out.history_bytes for link in (FIRST, MIDDLE, LAST))


# -- links that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [FIRST, MIDDLE])
@pytest.mark.parametrize("at", range(0, 60, 3))
def test_what_was_under_way_on_a_broken_push_stream_arrives_through_the_client(source: int, at: int) -> None:
    """Chunks that the sender counted as held and that never came are sent again, in every phase of a step."""
    user = caller(num_rows=2, max_step_tokens=(3,), seed=at)
    user.prompt(7, 4)
    user.begin(Turn.of(5, 4))
    for _ in range(at):
        user.chain.advance()
    user.chain.cut(source, source + 1)
    user.finish()
    user.chain.settle()
    assert user.session.fallbacks == {(f"peer{2 * source}", f"peer{2 * source + 2}")}
    assert user.session.num_pushes == 1
    user.decode()
    user.chain.messages.clear()
    user.decode()
    assert sums(user.chain.messages, CLIENT) == (2, 2)


def test_a_hop_is_pushed_to_again_once_the_one_before_it_is_new() -> None:
    """The client stops feeding a hop, and forgets its history, when a server came in that may reach it."""
    user = ready_to_decode()
    user.chain.cut(MIDDLE, LAST)
    user.chain.settle()
    user.decode()
    assert user.session.num_pushes == 1
    user.chain.find_route = lambda blocks: [Hop(peer_id="spare", blocks=blocks)]
    user.session.failed(MIDDLE)
    user.chain.tokens.clear()
    user.decode()
    assert user.session.num_pushes == 2
    assert user.chain.tokens[CLIENT, LAST] == 0 and user.chain.tokens[3, LAST] == 1
    assert user.session.history_bytes == 24 * 8


def test_a_pair_that_is_known_not_to_reach_each_other_is_never_asked_to_push() -> None:
    """The driver may fill in what other sessions have learnt."""
    user = caller()
    user.session.fallbacks.add(("peer0", "peer2"))
    user.prompt(5)
    assert user.session.num_pushes == 1 and user.chain.messages[FIRST, MIDDLE] == 0


def test_link_down_between_steps_takes_effect_with_the_next() -> None:
    """Nothing is lost when a push stream breaks while no step is under way."""
    user = ready_to_decode()
    user.chain.cut(FIRST, MIDDLE)
    user.chain.settle()
    assert user.session.num_pushes == 1
    user.decode()
    assert user.chain.tokens[FIRST, CLIENT] == 23 and user.chain.tokens[CLIENT, MIDDLE] == 1


def test_link_down_of_an_older_epoch_means_nothing() -> None:
    """A server was told of a new receiver before its complaint about the old one arrived."""
    user = ready_to_decode()
    old_epoch = user.chain.epochs[FIRST]
    user.session.failed(MIDDLE)
    user.decode()
    for fault in LinkFault:
        user.session.link_down(FIRST, old_epoch, fault)
    assert user.session.num_pushes == 2 and not user.session.fallbacks and FIRST in user.session.hops


def test_link_down_about_a_server_that_is_gone_does_not_blame_its_replacement() -> None:
    """The complaint is about the old receiver, though the server was told of no other yet."""
    user = ready_to_decode()
    user.session.failed(MIDDLE)
    user.begin(Turn.of(1))
    user.session.next_action()
    user.session.routed(three_hops(BlockRange(2, 4)))
    user.session.link_down(FIRST, user.chain.epochs[FIRST], LinkFault.UNREACHABLE)
    assert not user.session.fallbacks
    user.finish()
    assert user.session.num_pushes == 2


def test_a_forward_that_steps_overtook_costs_a_replay_and_nothing_else() -> None:
    """Steps that were pushed reach a server before the word of the client, twice, since the first was given up."""
    user = ready_to_decode()
    user.session.failed(LAST)
    user.chain.hold(MIDDLE)
    for _ in range(3):
        user.begin(Turn.of(2))
        assert not user.finish(max_ticks=60)
    assert user.chain.servers[MIDDLE].out.step_id == user.session.step_id
    user.chain.release(MIDDLE)
    user.decode()
    assert MIDDLE in user.session.hops and user.chain.tokens[MIDDLE, 3] >= 23


def test_a_server_that_dies_before_it_is_open_was_never_replaced() -> None:
    """Opening that fails leads to another route, and counts as no replay."""
    user = caller(faults=[Fault(at=0, trouble=Trouble.REFUSE), Fault(at=0, trouble=Trouble.REFUSE)])
    user.prompt(4)
    assert user.session.num_replays == 0 and max(user.session.hops) > LAST


# -- steps ------------------------------------------------------------------------------------------------------


def test_rows_without_new_tokens_or_wanted_outputs_are_carried_along() -> None:
    """Rows may pause, and no output of a row need be wanted."""
    user = caller(num_rows=3)
    user.prompt(4, 2, 3)
    user.take(Turn(rolled_back=(0, 0, 0), num_tokens=(1, 0, 2), num_outputs=(1, 0, 0)))
    user.session.failed(MIDDLE)
    user.take(Turn(rolled_back=(0, 0, 0), num_tokens=(0, 1, 0), num_outputs=(0, 1, 0)))
    user.decode()


def test_a_step_is_done_when_every_server_holds_all_of_it_wanted_or_not() -> None:
    """A row whose outputs nobody wants may be last to arrive; a stream that breaks right after loses nothing of it."""
    for seed in range(20):
        user = caller(num_rows=2, max_step_tokens=(2,), seed=seed)
        user.take(Turn(rolled_back=(0, 0), num_tokens=(1, 12), num_outputs=(1, 0)))
        user.chain.cut(FIRST, MIDDLE)
        user.decode()


def test_a_server_that_cannot_roll_back_is_replaced_and_one_that_can_is_not() -> None:
    """A rollback costs recurrent servers their session; what is kept is replayed from the start."""
    user = ready_to_decode(recurrent=1.0)
    user.take(Turn(rolled_back=(3,), num_tokens=(1,), num_outputs=(1,)))
    assert user.chain.tokens[CLIENT, 3] == 20 and set(user.session.hops) == {3, 4, 5}
    others = ready_to_decode()
    others.take(Turn(rolled_back=(3,), num_tokens=(1,), num_outputs=(1,)))
    assert set(others.session.hops) == {FIRST, MIDDLE, LAST}


def test_a_recurrent_replacement_never_sees_what_the_step_rolls_back() -> None:
    """The server before it still holds what this step forgets, and must not send it."""
    for seed in range(20):
        user = ready_to_decode(seed=seed, recurrent=1.0)
        for server in (FIRST, MIDDLE):
            user.session.opened(server, max_step_tokens=1000, can_rollback=True)
            user.chain.servers[server].can_rollback = True
        user.take(Turn(rolled_back=(3,), num_tokens=(1,), num_outputs=(1,)))
        assert set(user.session.hops) == {FIRST, MIDDLE, 3}


@pytest.mark.parametrize("order", [None, (1, 0)])
def test_an_abandoned_step_counts_as_never_begun(order: tuple[int, ...] | None) -> None:
    """The session goes on from before it; only a permutation of rows can't be undone, and empties them."""
    user = caller(num_rows=2)
    user.prompt(5, 3)
    for ticks in range(0, 40, 4):
        turn = Turn(order=order, rolled_back=(1, 0), num_tokens=(4, 1), num_outputs=(1, 1), max_ticks=ticks)
        if user.take(turn):
            break
        if order is not None:
            assert user.session.lengths == (0, 0)
        user.prompt(2, 2)


@pytest.mark.parametrize("broken", [None, MIDDLE])
@pytest.mark.parametrize("lost", [FIRST, MIDDLE])
def test_giving_up_a_rollback_with_trouble_before_or_after(lost: int, broken: int | None) -> None:
    """What servers hold after it is what it kept, and history that was on its way to the client comes again."""
    for ticks in range(4, 60, 2):
        user = caller(max_step_tokens=(1,), seed=ticks)
        user.prompt(6)
        if broken is not None:
            user.chain.cut(broken, broken + 1)
            user.chain.settle()
        turn = Turn(rolled_back=(4,), num_tokens=(9,), num_outputs=(1,), max_ticks=ticks)
        if not user.take(turn):
            user.session.failed(lost)
        user.decode()


def test_giving_up_while_the_client_takes_a_history_over() -> None:
    """What had not come of it yet is ignored when it comes, and must be asked for again."""
    for ticks in range(4, 60, 2):
        user = caller(max_step_tokens=(1,), seed=ticks)
        user.prompt(12)
        user.chain.cut(FIRST, MIDDLE)
        user.chain.settle()
        user.take(Turn(rolled_back=(0,), num_tokens=(1,), num_outputs=(1,), max_ticks=ticks))
        user.decode()


def test_abandoning_twice_or_between_steps_does_nothing() -> None:
    """Without a step under way there is nothing to give up."""
    user = ready_to_decode()
    user.session.abandon()
    user.decode()
    assert user.session.num_replays == 0 and user.session.lengths == (23,)


def test_all_sessions_may_be_opened_at_once() -> None:
    """`next_action` names them one by one, `pending_opens` all; only the last hop's outputs are the client's."""
    session = Session(BlockRange(0, 6), batch_size=1, max_length=10)
    session.begin(torch.zeros(1, 1), positions=[0], num_tokens=[1])
    assert session.next_action() == FindRoute(blocks=BlockRange(0, 6))
    session.routed(three_hops(BlockRange(0, 6)))
    assert [opening.is_last for opening in session.pending_opens] == [False, False, True]
    seen = []
    while isinstance(action := session.next_action(), Open):
        seen.append(action.link)
        session.opened(action.link, max_step_tokens=10, can_rollback=True)
    assert seen == [FIRST, MIDDLE, LAST] and isinstance(action, Connect)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"positions": [4], "num_tokens": [1]}, "holds 3 tokens, cannot continue at position 4"),
        ({"positions": [3], "num_tokens": [2]}, "need hidden states of 2 tokens"),
        ({"positions": [3, 3], "num_tokens": [1]}, "has 1 rows"),
        ({"positions": [3], "num_tokens": [1], "num_outputs": [2]}, "2 outputs"),
        ({"positions": [3], "num_tokens": [1], "num_outputs": [0]}, "some output"),
    ],
)
def test_steps_that_do_not_fit_are_refused(step: dict[str, list[int]], words: str) -> None:
    """Wrong positions, shapes and counts are the caller's fault, and named; the session is as it was."""
    user = Caller(FakeChain(Session(BlockRange(0, 2), batch_size=1, max_length=4)))
    user.prompt(3)
    with pytest.raises(InvalidRequest, match=words):
        user.session.begin(torch.ones(1, 1), **step)
    user.decode()


def test_a_route_must_cover_the_blocks() -> None:
    """A route with a hole is refused."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=4)
    session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])
    with pytest.raises(InvalidRequest, match="does not cover"):
        session.routed([Hop(peer_id="a", blocks=BlockRange(0, 3))])


def test_there_is_nothing_to_do_without_a_step() -> None:
    """A driver that asks for an action between steps, or begins two, has a bug."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=4)
    with pytest.raises(InvalidRequest, match="no step"):
        session.next_action()
    session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])
    with pytest.raises(InvalidRequest, match="under way"):
        session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])


# -- hostile servers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "num_tokens", "shape"),
    [
        ((6, 3), (0, 1), (1, 1)),
        ((6, 3), (1, 1), (2, 1)),
        ((5, 3), (2, 1), (3, 1)),
        ((5, 3), (1, 1 << 20), ((1 << 20) + 1, 1)),
        ((5,), (1,), (1, 1)),
        ((5, 3, 0), (1, 1, 0), (2, 1)),
        ((5, 3), (1, 1), (2, 3)),
        ((5, 3), (1, 1), (3, 1)),
        ((5, 3), (1, 1), (2,)),
    ],
    ids=["fine", "gap", "too many", "far too many", "few rows", "many rows", "width", "count", "flat"],
)
@pytest.mark.parametrize(("push", "link"), [(True, LAST), (False, FIRST)])
def test_outputs_that_nobody_asked_for_are_refused_and_change_nothing(
    push: bool, link: int, positions: tuple[int, ...], num_tokens: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """What a hostile server makes up is refused as a whole, and the honest outputs still count."""
    user = caller(num_rows=2, push=push)
    user.prompt(5, 3)
    user.begin(Turn.of(1, 1))
    made_up = torch.zeros(1, dtype=torch.float64).expand(shape)
    result = {"positions": positions, "num_tokens": num_tokens, "hidden_states": made_up}
    if sum(num_tokens) == 1 and len(num_tokens) == 2:
        user.session.received(link, step_id=user.session.step_id - 1, **result)  # type: ignore[arg-type]
    else:
        with pytest.raises(PeerMisbehaved) as caught:
            user.session.received(link, step_id=user.session.step_id, **result)  # type: ignore[arg-type]
        assert caught.value.peer_id == f"peer{2 * link}"
    user.finish()


def test_outputs_that_come_twice_or_too_late_are_skipped() -> None:
    """Results of an old step, of a replaced server, or known already are no fault."""
    user = ready_to_decode()
    user.begin(Turn.of(1))
    wrong = torch.full((1, 1), -1.0, dtype=torch.float64)
    step_id = user.session.step_id
    user.session.received(LAST, step_id=step_id - 1, positions=(22,), num_tokens=(1,), hidden_states=wrong)
    user.session.received(LAST, step_id=step_id, positions=(21,), num_tokens=(1,), hidden_states=wrong)
    user.session.received(FIRST, step_id=step_id, positions=(22,), num_tokens=(1,), hidden_states=wrong)
    user.session.failed(LAST)
    user.session.received(LAST, step_id=step_id, positions=(22,), num_tokens=(1,), hidden_states=wrong)
    user.finish()
