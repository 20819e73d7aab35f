"""Whether the servers of a swarm are there, by what their records say and by whether they answer.

    record, as of when it was read ─┐
    who answered when, who did not ─┴─► Attendance.of ─► HEARD, EXPECTED, LATE, SILENT or GONE

A record is judged as of when its shard was read: in a large swarm that is minutes ago, and says nothing against a
server that has renewed its record since. Who was asked and did not answer is silent until it answers, whatever it
announces meanwhile. After a while that is no news any more: nobody need wait for others to notice it.

Pure; knows neither how servers are asked nor whom.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from swarm.directory import Seen
from swarm.registry import ServerRecord
from swarm.types import ServerState

HEARD_S = 10.0
"""An answer shows for so long that a server is there, though its record is late."""
NEWS_S = 90.0
"""Who fell silent longer ago is gone: all have had the time to notice it ..."""
NEW_AGAIN_S = 600.0
"""... and it is no news again within this time: who answers now and then would keep all in doubt."""
PROMISE_S = 900.0
"""So long a server may say that it loads blocks, and be taken to hold them."""
FORGET_S = 3600.0
"""What was known of those that are not announced any more is forgotten after so long."""


class Standing(Enum):
    """What is known of whether a server is there."""

    HEARD = "it has answered a moment ago"
    EXPECTED = "its record had been renewed in time when it was read"
    LATE = "its record had not"
    SILENT = "it was asked lately, and did not answer"
    GONE = "it has not answered for long, or has said for too long that it loads"

    @property
    def is_there(self) -> bool:
        """Whether it is taken to be there."""
        return self is not Standing.SILENT and self is not Standing.GONE


@dataclass(slots=True, kw_only=True)
class _Spell:
    """A time of silence, or of loading."""

    since: float
    last_at: float


class Attendance:
    """What one server knows of the others; `now` is monotonic. Pure."""

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}
        """When servers answered that answered when they were asked last."""
        self._silent: dict[str, _Spell] = {}
        """Since when others did not answer, and when they were asked last."""
        self._fell_silent: dict[str, float] = {}
        """When servers fell silent, those that have answered since as well; the first time within NEW_AGAIN_S."""
        self._loading: dict[str, _Spell] = {}
        """Since when servers have said that they load, without having said since that they serve."""

    def asked(self, records: Iterable[ServerRecord], silent: Collection[str], now: float) -> None:
        """These were asked, and some of them did not answer."""
        for peer_id in (record.peer_id for record in records):
            if peer_id in silent:
                self._heard.pop(peer_id, None)
                since = self._fell_silent.setdefault(peer_id, now)
                self._silent.setdefault(peer_id, _Spell(since=since, last_at=now)).last_at = now
            else:
                self._silent.pop(peer_id, None)
                self._heard[peer_id] = now

    def announced(self, records: Iterable[ServerRecord], now: float) -> None:
        """All records, as they are known now."""
        states = {record.peer_id: record.state for record in records}
        for peer_id, state in states.items():
            if state is ServerState.JOINING:
                self._loading.setdefault(peer_id, _Spell(since=now, last_at=now)).last_at = now
            else:
                self._loading.pop(peer_id, None)
        self._fell_silent = {peer_id: at for peer_id, at in self._fell_silent.items() if now - at <= NEW_AGAIN_S}
        self._heard = {peer_id: at for peer_id, at in self._heard.items() if now - at <= HEARD_S}
        for spells in (self._silent, self._loading):
            for peer_id in [it for it, spell in spells.items() if it not in states and now - spell.last_at > FORGET_S]:
                del spells[peer_id]

    @property
    def silent(self) -> dict[str, float]:
        """When those were asked last that did not answer."""
        return {peer_id: spell.last_at for peer_id, spell in self._silent.items()}

    def of(self, seen: Seen, now: float) -> Standing:
        """What is known of one server."""
        peer_id = seen.record.peer_id
        if (silence := self._silent.get(peer_id)) is not None:
            return Standing.SILENT if now - silence.since <= NEWS_S else Standing.GONE
        loading = self._loading.get(peer_id)
        if loading is not None and now - loading.since > PROMISE_S and seen.record.state is ServerState.JOINING:
            return Standing.GONE
        if now - self._heard.get(peer_id, float("-inf")) <= HEARD_S:
            return Standing.HEARD
        return Standing.LATE if seen.is_late else Standing.EXPECTED
