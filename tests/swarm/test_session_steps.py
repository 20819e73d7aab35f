"""What a step does to the rows, given up or not, and what outputs may come of it."""

import pytest
import torch

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.session import Session
from swarm.types import BlockRange
from tests.swarm.fake_chain import CLIENT, Caller, FakeChain, Turn
from tests.swarm.three_hops import FIRST, LAST, MIDDLE, caller, ready_to_decode


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


# -- hostile servers ----------------------------------------------------------------------------------------------


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
