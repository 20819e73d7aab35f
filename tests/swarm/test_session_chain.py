"""Who feeds whom, and what a server is known to hold, when ways break and hops move."""

import pytest
import torch

from swarm.errors import InvalidRequest
from swarm.protocol import LinkFault
from swarm.session import Session
from swarm.types import BlockRange, Hop
from tests.swarm.fake_chain import CLIENT, Fault, Trouble, Turn
from tests.swarm.three_hops import FIRST, LAST, MIDDLE, caller, ready_to_decode, sums, three_hops

# -- ways that break ----------------------------------------------------------------------------------------------


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


# -- hops that move -----------------------------------------------------------------------------------------------


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


def test_a_route_must_cover_the_blocks() -> None:
    """A route with a hole is refused."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=4)
    session.begin(torch.ones(1, 1), positions=[0], num_tokens=[1])
    with pytest.raises(InvalidRequest, match="does not cover"):
        session.routed([Hop(peer_id="a", blocks=BlockRange(0, 3))])
