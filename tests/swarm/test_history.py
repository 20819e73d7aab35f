"""A row's history behaves as one list of tokens of which the front may be missing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.history import MERGE_LENGTH, RowHistory, join

appends = st.tuples(st.just("append"), st.integers(0, MERGE_LENGTH + 5))
cuts = st.tuples(st.sampled_from(["truncate", "drop", "restart", "fork"]), st.integers(0, 400))


def contents(history: RowHistory) -> list[float]:
    pieces = history.slice(history.start, history.length)
    return join(pieces).flatten().tolist() if pieces else []


@given(st.lists(appends | cuts, max_size=40), st.data())
def test_a_history_behaves_like_a_list(changes: list[tuple[str, int]], data: st.DataObject) -> None:
    """After any appends, cuts and drops, what is kept is what was added last, and is counted right."""
    history, start, tokens, number = RowHistory(), 0, list[float](), 0.0
    for what, size in changes:
        length = start + len(tokens)
        if what == "append":
            new = [number + index for index in range(size)]
            number += size
            tokens += new
            history.append(torch.tensor(new).view(-1, 1))
        elif what == "truncate":
            start, tokens = (size, []) if size <= start else (start, tokens[: size - start])
            history.truncate(size)
        elif what == "drop":
            history.drop(size)
            assert start <= history.start <= max(start, min(size, length))
            start, tokens = history.start, tokens[history.start - start :]
        elif what == "restart":
            start, tokens = size, []
            history.restart(size)
        else:
            other, history = history, history.fork()
            other.append(torch.zeros(3, 1))
            other.truncate(other.start)
        assert (history.start, history.length) == (start, start + len(tokens))
        assert history.num_bytes == 4 * len(tokens)
        assert contents(history) == tokens
    first = data.draw(st.integers(start, history.length))
    last = data.draw(st.integers(first, history.length))
    found = [float(token) for piece in history.slice(first, last) for token in piece]
    assert found == tokens[first - start : last - start]


def test_decoding_leaves_few_pieces() -> None:
    """Tokens that come one by one are merged, so that a long generation is not a long list."""
    history = RowHistory()
    for number in range(1000):
        history.append(torch.tensor([[float(number)]]))
    assert len(history.slice(0, 1000)) <= 1000 // MERGE_LENGTH + MERGE_LENGTH
    assert contents(history) == [float(number) for number in range(1000)]


def test_a_whole_piece_is_handed_out_without_a_copy() -> None:
    """What was appended as one piece comes out as the same memory."""
    history, piece = RowHistory(), torch.zeros(5, 2)
    history.append(piece)
    assert join(history.slice(0, 5)).data_ptr() == piece.data_ptr()
