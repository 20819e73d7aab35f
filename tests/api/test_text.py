"""Text comes in pieces, and is the same however it is cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swarm.api.text import Detokenizer, StopStrings
from swarm.checkpoint.source import resolve
from tests.api.conftest import needs_smollm2

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def first_end(text: str, stops: Sequence[str]) -> int | None:
    """Where the text is cut, found letter by letter: at the longest stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


def run(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    """All that is shown of the pieces, and whether a stop string came."""
    cutter, shown = StopStrings(stops), ""
    for piece in pieces:
        text, is_over = cutter.push(piece)
        shown += text
        if is_over:
            return shown, True
    return shown + cutter.flush(), False


@given(pieces=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_a_text_is_cut_at_the_first_complete_stop_string(pieces: list[str], stops: list[str]) -> None:
    """However it comes in pieces, so also where a stop string spans several of them."""
    text = "".join(pieces)
    cut = first_end(text, stops)
    assert run(pieces, stops) == ((text, False) if cut is None else (text[:cut], True))


@given(pieces=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_only_beginnings_of_stop_strings_are_kept_back(pieces: list[str], stops: list[str]) -> None:
    """So that a reader never waits for more than the longest of them."""
    cutter, shown, seen = StopStrings(stops), "", ""
    for piece in pieces:
        text, is_over = cutter.push(piece)
        shown, seen = shown + text, seen + piece
        if is_over:
            return
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_characters_of_several_tokens_come_whole() -> None:
    """A token that ends in the middle of a character says nothing."""
    data = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"!"}
    words = Detokenizer(lambda tokens: b"".join(data[token] for token in tokens).decode(errors="replace"))
    assert [words.push(token) for token in (1, 2, 3, 4)] == ["a", "", "é", "!"]


def test_half_a_character_at_the_end_is_told_at_last() -> None:
    """Nothing is lost, though it can't be read."""
    words = Detokenizer(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert [words.push(token) for token in (97, 0xC3)] == ["a", ""]
    assert words.flush() == "\ufffd"
    assert words.flush() == ""


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct").path)
    return tokenizer


@needs_smollm2
@given(tokens=st.lists(st.integers(0, 49151), max_size=30))
def test_the_pieces_are_the_text(words: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    """Random tokens, most of them nonsense, also half characters and special ones."""
    text = Detokenizer(lambda window: str(words.decode(list(window), skip_special_tokens=True)))
    pieces = [text.push(token) for token in tokens]
    assert "".join(pieces) + text.flush() == words.decode(tokens, skip_special_tokens=True)


@needs_smollm2
@given(written=st.text(max_size=20))
def test_what_was_written_is_what_is_read(words: PreTrainedTokenizerFast, written: str) -> None:
    """Any text, through its own tokens, as far as the vocabulary has its bytes."""
    text = Detokenizer(lambda window: str(words.decode(list(window), skip_special_tokens=True)))
    tokens = words(written)["input_ids"]
    assert "".join(text.push(token) for token in tokens) + text.flush() == words.decode(tokens)
