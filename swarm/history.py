"""The hidden states that one row has sent into a link, by absolute position; cheap to append to, fork and cut.

    append ─► pieces [n, hidden] ─► slice(start, end)          truncate: from the end          drop: from the front

Pure bookkeeping over tensors; it knows neither steps nor peers.
"""

from collections.abc import Sequence

import torch

MERGE_LENGTH = 64
"""Pieces shorter than this are merged once they add up to it: decoding adds one token at a time."""


class RowHistory:
    """Positions [start, length) of one row, as a list of pieces [n, hidden]."""

    __slots__ = ("_num_small", "_pieces", "length", "num_bytes", "start")

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._num_small = 0
        self.start = 0
        """First position that is still kept."""
        self.length = 0
        """Position after the last one."""
        self.num_bytes = 0
        """Size of what is kept; forks count what they share."""

    def append(self, hidden_states: torch.Tensor) -> None:
        """Add the next hidden states [n, hidden]. The tensor is kept as it is: hand in one that owns its memory."""
        count = hidden_states.shape[0]
        if not count:
            return
        self._pieces.append(hidden_states)
        self.length += count
        self.num_bytes += hidden_states.nbytes
        self._num_small = self._num_small + 1 if count < MERGE_LENGTH else 0
        if self._num_small >= MERGE_LENGTH:
            self._pieces[-self._num_small :] = [torch.cat(self._pieces[-self._num_small :])]
            self._num_small = 0

    def restart(self, position: int) -> None:
        """Forget everything and go on at `position`."""
        self._pieces, self._num_small, self.num_bytes = [], 0, 0
        self.start = self.length = position

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        if length <= self.start:
            self.restart(length)
        while self.length > length:
            last = self._pieces.pop()
            self._num_small = max(0, self._num_small - 1)
            self.length -= len(last)
            self.num_bytes -= last.nbytes
            if self.length < length:
                self.append(last[: length - self.length])

    def drop(self, position: int) -> None:
        """Forget whole pieces that end at or before `position`."""
        count = 0
        while count < len(self._pieces) and self.start + len(self._pieces[count]) <= position:
            self.start += len(self._pieces[count])
            self.num_bytes -= self._pieces[count].nbytes
            count += 1
        if count:
            del self._pieces[:count]
            self._num_small = min(self._num_small, len(self._pieces))

    def fork(self) -> "RowHistory":
        """An independent copy that shares the tensors."""
        other = RowHistory()
        other._pieces, other._num_small = list(self._pieces), self._num_small
        other.start, other.length, other.num_bytes = self.start, self.length, self.num_bytes
        return other

    def slice(self, start: int, end: int) -> list[torch.Tensor]:
        """The pieces that hold positions [start, end), found from the end, where decoding looks."""
        found: list[torch.Tensor] = []
        piece_end = self.length
        for piece in reversed(self._pieces):
            if piece_end <= start:
                break
            piece_start = piece_end - piece.shape[0]
            if start <= piece_start and piece_end <= end:
                found.append(piece)
            elif piece_start < end:
                found.append(piece[max(start - piece_start, 0) : end - piece_start])
            piece_end = piece_start
        return found[::-1]


def join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of consecutive pieces, at least one, without a copy where there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
