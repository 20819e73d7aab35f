"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.health import words


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.5, "0.5"), (12.34, "12.3"), (9999, "9999"), (12_345, "12.3k"), (999_900, "1000k"),
     (1_234_567, "1.23M"), (2e9, "2G"), (1e18, "1000P")],
)  # fmt: skip
def test_counts(value: float | None, text: str):
    """Four digits as they are, larger ones with a letter."""
    assert words.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.42, "0.4 ms"), (12.4, "12 ms"), (999.4, "999 ms"), (3400, "3.4 s")]
)
def test_milliseconds(value: float | None, text: str):
    """With their unit."""
    assert words.ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (5, "5 s"), (61, "1 min"), (3 * 3600 + 720, "3 h 12 min"), (3 * 86400 + 4 * 3600, "3 d 4 h")],
)
def test_spans(value: float | None, text: str):
    """In their two largest units."""
    assert words.span(value) == text


@given(st.floats(min_value=0, max_value=1e18))
def test_nothing_is_long(value: float):
    """A cell of a table has room for it."""
    assert len(words.count(value)) <= 6 and len(words.ms(min(value, 1e6))) <= 8
