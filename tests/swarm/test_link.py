"""The sending end of a link owes what the receiver lacks; with the receiving end, every token arrives once."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.intake import Intake
from swarm.link import HistoryLost, Link
from swarm.step_chunk import StepChunk


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def begin(link: Link, step_id: int, base: Sequence[int], order: tuple[int, ...] | None = None) -> None:
    link.begin(step_id, order=order, base=tuple(base), outputs_from=tuple(base))


def drain(link: Link) -> list[StepChunk]:
    chunks = []
    while (chunk := link.next_chunk()) is not None:
        chunks.append(chunk)
    return chunks


def sent(chunk: StepChunk) -> tuple[tuple[int, ...], tuple[int, ...], list[float]]:
    return chunk.positions, chunk.num_tokens, chunk.hidden_states.flatten().tolist()


def connected(num_rows: int = 1, **options: int) -> Link:
    link = Link(num_rows, to_client=False)
    link.connect(held=(0,) * num_rows, as_of=-1, **options)
    return link


def test_a_link_sends_what_its_receiver_lacks_and_nothing_twice() -> None:
    """Tokens go out row after row in chunks of the receiver's size."""
    link = connected(2, max_step_tokens=4)
    begin(link, 0, (0, 0))
    link.append(0, 0, numbers(1, 2, 3))
    link.append(1, 0, numbers(7, 8))
    assert link.is_behind and link.num_unsent == 5
    assert [sent(chunk) for chunk in drain(link)] == [
        ((0, 0), (3, 1), [1, 2, 3, 7]),
        ((3, 1), (0, 1), [8]),
    ]
    assert link.held == link.lengths == (3, 2) and link.num_unsent == 0
    link.append(0, 1, numbers(2, 3, 4))
    assert [sent(chunk) for chunk in drain(link)] == [((3, 2), (1, 0), [4])]


def test_all_chunks_of_a_step_say_the_same_of_the_step() -> None:
    """Receivers may see them in any mixture of streams."""
    link = connected(2, max_step_tokens=1)
    link.begin(5, order=(1, 0), base=(0, 0), outputs_from=(2, 0))
    link.append(0, 0, numbers(1, 2, 3))
    chunks = drain(link)
    assert len(chunks) == 3
    assert {(chunk.step_id, chunk.order, chunk.base, chunk.outputs_from) for chunk in chunks} == {
        (5, (1, 0), (0, 0), (2, 0))
    }


def test_a_link_without_a_receiver_keeps_everything_for_the_first_that_is_named() -> None:
    """Steps may reach a server before the word where its outputs go."""
    link = Link(1, to_client=False)
    begin(link, 0, (0,))
    link.append(0, 0, numbers(1, 2))
    assert link.next_chunk() is None and link.is_behind
    link.connect(held=(1,), as_of=0)
    assert [sent(chunk) for chunk in drain(link)] == [((1,), (1,), [2])]
    link.disconnect()
    link.append(0, 2, numbers(3))
    assert link.next_chunk() is None
    link.connect(held=(0,), as_of=0)
    assert [sent(chunk) for chunk in drain(link)] == [((0,), (3,), [1, 2, 3])]


def test_what_a_receiver_held_before_a_step_is_counted_in_the_order_of_that_step() -> None:
    """Word of the client that is as old as the step before is translated by order and rollback."""
    link = connected(2)
    begin(link, 0, (0, 0))
    link.append(0, 0, numbers(1, 2, 3))
    link.append(1, 0, numbers(7, 8))
    drain(link)
    begin(link, 1, (2, 2), order=(0, 0))
    link.append(0, 2, numbers(4))
    link.append(1, 2, numbers(5))
    link.connect(held=(3, 1), as_of=0)
    assert link.held == (2, 2)
    assert [sent(chunk) for chunk in drain(link)] == [((2, 2), (1, 1), [4, 5])]


def test_word_of_a_step_to_come_waits_for_it() -> None:
    """Nothing is sent before the step has begun as of which it is known what the receiver holds."""
    link = connected(2)
    begin(link, 0, (0, 0))
    link.append(0, 0, numbers(1, 2, 3))
    link.connect(held=(0, 1), as_of=1)
    assert link.next_chunk() is None
    begin(link, 1, (0, 3), order=(1, 0))
    assert [sent(chunk) for chunk in drain(link)] == [((0, 1), (0, 2), [2, 3])]


def test_word_that_is_too_old_means_that_nothing_is_known() -> None:
    """Two steps overtook it: the receiver gets everything, and skips what it has."""
    link = connected()
    for step_id in range(3):
        begin(link, step_id, (step_id,))
        link.append(0, step_id, numbers(step_id))
    drain(link)
    link.connect(held=(2,), as_of=0)
    assert [sent(chunk) for chunk in drain(link)] == [((0,), (3,), [0, 1, 2])]


def test_history_that_was_dropped_cannot_feed_a_replacement() -> None:
    """Only a receiver that holds what is missing may go on; after a refusal the link has no receiver."""
    link = connected()
    begin(link, 0, (0,))
    link.append(0, 0, numbers(1, 2))
    drain(link)
    link.append(0, 2, numbers(3))
    assert link.history_bytes == 24
    link.drop_history()
    assert link.history_bytes == 8, "what was not sent yet is kept"
    with pytest.raises(HistoryLost):
        link.connect(held=(1,), as_of=0)
    assert link.next_chunk() is None
    link.connect(held=(2,), as_of=0)
    assert [sent(chunk) for chunk in drain(link)] == [((2,), (1,), [3])]


def test_a_rollback_below_lost_history_loses_the_rest() -> None:
    """What is appended afterwards is history again, from there."""
    link = connected()
    begin(link, 0, (0,))
    link.append(0, 0, numbers(1, 2, 3))
    drain(link)
    link.drop_history()
    begin(link, 1, (1,))
    link.append(0, 1, numbers(9))
    assert [sent(chunk) for chunk in drain(link)] == [((1,), (1,), [9])]
    with pytest.raises(HistoryLost):
        link.connect(held=(0,), as_of=1)


def test_the_last_link_sends_what_is_wanted_and_keeps_nothing() -> None:
    """The client gets outputs from `outputs_from` on, whether others were produced or not."""
    link = Link(2, to_client=True)
    link.begin(0, order=None, base=(0, 0), outputs_from=(2, 1))
    link.append(0, 1, numbers(2, 3, 4))
    assert [sent(chunk) for chunk in drain(link)] == [((2, 1), (2, 0), [3, 4])]
    link.append(1, 1, numbers(8))
    assert [sent(chunk) for chunk in drain(link)] == [((4, 1), (0, 1), [8])]
    assert link.history_bytes == 0
    link.begin(1, order=(1, 1), base=(1, 0), outputs_from=(1, 3))
    link.append(0, 1, numbers(5))
    link.append(1, 3, numbers(6))
    assert [sent(chunk) for chunk in drain(link)] == [((1, 3), (1, 1), [5, 6])]


@pytest.mark.parametrize(("to_client", "keeps_history"), [(True, True), (False, False)])
def test_links_to_the_client_and_those_without_history_keep_nothing(to_client: bool, keeps_history: bool) -> None:
    """What the client got from a server in the middle is its own history now."""
    link = Link(1, to_client=False, keeps_history=keeps_history)
    link.connect(held=(0,), as_of=-1, to_client=to_client)
    begin(link, 0, (0,))
    link.append(0, 0, numbers(1, 2))
    assert len(drain(link)) == 1 and link.history_bytes == 0


def test_a_receiver_of_other_rows_is_refused() -> None:
    """The number of rows is fixed for a session."""
    with pytest.raises(InvalidRequest, match="has 2 rows, the link speaks of 1"):
        Link(2, to_client=False).connect(held=(0,), as_of=-1)


def test_a_link_to_the_client_goes_on_behind_what_the_client_has() -> None:
    """What was sent is not sent again by another server; what comes next is."""
    first, second = Link(1, to_client=True), Link(1, to_client=True)
    begin(first, 0, [0])
    first.append(0, 0, numbers(1, 2))
    assert len(drain(first)) == 1
    second.resume(first.save())
    assert drain(second) == []
    second.append(0, 2, numbers(3))
    (last,) = drain(second)
    assert (last.positions, last.num_tokens) == ((2,), (1,))


# -- both ends ----------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.none() | st.tuples(st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.integers(0, 6), st.integers(0, 6)),
        st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    ),
    min_size=1,
    max_size=6,
)


@given(steps, st.data())
def test_any_mixture_of_resent_chunks_yields_the_rows_once(
    plan: list[tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int]]], data: st.DataObject
) -> None:
    """A receiver that gets every chunk at least once, and old ones again, holds exactly the sender's rows.

    Also where another link, or another intake, goes on in place of the first.
    """
    link, intake = connected(2, max_step_tokens=data.draw(st.integers(1, 4))), Intake(2, max_length=100)
    rows: list[list[float]] = [[], []]
    there: list[list[float]] = [[], []]
    number = 0.0
    past: list[StepChunk] = []
    for step_id, (order, keep, counts) in enumerate(plan):
        if order is not None:
            rows = [list(rows[old]) for old in order]
        base = [min(kept, len(row)) for kept, row in zip(keep, rows, strict=True)]
        begin(link, step_id, base, order)
        for index, count in enumerate(counts):
            new = [number + offset for offset in range(count)]
            number += count
            rows[index] = rows[index][: base[index]] + new
            link.append(index, base[index], numbers(*new))
        if data.draw(st.booleans()):  # a replay of what the receiver has
            link.connect(held=[data.draw(st.integers(0, held)) for held in link.held], as_of=step_id)
        if data.draw(st.booleans()):
            link = successor(link)
        if data.draw(st.booleans()):
            before, intake = intake, Intake(2, max_length=100)
            intake.resume(before.save())
        for fresh in drain(link):
            past.append(fresh)
            for message in (fresh, *data.draw(st.lists(st.sampled_from(past), max_size=2))):
                there = deliver(intake, message, there)
        assert there == rows and intake.lengths == [len(row) for row in rows]


def successor(link: Link) -> Link:
    """A link that goes on where this one is, to the same receiver."""
    other = Link(len(link.lengths), to_client=False)
    other.resume(link.save())
    assert not other.is_connected and other.lengths == link.lengths and other.history_bytes == link.history_bytes
    other.connect(held=link.held, as_of=link.step_id, max_step_tokens=2)
    return other


def deliver(intake: Intake, message: StepChunk, rows: list[list[float]]) -> list[list[float]]:
    """What a server's cache does with what its intake lets through."""
    accepted = intake.accept(message)
    if accepted is None:
        return rows
    if accepted.order is not None:
        rows = [list(rows[old]) for old in accepted.order]
    if accepted.base is not None:
        rows = [row[:base] for row, base in zip(rows, accepted.base, strict=True)]
    pieces = accepted.hidden_states.split(list(accepted.num_tokens))
    return [row + piece.flatten().tolist() for row, piece in zip(rows, pieces, strict=True)]
