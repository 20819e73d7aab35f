"""Words of the shared language: plain frozen values with no behaviour beyond their own arithmetic."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from swarm.errors import InvalidRequest

MAX_BLOCKS = 4096
"""More transformer blocks than any model has; larger indices are refused at the edge."""


@dataclass(frozen=True, slots=True, order=True)
class BlockRange:
    """A half-open range [start, end) of transformer blocks.

    Raises:
        InvalidRequest: for an empty, negative or absurdly long range.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_BLOCKS:
            raise InvalidRequest(f"block range {self.start}:{self.end} is empty or outside 0:{MAX_BLOCKS}")

    @classmethod
    def parse(cls, text: str) -> "BlockRange":
        """Read "START:END" (half-open, so "0:24" is 24 blocks)."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if match is None:
            raise InvalidRequest(f"{text!r} is not a block range; write START:END, for example 0:24 for 24 blocks")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def covers(self, other: "BlockRange") -> bool:
        """Whether every block of `other` is in this range."""
        return self.start <= other.start and other.end <= self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server's part of a route."""

    peer_id: str
    blocks: BlockRange


def name_ranges(indices: Sequence[int]) -> str:
    """[3, 4, 5, 9] as "3:6, 9:10"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1])
    return ", ".join(f"{start}:{end}" for start, end in ranges)


class ServerState(IntEnum):
    """What a server says of itself; only ONLINE servers take new sessions."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2
    DRAINING = 3
