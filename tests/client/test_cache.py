"""Whatever transformers does to its cache, the servers end up holding the rows that it means."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.cache import RemoteCache
from swarm.client.remote_blocks import run
from swarm.errors import InvalidRequest


class TokenSession:
    """Holds the values it was sent, row by row, and answers each with itself; counts what travelled."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.rows: list[list[float]] = [[] for _ in range(batch_size)]
        self.num_received = 0
        self.is_closed = False

    @property
    def route(self) -> Sequence[Any]:
        return ()

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if order is not None:
            self.rows = [list(self.rows[old]) for old in order]
        outputs = []
        for row, piece in enumerate(hidden_states.split(list(num_tokens))):
            assert positions[row] <= len(self.rows[row])
            del self.rows[row][positions[row] :]
            self.rows[row] += [float(value) for value in piece[:, 0]]
            assert num_outputs is not None
            outputs.append(piece[len(piece) - num_outputs[row] :])
        self.num_received += len(hidden_states)
        return torch.cat(outputs)

    def close(self) -> None:
        self.is_closed = True


def make(rows: int, copies: int = 1) -> tuple[TokenSession, RemoteCache]:
    session = TokenSession(rows)
    return session, RemoteCache(session, max_length=1000, copies=copies)


def send(cache: RemoteCache, values: list[list[float]]) -> torch.Tensor:
    """One step with these new values per row."""
    return run(cache, torch.tensor(values)[:, :, None])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_steps_orders_and_crops(data: st.DataObject) -> None:
    """After each step the servers hold exactly the rows of a plain list model, and leaders stand for their copies."""
    groups, copies = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3]))
    rows = groups * copies
    session, cache = make(rows, copies)
    prompts = [[float(100 * group + column) for column in range(4)] for group in range(groups)]
    expected: list[list[float]] = [[] for _ in range(rows)]
    pending = [prompts[row // copies] for row in range(rows)]
    for step in range(data.draw(st.integers(1, 6))):
        answer = send(cache, pending)
        assert answer[:, :, 0].tolist() == pending
        expected = [row + new for row, new in zip(expected, pending, strict=True)]
        held = [session.rows[row - row % copies] if cache.copies > 1 else session.rows[row] for row in range(rows)]
        assert held == expected
        if data.draw(st.booleans()):
            order = [row - row % copies + data.draw(st.integers(0, copies - 1)) for row in range(rows)]
            cache.reorder_cache(torch.tensor(order))
            expected = [list(expected[old]) for old in order]
        if data.draw(st.booleans()):
            dropped = data.draw(st.integers(0, min(2, cache.length)))
            cache.crop(-dropped)
            expected = [row[: len(row) - dropped] for row in expected]
        equal = data.draw(st.booleans())
        pending = [[float(1000 * step + (row // copies if equal else row))] for row in range(rows)]


def test_copies_of_a_prompt_travel_once() -> None:
    """Four beams of one prompt cost one prompt; when they part, the servers fork."""
    session, cache = make(4, copies=4)
    send(cache, [[1.0, 2.0, 3.0]] * 4)
    assert session.num_received == 3
    cache.reorder_cache(torch.tensor([0, 0, 1, 3]))
    send(cache, [[4.0], [5.0], [6.0], [7.0]])
    assert session.num_received == 7
    assert session.rows == [[1.0, 2.0, 3.0, last] for last in (4.0, 5.0, 6.0, 7.0)]


def test_padding_does_not_travel() -> None:
    """Only real tokens are sent, and answers land where their tokens stand."""
    session, cache = make(2)
    hidden = torch.tensor([[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    answer = run(cache, hidden, mask=mask)
    assert session.rows == [[1.0, 2.0], [3.0, 4.0, 5.0]]
    assert torch.equal(answer, hidden * mask[:, :, None])
    run(cache, torch.tensor([[[6.0]], [[7.0]]]), mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert session.rows == [[1.0, 2.0, 6.0], [3.0, 4.0, 5.0, 7.0]]


def test_only_wanted_outputs_come_back() -> None:
    """Positions that nobody looks at are zero."""
    _, cache = make(2)
    answer = run(cache, torch.ones(2, 5, 1), outputs=2)
    assert answer[:, :, 0].tolist() == [[0, 0, 0, 1, 1]] * 2


def test_wrong_use_is_refused() -> None:
    """Batches, masks, lengths and crops that do not fit, and a closed session."""
    session, cache = make(2)
    with pytest.raises(InvalidRequest, match="3 rows, the session 2"):
        run(cache, torch.ones(3, 1, 1))
    with pytest.raises(InvalidRequest, match=r"\(2, 4\), need \(2, 1\)"):
        run(cache, torch.ones(2, 1, 1), mask=torch.ones(2, 4))
    with pytest.raises(InvalidRequest, match="max_length of 1000"):
        run(cache, torch.ones(2, 1001, 1))
    with pytest.raises(InvalidRequest, match="holds a token"):
        run(cache, torch.ones(2, 3, 1), mask=torch.tensor([[1, 1, 0], [1, 0, 0]]), outputs=1)
    run(cache, torch.ones(2, 3, 1))
    for wrong in (1, -4):
        with pytest.raises(InvalidRequest, match=f"crop\\({wrong}\\)"):
            cache.crop(wrong)
    with pytest.raises(InvalidRequest, match="3 rows for a session of 2"):
        cache.reorder_cache(torch.tensor([0, 1, 1]))
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(InvalidRequest, match="open another"):
            change()
    with pytest.raises(InvalidRequest, match="local layer"):
        cache.update(torch.ones(1), torch.ones(1), 0)
    cache.close()
    assert session.is_closed
    with pytest.raises(InvalidRequest, match="closed"):
        run(cache, torch.ones(2, 1, 1))


def test_a_failed_step_changes_nothing_unless_rows_may_have_moved() -> None:
    """The same step can be tried again; after an order of rows in flight, the session is empty and all is sent anew."""
    session, cache = make(2)
    send(cache, [[1.0], [2.0]])
    step, session.step = session.step, lambda *_, **__: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ZeroDivisionError):
        send(cache, [[3.0], [4.0]])
    assert (cache.length, cache.lengths, cache.is_closed) == (1, [1, 1], False)
    session.step = step  # type: ignore[method-assign]
    send(cache, [[3.0], [4.0]])
    assert session.rows == [[1.0, 3.0], [2.0, 4.0]]
    session.step = lambda *_, **__: 1 / 0  # type: ignore[assignment, method-assign]
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ZeroDivisionError):
        send(cache, [[5.0], [6.0]])
    assert (cache.length, cache.lengths, cache.is_closed) == (0, [0, 0], False)
    session.step = step  # type: ignore[method-assign]
    send(cache, [[7.0, 8.0], [9.0, 10.0]])
    assert session.rows == [[7.0, 8.0], [9.0, 10.0]]


def test_it_tells_operators_what_it_is() -> None:
    """Its repr names hops, rows and position; it is true although it has no layers."""
    session, cache = make(2)
    send(cache, [[1.0], [2.0]])
    assert repr(cache) == "<RemoteCache 0 hops | 2 rows | position 1/1000>"
    assert cache and len(cache) == 0
    cache.reset()
    assert (cache.get_seq_length(), cache.get_mask_sizes(3)) == (0, (3, 0))
    with cache:
        pass
    assert repr(cache).startswith("<RemoteCache closed")
    assert session.is_closed
