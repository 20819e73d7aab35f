"""The session machine in a fake swarm: whatever fails and whatever overtakes what, the outputs are right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.protocol import LinkFault
from swarm.session import Connect, FindRoute, Hop, Open, Send, Session, Wait
from swarm.types import BlockRange

from .fake_chain import CLIENT, Caller, FakeChain, Fault, Trouble, Turn, run_blocks, to_tensor

FIRST, MIDDLE, LAST = 0, 1, 2
"""Links of the hops of `three_hops`, until one is replaced: links count up."""


def three_hops(blocks: BlockRange) -> list[Hop]:
    """A server for every two blocks; those of a replacement get another name."""
    return [Hop(peer_id=f"peer{start}", blocks=BlockRange(start, start + 2)) for start in range(*blocks_of(blocks), 2)]


def blocks_of(blocks: BlockRange) -> tuple[int, int]:
    return blocks.start, blocks.end


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
    import random

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


@pytest.mark.parametrize(("push", "num_messages"), [(True, 1), (False, 3)])
def test_a_decoding_step_is_one_message_up_and_one_down_where_servers_push(push: bool, num_messages: int) -> None:
    """With pushing, the client sends one chunk and receives one result; without, one per hop."""
    user = caller(push=push)
    user.prompt(7)
    user.chain.settle()
    user.chain.messages.clear()
    user.decode()
    sent, received = sums(user.chain.messages, CLIENT)
    assert (sent, received) == (num_messages, num_messages)
    assert user.session.num_pushes == (2 if push else 0)


def sums(counter: dict[tuple[int, int], int], end: int) -> tuple[int, int]:
    """What went out of an end, and what came in."""
    sent = sum(count for (source, _), count in counter.items() if source == end)
    return sent, sum(count for (_, target), count in counter.items() if target == end)
