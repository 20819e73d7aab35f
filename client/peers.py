"""What a client knows of the servers of one model: their records, how they behaved, and the routes that follow.

    registry.lookup ──records──┐
    step timings, failures ────┴──► Offers ──swarm.routing──► hops
    who has which adapter (client.adapter_needs) ──► a little less cost

Penalties decay; nobody is banned, so a server that failed is still used when it is the only one. Which servers can't
send to each other is remembered for a while, too.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.catalog import refuse_other_content
from swarm.client.adapter_needs import AdapterNeeds, WhoHas
from swarm.client.row_adapters import RowAdapters
from swarm.errors import PeerError, RouteNotFound, SwarmError
from swarm.network.node import Node
from swarm.registry import Registry, ServerRecord
from swarm.routing import Offer, find_route
from swarm.session import Hop
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

DEFAULT_HOP_S = 0.02
"""Cost of a visit to a server that was never measured."""
DEFAULT_BLOCK_S = 0.005
"""Seconds per block and token of a server that announced no speed."""
PENALTY_S = 10.0
"""Cost that one failure adds to a visit ..."""
PENALTY_HALF_LIFE_S = 20.0
"""... and how fast it fades."""
PUSH_RETRY_S = 600.0
"""Two servers that could not reach each other are given another try after so long."""
REFRESH_S = 15.0
"""Age at which the records are read again, in the background."""


@dataclass(slots=True)
class _Behaviour:
    """What was measured of one peer."""

    hop_s: float | None = None
    penalty: float = 0.0
    penalised_at: float = 0.0

    def penalty_at(self, now: float) -> float:
        return float(self.penalty * 0.5 ** ((now - self.penalised_at) / PENALTY_HALF_LIFE_S))


class Peers:
    """The servers of one model as one client sees them.

    Args:
        node: the client's own peer.
        model: content digest of the checkpoint.
        model_name: its name, for messages.
        num_blocks: how many blocks the model has.
    """

    def __init__(self, node: Node, *, model: str, model_name: str, num_blocks: int):
        self.model, self.model_name, self.num_blocks = model, model_name, num_blocks
        self._node = node
        self._registry = Registry(node)
        self._records: dict[str, ServerRecord] = {}
        self._read_at = float("-inf")
        self._behaviour: dict[str, _Behaviour] = {}
        self._no_push: dict[tuple[str, str], float] = {}
        self._who_has = WhoHas()
        self._reading = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @property
    def records(self) -> tuple[ServerRecord, ...]:
        """The servers as last read, online ones only."""
        return tuple(record for record in self._records.values() if record.state is ServerState.ONLINE)

    def name_of(self, peer_id: str) -> str:
        """The public name of a server, or the end of its identity."""
        record = self._records.get(peer_id)
        return record.public_name if record is not None and record.public_name else f"…{peer_id[-8:]}"

    async def refresh(self, *, max_age_s: float = REFRESH_S) -> None:
        """Read the records again when they are older than `max_age_s`."""
        async with self._reading:
            if time.monotonic() - self._read_at < max_age_s:
                return
            try:
                records = await self._registry.lookup(self.model)
            except PeerError as error:
                if not self._records:
                    raise
                logger.info("the DHT does not answer, going on with what is known: %s", error)
                return
            self._records = {record.peer_id: record for record in records if record.blocks.end <= self.num_blocks}
            self._who_has.announced(self._records.values())
            self._read_at = time.monotonic()

    def adapters_of(self, adapters: RowAdapters) -> AdapterNeeds | None:
        """What servers need for a session with these adapters; None where that is nothing."""
        if not adapters.remote:
            return None
        return AdapterNeeds(adapters, self._who_has)

    def have_adapters(self, hops: Sequence[Hop], adapters: AdapterNeeds) -> None:
        """These servers have answered a step of a session with these adapters."""
        self._who_has.seen(hops, adapters.digests)

    async def route(self, blocks: BlockRange, *, adapters: AdapterNeeds | None = None) -> tuple[Hop, ...]:
        """The best chain over `blocks` by what is known now.

        Args:
            blocks: which ones.
            adapters: servers that have these cost a little less than others; nobody is left out.

        Raises:
            RouteNotFound: when blocks are missing.
            PeerTimeout: when the DHT doesn't answer and nothing is known from before.
            CheckpointMismatch: when the swarm serves this name with other content only.
        """
        if not self._records:
            await self.refresh()
        self.keep_fresh()
        try:
            hops = find_route(self._offers(adapters), blocks)
            if not any(self._has_failed(hop.peer_id) for hop in hops):
                return hops
            await self.refresh(max_age_s=0.5)  # nobody better is known: perhaps there is news
            return find_route(self._offers(adapters), blocks)
        except RouteNotFound:
            await self.refresh(max_age_s=0.5)
            if not self._records:
                await refuse_other_content(self._node, self.model_name, self.model)
            return find_route(self._offers(adapters), blocks)

    def keep_fresh(self) -> None:
        """Read records that are old, without waiting: asked with every step, so that a failover need not wait."""
        if time.monotonic() - self._read_at >= REFRESH_S and (self._reader is None or self._reader.done()):
            self._reader = asyncio.create_task(self._refresh_quietly(), name="refresh records")

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except SwarmError as error:
            logger.info("can't read who serves the model: %s", error)

    def measured(self, peer_id: str, overhead_s: float) -> None:
        """A step over this peer took `overhead_s` besides the blocks' compute."""
        behaviour = self._behaviour.setdefault(peer_id, _Behaviour())
        behaviour.hop_s = overhead_s if behaviour.hop_s is None else 0.9 * behaviour.hop_s + 0.1 * overhead_s

    def failed(self, peer_id: str, error: Exception) -> None:
        """This peer failed; it becomes costly for a while, longer when it failed before."""
        now = time.monotonic()
        behaviour = self._behaviour.setdefault(peer_id, _Behaviour())
        behaviour.penalty = min(behaviour.penalty_at(now) + PENALTY_S, 32 * PENALTY_S)
        behaviour.penalised_at = now
        level = logging.INFO if isinstance(error, PeerError) else logging.WARNING
        logger.log(level, "server %s failed: %s", self.name_of(peer_id), error)

    @property
    def pairs_without_push(self) -> frozenset[tuple[str, str]]:
        """Pairs of servers of which the first could not send to the second lately."""
        since = time.monotonic() - PUSH_RETRY_S
        return frozenset(pair for pair, at in self._no_push.items() if at > since)

    def cannot_push(self, sender: str, receiver: str) -> None:
        """Two servers that are both alive can't reach each other: sessions take the way through the client."""
        if (sender, receiver) not in self.pairs_without_push:
            logger.warning(
                "server %s can't send to server %s: what goes from one to the other now passes this client",
                self.name_of(sender),
                self.name_of(receiver),
            )
        self._no_push[sender, receiver] = time.monotonic()

    def _has_failed(self, peer_id: str) -> bool:
        """Whether a server failed after the records were read."""
        behaviour = self._behaviour.get(peer_id)
        return behaviour is not None and behaviour.penalty > 0 and behaviour.penalised_at > self._read_at

    def _offers(self, adapters: AdapterNeeds | None) -> Sequence[Offer]:
        now = time.monotonic()
        offers = []
        for record in self.records:
            behaviour = self._behaviour.get(record.peer_id, _Behaviour())
            block_s = 1.0 / record.decode_tps if record.decode_tps > 0 else DEFAULT_BLOCK_S
            hop_s = DEFAULT_HOP_S if behaviour.hop_s is None else behaviour.hop_s
            offers.append(
                Offer(
                    peer_id=record.peer_id,
                    blocks=record.blocks,
                    block_s=block_s * (1.0 + record.load),
                    hop_s=hop_s
                    + behaviour.penalty_at(now)
                    + (adapters.load_s(record) if adapters is not None else 0.0),
                )
            )
        return offers
