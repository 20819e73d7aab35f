"""What all servers offer a client, by what they announce and what it saw of them, as a table to find routes in.

    records, Observed, round trips ─► Offer of each server ─► Router, made anew when there is news, or it is old

A table of thousands of servers takes long to make: that is done in a thread, once for all who ask for it meanwhile.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from swarm.client.observed import Observed
from swarm.client.prospects import Seen
from swarm.coordinates import Place
from swarm.directory import Directory
from swarm.pings import Pinger
from swarm.registry import ServerRecord, peer_tag
from swarm.route_map import Location
from swarm.routing import VISIT_S, Offer, Router, free_tps

DEFAULT_BLOCK_S = 0.005
"""Seconds per block and token of a server that announced no speed."""
LIFE_S = 1.0
"""A table is used for so long."""
LARGE = 500
"""Servers of which a table is made in a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table, and what it was made of."""

    router: Router
    records: Mapping[str, ServerRecord]
    version: int
    """Of the records."""
    made_at: float


class RouteTable:
    """The table of one client.

    Args:
        directory: the records.
        observed: what was seen of servers.
        pinger: measures the ways to them; None where nobody does.
    """

    def __init__(self, directory: Directory, observed: Observed, pinger: Pinger | None) -> None:
        self.pinger = pinger
        self.latest: Table | None = None
        """The last one that was made, however old it is."""
        self._directory, self._observed = directory, observed
        self._is_stale = False
        self._making: asyncio.Task[Table] | None = None

    def expire(self) -> None:
        """Something else than the records has changed."""
        self._is_stale = True

    async def fresh(self, life_s: float = LIFE_S) -> Table:
        """The table of what is known now, or one that was made of the present records within `life_s`."""
        if self.latest is not None and self._is_fresh(self.latest, life_s):
            return self.latest
        if self._making is None or self._making.done():
            records = {record.peer_id: record for record in self._directory.online}
            self._is_stale = False
            now = time.monotonic()
            parts = self._observed.parts(now)
            if len(records) < LARGE:
                self.latest = self._make(records, self._directory.version, parts, now)
                return self.latest
            making = asyncio.to_thread(self._make, records, self._directory.version, parts, now)
            self._making = asyncio.create_task(making, name="table of routes")
        self.latest = await asyncio.shield(self._making)
        return self.latest

    def _is_fresh(self, table: Table, life_s: float) -> bool:
        is_new = table.version == self._directory.version and time.monotonic() - table.made_at <= life_s
        return is_new and not self._is_stale

    def _make(self, records: Mapping[str, ServerRecord], version: int, parts: Mapping[str, float], now: float) -> Table:
        router = Router([self.offer(record, now) for record in records.values()], self.place, parts=parts)
        return Table(router=router, records=records, version=version, made_at=now)

    @property
    def place(self) -> Place | None:
        """Where we are; None before anything was measured."""
        return self.pinger.place if self.pinger is not None and self.pinger.place.error < 1.0 else None

    def compared(self, records: Mapping[str, ServerRecord], now: float) -> dict[str, Seen]:
        """How those servers whose steps were measured lately compare with what they say."""
        found = {}
        for peer_id, known in self._observed.items():
            record, block_s = records.get(peer_id), known.block_s(now)
            if record is not None and block_s is not None:
                found[peer_id] = Seen(slowness=block_s / said_s(record), excess_s=known.excess_s(now))
        return found

    def offer(self, record: ServerRecord, now: float) -> Offer:
        """What one server offers."""
        seen = self._observed.get(record.peer_id)
        block_s = None if seen is None else seen.block_s(now)
        capacity_tps = record.prefill_tps or record.batch_tps or record.decode_tps
        return Offer(
            peer_id=record.peer_id,
            blocks=record.blocks,
            block_s=said_s(record) if block_s is None else block_s,
            visit_s=VISIT_S + record.queue_s + (0.0 if seen is None else seen.excess_s(now)),
            free_tps=free_tps(capacity_tps, record.load),
            location=Location(
                place=record.place if record.place is not None and record.place.error < 1.0 else None,
                tag=peer_tag(record.peer_id),
                pings=[(ping.tag, ping.rtt_s) for ping in record.pings],
                client_rtt_s=None if self.pinger is None else self.pinger.rtt_s(record.peer_id),
            ),
            kv_free_tokens=record.kv_free_tokens,
            is_relayed=record.is_relayed,
        )


def said_s(record: ServerRecord) -> float:
    """Seconds per block and token at present load, by what a server says."""
    idle_s = 1.0 / record.decode_tps if record.decode_tps > 0 else DEFAULT_BLOCK_S
    return idle_s * (1.0 + record.load)
