"""From tokens to text as it comes, and where a stop string ends it: pure.

    token ─► Detokenizer ─ whole characters ─► StopStrings ─ what can't be part of a stop string ─► client

Both keep back what they can't decide yet, and hand it out in `flush`.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
"""What a tokenizer decodes half a character to."""


class Detokenizer:
    """The text of a growing sequence of tokens, piece by piece.

    A token's text may depend on the one before it (spaces) and the one after it (characters of several bytes), so a
    window of tokens is decoded with and without the new one, and begins where the text was whole last.

    Args:
        decode: the text of some tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._num_told = 0
        """Tokens of the window whose text was handed out ..."""
        self._told = ""
        """... and that text."""

    def push(self, token: int) -> str:
        """The text that is whole with this token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._told):
            return ""
        piece = text[len(self._told) :]
        self._window = self._window[self._num_told :]
        self._num_told = len(self._window)
        self._told = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """The rest, be it whole or not."""
        piece = self._decode(self._window)[len(self._told) :]
        self._window, self._num_told, self._told = [], 0, ""
        return piece


class StopStrings:
    """Cuts a text where the first of some strings is complete; how the text comes in pieces makes no difference.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has come; it is not shown itself."""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        shown = len(text) - self._num_open(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was kept back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _num_open(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for count in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
