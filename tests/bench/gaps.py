"""When which blocks had a server, by what servers said: the gaps, how long they lasted, and who ended them.

    Spells of all servers ─► gaps_between ─► Gap: blocks, since, until, how long of that its end was not even loading

Pure; knows nothing of processes. Times are seconds of one clock.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarm.types import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Spell:
    """A time in which one server serves the same blocks."""

    blocks: BlockRange
    loading_since: float
    """When it began to load them."""
    since: float
    until: float
    is_moved: bool = False
    """Whether it has left others for these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time in which nobody served some blocks."""

    blocks: tuple[int, ...]
    since: float
    until: float
    """Its end, or that of what was looked at."""
    filled_by: Spell | None
    """What ended it; None while it lasts."""

    @property
    def waited_s(self) -> float:
        """How long it took until whoever ended it began to load."""
        begun = self.until if self.filled_by is None else self.filled_by.loading_since
        return max(0.0, begun - self.since)


def gaps_between(spells: Iterable[Spell], num_blocks: int, since: float, until: float) -> list[Gap]:
    """All gaps that touch a time, cut to it; blocks that were missing for the same time are one gap.

    Args:
        spells: of all servers.
        num_blocks: of the model.
        since, until: what is looked at.
    """
    in_order = sorted((it for it in spells if it.since < it.until), key=lambda it: it.since)
    found: dict[tuple[float, float, Spell | None], list[int]] = defaultdict(list)
    for block in range(num_blocks):
        for gap in _uncovered([it for it in in_order if block in it.blocks], since, until):
            found[gap].append(block)
    return sorted(
        (Gap(blocks=tuple(blocks), since=key[0], until=key[1], filled_by=key[2]) for key, blocks in found.items()),
        key=lambda gap: (gap.since, gap.blocks),
    )


def _uncovered(spells: Sequence[Spell], since: float, until: float) -> Iterable[tuple[float, float, Spell | None]]:
    """The gaps of one block: since when, until when, and what ended it."""
    at = since
    for spell in spells:
        if spell.since >= until:
            break
        if spell.since > at:
            yield at, spell.since, spell
        at = max(at, spell.until)
    if at < until:
        yield at, until, None


def had_gap(gaps: Iterable[Gap], since: float, until: float) -> bool:
    """Whether there was any gap at some moment of a time."""
    return any(gap.since <= until and since < gap.until for gap in gaps)


def covered_part(gaps: Iterable[Gap], since: float, until: float) -> float:
    """The part of a time in which there was no gap."""
    missing_s, at = 0.0, since
    for gap in sorted(gaps, key=lambda it: it.since):
        begin, end = max(at, gap.since), min(gap.until, until)
        missing_s, at = missing_s + max(0.0, end - begin), max(at, end)
    return 1.0 - missing_s / (until - since)
