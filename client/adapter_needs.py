"""Which servers have the adapters of a session, as far as a client knows, and what it costs where they don't.

    records: notes on adapters ─┐
    steps that were answered ───┴─► WhoHas ─► AdapterNeeds.holders(hop): whom its server may ask    (OpenSession)
                                                          .load_s(record): cost for the router, soft
Bringing an adapter to a server costs time once, so a little of it counts for each token; no server is left out for it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from swarm.client.row_adapters import RowAdapters
from swarm.protocol import MAX_HOLDERS
from swarm.registry import ServerRecord
from swarm.types import Hop

LOAD_BYTES_PER_S = 4e6
"""At which rate an adapter comes to a server, for all that is known."""
LOADED_FOR_TOKENS = 256
"""A session that long makes up for bringing its adapters."""
MAX_SEEN = 1024
"""Adapters of which it is remembered where they were used."""
MAX_SERVERS = 16
"""Servers per adapter, of the latest ones."""


class WhoHas:
    """Where adapters are."""

    def __init__(self) -> None:
        self._records: dict[str, ServerRecord] = {}
        self._seen: OrderedDict[str, OrderedDict[str, Hop]] = OrderedDict()

    def announced(self, records: Iterable[ServerRecord]) -> None:
        """The records as last read."""
        self._records = {record.peer_id: record for record in records}

    def seen(self, hops: Sequence[Hop], digests: Sequence[str]) -> None:
        """These servers have used these adapters for these blocks."""
        for digest in digests:
            at = self._seen.setdefault(digest, OrderedDict())
            self._seen.move_to_end(digest)
            for hop in hops:
                at[hop.peer_id] = hop
                at.move_to_end(hop.peer_id)
            while len(at) > MAX_SERVERS:
                at.popitem(last=False)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def has(self, peer_id: str, digest: str) -> bool:
        """Whether a server has this adapter, as far as known."""
        record = self._records.get(peer_id)
        is_noted = record is not None and any(note.is_about(digest) for note in record.adapters)
        return is_noted or peer_id in self._seen.get(digest, ())

    def holders(self, digest: str, hop: Hop) -> list[str]:
        """Servers that have it for some of a hop's blocks, but for the hop's own."""
        noted = {
            record.peer_id: record.blocks
            for record in self._records.values()
            if any(note.is_about(digest) for note in record.adapters)
        }
        noted |= {other.peer_id: other.blocks for other in self._seen.get(digest, {}).values()}
        return [
            peer_id
            for peer_id, blocks in noted.items()
            if peer_id != hop.peer_id and blocks.start < hop.blocks.end and hop.blocks.start < blocks.end
        ]


class AdapterNeeds:
    """What a session with adapters wants of servers.

    Args:
        adapters: of its rows; some of them change blocks.
        who_has: what is known of where they are.
    """

    def __init__(self, adapters: RowAdapters, who_has: WhoHas):
        self.digests = tuple(adapter.digest for adapter in adapters.remote)
        self.of_row = adapters.adapter_of
        self._manifests = [adapter.manifest for adapter in adapters.remote]
        self.num_bytes = sum(manifest.num_bytes for manifest in self._manifests)
        """Of them all, over all blocks."""
        self._who_has = who_has

    def holders(self, hop: Hop) -> tuple[str, ...]:
        """Servers that this hop's may ask for the adapters."""
        found = [peer_id for digest in self.digests for peer_id in self._who_has.holders(digest, hop)]
        return tuple(dict.fromkeys(found))[:MAX_HOLDERS]

    def load_s(self, record: ServerRecord) -> float:
        """What it costs per token that a server must get the adapters first."""
        missing = sum(
            info.num_bytes
            for manifest, digest in zip(self._manifests, self.digests, strict=True)
            if not self._who_has.has(record.peer_id, digest)
            for info in manifest.within(record.blocks.start, record.blocks.end)
        )
        return missing / LOAD_BYTES_PER_S / LOADED_FOR_TOKENS
