"""Adapters by name, as PEFT says it: which rows use which, and what is refused."""

from collections.abc import Sequence

import pytest

from swarm.client.adapters import BASE, AdapterBook
from swarm.client.row_adapters import RowAdapters
from swarm.errors import InvalidRequest
from swarm.protocol import MAX_ADAPTERS
from tests.adapters import MadeAdapter, make_adapter

A, B, PROMPT = make_adapter(1), make_adapter(2, blocks=(1,)), make_adapter(0, blocks=(), num_virtual=3)
BOTH = make_adapter(3)


@pytest.fixture
def book() -> AdapterBook:
    """With three adapters, of which none is active; two at once are BOTH."""
    book = AdapterBook(lambda parts: BOTH)
    for name, adapter in (("a", A), ("b", B), ("prompt", PROMPT)):
        book.add(name, adapter)
    return book


def rows(found: RowAdapters | None) -> Sequence[MadeAdapter | None]:
    """The adapter of each row."""
    assert found is not None
    return [found.row(index) for index in range(len(found))]  # type: ignore[misc]


def test_rows_use_what_is_named(book: AdapterBook) -> None:
    """One name for all, or one per row; None and PEFT's own word stand for no adapter."""
    assert rows(book.rows("a", 2)) == [A, A]
    assert rows(book.rows(["a", None, "b", BASE], 4)) == [A, None, B, None]
    assert book.rows([None, BASE], 2) is None and book.rows(BASE, 1) is None


def test_names_are_those_of_prompts_when_rows_are_more(book: AdapterBook) -> None:
    """Beams and several answers of a prompt lie one behind the other, and use its adapter."""
    assert rows(book.rows(["a", "b"], 6)) == [A, A, A, B, B, B]
    found = book.rows(["a", None], 2)
    assert found is not None and rows(found.expanded(2)) == [A, A, None, None]
    with pytest.raises(InvalidRequest, match="2 names for 3 rows"):
        book.rows(["a", "b"], 3)


def test_the_active_ones_are_used_unless_others_are_named(book: AdapterBook) -> None:
    """Several at once are combined; disabling and enabling keeps which; deleting one leaves the others."""
    assert book.rows(None, 2) is None
    book.activate(["b"])
    assert rows(book.rows(None, 2)) == [B, B] and rows(book.rows("a", 1)) == [A]
    book.activate(["a", "b"])
    assert rows(book.rows(None, 1)) == [BOTH] and book.active == ("a", "b")
    book.is_enabled = False
    assert book.rows(None, 1) is None and book.active == () and rows(book.rows("a", 1)) == [A]
    book.is_enabled = True
    book.remove(["a"])
    assert rows(book.rows(None, 1)) == [B] and book.names == ("b", "prompt")


def test_unknown_and_taken_names_are_refused(book: AdapterBook) -> None:
    """The message says which there are."""
    for use in (lambda: book.rows("c", 1), lambda: book.activate(["c"]), lambda: book.remove(["a", "c"])):
        with pytest.raises(InvalidRequest, match="no adapter 'c' is loaded; there are a, b, prompt"):
            use()
    with pytest.raises(InvalidRequest, match="'a' is taken"):
        book.add("a", B)


def test_servers_hear_only_of_what_changes_blocks(book: AdapterBook) -> None:
    """A prompt of embeddings is nothing to them; it is the client that puts it before the tokens."""
    found = book.rows(["prompt", "b", None, "a", "b"], 5)
    assert found is not None
    assert [adapter.digest for adapter in found.remote] == [B.digest, A.digest]
    assert found.adapter_of == (-1, 0, -1, 1, 0) and found.num_virtual == (3, 0, 0, 0, 0) and found.num_columns == 3
    only = book.rows("prompt", 2)
    assert only is not None and only.adapter_of == () and not only.remote


def test_a_batch_has_no_more_adapters_than_a_session_may() -> None:
    """The limit is the protocol's; the same adapter in many rows counts once."""
    many = [make_adapter(number, blocks=(0,)) for number in range(MAX_ADAPTERS + 1)]
    assert RowAdapters.of(many[:-1] * 2) is not None
    with pytest.raises(InvalidRequest, match=f"{MAX_ADAPTERS + 1} different adapters"):
        RowAdapters.of(many)
