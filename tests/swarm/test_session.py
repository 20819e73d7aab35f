"""The session machine in a fake swarm: whatever fails and whatever overtakes what, the outputs are right."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.session import Session
from swarm.session_actions import Connect, FindRoute, Open
from swarm.types import BlockRange
from tests.swarm.fake_chain import CLIENT, Caller, FakeChain, Fault, Trouble, Turn
from tests.swarm.three_hops import FIRST, LAST, MIDDLE, caller, ready_to_decode, sums, three_hops

# -- any failure schedule -----------------------------------------------------------------------------------------

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


# -- what crosses which link --------------------------------------------------------------------------------------


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


# -- actions ------------------------------------------------------------------------------------------------------


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


def test_there_is_nothing_to_do_without_a_step() -> None:
    """A driver that asks for an action between steps, or begins two, has a bug."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=4)
    with pytest.raises(InvalidRequest, match="no step"):
        session.next_action()
    session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])
    with pytest.raises(InvalidRequest, match="under way"):
        session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])
