"""Block ranges are half-open and refuse nonsense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.types import MAX_BLOCKS, BlockRange


@given(st.integers(0, MAX_BLOCKS - 1), st.integers(1, 100))
def test_parse_reads_what_str_writes(start, length):
    """A range survives its own text, and has as many blocks as it says."""
    blocks = BlockRange(start, min(start + length, MAX_BLOCKS))
    assert BlockRange.parse(str(blocks)) == blocks
    assert len(list(blocks)) == len(blocks) and blocks.covers(blocks) and blocks.end not in blocks


@pytest.mark.parametrize("text", ["", "3", "3:3", "5:3", "-1:4", "0:99999", "a:b", "0:4:8", "0-4"])
def test_nonsense_is_refused_in_one_line(text):
    """Empty, reversed, negative and unreadable ranges say what to write."""
    with pytest.raises(InvalidRequest) as caught:
        BlockRange.parse(text)
    assert "\n" not in str(caught.value)
