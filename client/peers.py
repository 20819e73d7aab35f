"""What a client knows of the servers of one model: their records, how they behaved, and the routes that follow.

    Directory ──records──────────┐
    Pinger ──round trips, place──┤
    step timings, failures ──────┼──► Offers ──swarm.routing.Router──► hops
    who has which adapter ───────┘    (client.adapter_needs)

Penalties decay; nobody is banned, so a server that failed is still used when it is the only one. But records outlive
their servers: who isn't connected to us is asked before a route over it is handed out. What steps took counts more than
what servers say. Which servers can't send to each other is remembered for a while, too.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from swarm.catalog import refuse_other_content
from swarm.client.adapter_needs import AdapterNeeds, WhoHas
from swarm.client.betterment import MoveCosts
from swarm.client.observed import MUCH_QUICKER, Observed
from swarm.client.presence import over_present
from swarm.client.prospects import Outlook, look_ahead
from swarm.client.route_table import LARGE, RouteTable
from swarm.client.row_adapters import RowAdapters
from swarm.client.timings import HopTiming
from swarm.client.way_back import Leg
from swarm.directory import COPY_BYTES, NUM_COPIES, READ_BYTES_PER_S, Directory
from swarm.errors import PeerError, PeerUnreachable, RelaysBusy, RouteNotFound, SwarmError
from swarm.flow import EvenDraws
from swarm.network.node import Node
from swarm.pings import Pinger
from swarm.registry import Registry, ServerRecord
from swarm.routing import Need, Route, Router
from swarm.transport import Transport
from swarm.types import BlockRange, Hop

logger = logging.getLogger(__name__)

PUSH_RETRY_S = 600.0
"""Two servers that could not reach each other are given another try after so long."""
REFRESH_S = 15.0
"""Age at which the records are read again, in the background."""
NEWS_S = 0.5
"""Records that are younger are not read again; who looks for a server that may just have come waits so long."""
ROOM_TOKENS = 64
"""Tokens beyond those of a session for which a server should have room when the session comes to it."""
BATCH_TOKENS = 1024
"""What a micro-batch of training has, about."""
NUM_PROMISING = 2
"""Servers that a session might go to soon, which are measured, too."""
NUM_ACQUAINTANCES = 8
"""Servers that a client measures now and then, to know its place and the ways to those that it uses."""

Costs = Mapping[str, float]
"""What visits of some servers cost besides, in seconds."""


class Peers:
    """The servers of one model as one client sees them.

    Args:
        node: the client's own peer.
        transport: how servers are reached, to measure the ways to them; None measures nothing.
        model: content digest of the checkpoint.
        model_name: its name, for messages.
        num_blocks: how many blocks the model has.
    """

    def __init__(self, node: Node, transport: Transport | None = None, *, model: str, model_name: str, num_blocks: int):
        self.model, self.model_name, self.num_blocks = model, model_name, num_blocks
        self.move_costs = MoveCosts()
        """What it costs our sessions to move."""
        self._promising: set[str] = set()
        """Servers to which sessions may move: the ways to them should be known."""
        self._node = node
        self._directory = Directory(Registry(node), model=model, num_blocks=num_blocks)
        self._generator = np.random.default_rng()
        self._draws = EvenDraws(self._generator)
        """By which chains for training are drawn: one client's, even if they are few, have little in common."""
        self._pinger = None if transport is None else Pinger(transport, self._generator)
        self._observed = Observed()
        self._no_push: dict[tuple[str, str], float] = {}
        self._who_has = WhoHas()
        self._reader: asyncio.Task[None] | None = None
        self._table = RouteTable(self._directory, self._observed, self._pinger)
        self._all_read_at = float("-inf")

    @property
    def records(self) -> tuple[ServerRecord, ...]:
        """The servers as last read, online ones only."""
        return tuple(self._directory.online)

    def name_of(self, peer_id: str) -> str:
        """The public name of a server, or the end of its identity."""
        named = (seen.record.public_name for seen in self._directory.seen if seen.record.peer_id == peer_id)
        return next(named, "") or f"…{peer_id[-8:]}"

    async def refresh(self, *, max_age_s: float = REFRESH_S, everything: bool = False) -> None:
        """Read the records again when they are older than `max_age_s`."""
        try:
            await self._directory.refresh(max_age_s=max_age_s, everything=everything)
        except PeerError as error:
            if not self._directory.records:
                raise
            logger.info("the DHT does not answer, going on with what is known: %s", error)
        self._who_has.announced(self._directory.online)
        self._observed.forget_faded(time.monotonic())

    def adapters_of(self, adapters: RowAdapters) -> AdapterNeeds | None:
        """What servers need for a session with these adapters; None where that is nothing."""
        if not adapters.remote:
            return None
        return AdapterNeeds(adapters, self._who_has)

    def have_adapters(self, hops: Sequence[Hop], adapters: AdapterNeeds) -> None:
        """These servers have answered a step of a session with these adapters."""
        self._who_has.seen(hops, adapters.digests)

    async def get_acquainted(self) -> None:
        """Read the records and measure the ways to a few servers, so that the first route knows where we are."""
        await self.refresh()
        await self._get_to_know()

    async def _get_to_know(self) -> None:
        """Measure the ways to the servers that were used or may be soon, and to some others."""
        records = self.records
        if self._pinger is None or not records:
            return
        promising, self._promising = self._promising, set()
        known = self._observed.keys() | promising
        used = [it for it in records if it.peer_id in known]
        self._generator.shuffle(used)
        used.sort(key=lambda it: it.peer_id not in promising)
        others = [record for record in records if record.peer_id not in known]
        count = min(NUM_ACQUAINTANCES - min(len(used), NUM_ACQUAINTANCES // 2), len(others))
        chosen = self._generator.choice(len(others), count, replace=False) if count else ()
        await self._ping([*used[: NUM_ACQUAINTANCES - count], *(others[index] for index in chosen)])
        self._table.expire()

    async def _ping(self, records: Sequence[ServerRecord]) -> dict[str, PeerError]:
        """Measure the ways to these; who does not answer has failed."""
        silent = {} if self._pinger is None or not records else await self._pinger.ping(records)
        for peer_id, error in silent.items():
            self.failed(peer_id, error)
        return silent

    async def route(
        self,
        blocks: BlockRange,
        *,
        num_tokens: int = 0,
        chain: Sequence[Hop] = (),
        adapters: AdapterNeeds | None = None,
    ) -> tuple[Hop, ...]:
        """The quickest chain over `blocks` by what is known now, of servers that are there.

        Args:
            blocks: to be covered.
            num_tokens: of the session, for which servers should have room.
            chain: the hops that the session has; those next to `blocks` send inputs and take outputs.
            adapters: servers that have these cost a little less than others; nobody is left out.

        Raises:
            RouteNotFound: when blocks are missing.
            PeerTimeout: when the DHT doesn't answer and nothing is known from before.
            CheckpointMismatch: when the swarm serves this name with other content only.
        """
        need = Need(kv_tokens=num_tokens + ROOM_TOKENS)
        after = next((hop.peer_id for hop in chain if hop.blocks.end == blocks.start), None)
        before = next((hop.peer_id for hop in chain if hop.blocks.start == blocks.end), None)
        return await self._find(
            lambda router, silent: router.fastest(
                blocks, need=need, penalties={**self._penalties(adapters), **silent}, after=after, before=before
            )
        )

    async def replica(
        self,
        blocks: BlockRange,
        *,
        without: Collection[str],
        num_tokens: int = 0,
        adapters: AdapterNeeds | None = None,
    ) -> Hop:
        """The best single server for `blocks` to which a session can move.

        Args:
            blocks: all of which it must have.
            without: servers that are out of the question.
            num_tokens, adapters: as in `route`.

        Raises:
            RouteNotFound: there is none.
        """
        await self.refresh()
        if records := self._others(blocks, without):
            with suppress(RouteNotFound):
                return await self._best_of(records, blocks, num_tokens, adapters)
        await asyncio.sleep(self._directory.refreshed_at + NEWS_S - time.monotonic())
        await self._read_everything(NEWS_S / 2)
        if records := self._others(blocks, without):
            return await self._best_of(records, blocks, num_tokens, adapters)
        raise RouteNotFound(f"no other server holds blocks {blocks}", missing=list(blocks))

    async def _best_of(
        self, records: Sequence[ServerRecord], blocks: BlockRange, num_tokens: int, adapters: AdapterNeeds | None
    ) -> Hop:
        """The best of some servers that have these blocks, for all of them; raises RouteNotFound if they are gone."""
        now = time.monotonic()
        offers = [replace(self._table.offer(record, now), blocks=blocks) for record in records]
        router = Router(offers, self._table.place)
        need = Need(kv_tokens=num_tokens + ROOM_TOKENS)
        (hop,) = await over_present(
            lambda silent: router.fastest(blocks, need=need, penalties={**self._penalties(adapters), **silent}),
            self._ask,
        )
        return hop

    def _others(self, blocks: BlockRange, without: Collection[str]) -> list[ServerRecord]:
        """Other servers that have all of these blocks."""
        return [it for it in self._directory.online if it.blocks.covers(blocks) and it.peer_id not in without]

    async def outlook(
        self, chain: Sequence[Hop], *, num_tokens: int = 0, adapters: AdapterNeeds | None = None
    ) -> Outlook | None:
        """What a live session's chain is expected to take, and others with one other server; None if it is not known.

        Args:
            chain: all of the session's hops.
            num_tokens, adapters: as in `route`.
        """
        table = await self._table.fresh()
        outlook = look_ahead(
            table.router,
            chain,
            version=table.version,
            need=Need(kv_tokens=num_tokens + ROOM_TOKENS),
            penalties=self._penalties(adapters),
            seen=self._table.compared(table.records, time.monotonic()),
            format_of=lambda peer_id: _format_of(table.records.get(peer_id)),
            without_push=self.pairs_without_push,
        )
        if outlook is not None:
            best = sorted(outlook.prospects, key=lambda it: it.predicted_s)[:NUM_PROMISING]
            self._promising |= {it.target.peer_id for it in best}
        return outlook

    async def spread(self, blocks: BlockRange) -> tuple[Hop, ...]:
        """A chain for a training run: at random, so that all runs load servers by the capacity that these have free.

        Raises:
            as `route`.
        """
        table = await self._table.fresh()
        if len(table.router) >= LARGE:
            with suppress(RouteNotFound):
                await asyncio.to_thread(table.router.balance, blocks, num_tokens=BATCH_TOKENS)
        return await self._find(
            lambda router, silent: router.spread(
                blocks, self._draws, num_tokens=BATCH_TOKENS, penalties={**self._penalties(None), **silent}
            )
        )

    async def quicker(self, chain: Sequence[Hop]) -> tuple[Hop, ...]:
        """A much quicker chain for a training run whose slowest server gives much less than it announces.

        Nobody leaves for the sake of what others announce: all would gather at those that announce most.

        Returns:
            The other chain; empty if it is better to stay, or nobody knows.
        """
        self.keep_fresh()
        table = await self._table.fresh(REFRESH_S)  # what servers announce now is what they are compared with
        if not self._observed.is_held_up(chain, table.router, time.monotonic()):
            return ()
        try:
            hops = await self.spread(BlockRange(chain[0].blocks.start, chain[-1].blocks.end))
        except SwarmError:  # whatever it is: the chain works
            return ()
        router = (await self._table.fresh()).router
        if not all(router.knows(hop.peer_id) for hop in (*chain, *hops)):
            return ()
        return hops if router.throughput_tps(hops) >= MUCH_QUICKER * router.throughput_tps(chain) else ()

    async def _find(self, find: Callable[[Router, Costs], Route]) -> tuple[Hop, ...]:
        """Find a route by what is known; read the records again when that gives none, or one over a failed server."""
        if not self._directory.records:
            await self.refresh()
        self.keep_fresh()

        async def over_those_present(silent: dict[str, float]) -> tuple[Hop, ...]:
            table = await self._table.fresh()
            return await over_present(lambda silent: find(table.router, silent), self._ask, silent)

        silent: dict[str, float] = {}
        before = {record.peer_id: record.expires_at for record in self._directory.records}
        try:
            hops = await over_those_present(silent)
            if not any(self._has_failed(hop.peer_id) for hop in hops):
                return hops
        except RouteNotFound:
            pass
        await self._read_everything(NEWS_S)  # nobody better is known: perhaps there is news
        if not self._directory.records:
            await refuse_other_content(self._node, self.model_name, self.model)
        renewed = {it.peer_id for it in self._directory.records if it.expires_at != before.get(it.peer_id)}
        still = {peer_id: cost_s for peer_id, cost_s in silent.items() if peer_id not in renewed}
        return await over_those_present(still)

    async def _read_everything(self, max_age_s: float) -> None:
        """Read all records, unless that was done within `max_age_s`; in a large swarm not again before it has paid."""
        now, num_bytes = time.monotonic(), len(self._directory.seen) * COPY_BYTES * NUM_COPIES
        pays_s = num_bytes / READ_BYTES_PER_S / 4
        is_due = now - self._all_read_at >= pays_s
        await self.refresh(max_age_s=max_age_s, everything=is_due)
        if is_due:
            self._all_read_at = now

    async def _ask(self, peer_ids: Collection[str]) -> dict[str, PeerError]:
        """Ask those that we don't hear whether they are there; who does not answer.

        Nobody is asked whose record has expired since the route was found: it has not renewed it, so it is gone.
        """
        if self._pinger is None:
            return {}
        known = {record.peer_id: record for record in self.records}
        unheard = [peer_id for peer_id in peer_ids if not self._pinger.hears(peer_id)]
        silent = await self._ping([known[peer_id] for peer_id in unheard if peer_id in known])
        expired = {
            peer_id: PeerUnreachable("its record has expired", peer_id=peer_id)
            for peer_id in unheard
            if peer_id not in known
        }
        return {**silent, **expired}

    def keep_fresh(self) -> None:
        """Read records that are old, without waiting: asked with every step, so that a failover need not wait."""
        is_old = time.monotonic() - self._directory.refreshed_at >= REFRESH_S
        if is_old and (self._reader is None or self._reader.done()):
            self._reader = asyncio.create_task(self._refresh_quietly(), name="refresh records")

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
            await self._get_to_know()
        except SwarmError as error:
            logger.info("can't read who serves the model: %s", error)

    def measured(self, timings: Sequence[HopTiming]) -> None:
        """A step of one token per row took so long on its hops."""
        if self._table.latest is not None:  # however old: it is asked every step
            self._observed.measured(timings, self._table.latest.router, time.monotonic())

    def trained(self, leg: Leg, num_tokens: int) -> None:
        """Some servers have just brought so many tokens of a training run back."""
        if self._table.latest is not None:
            way_s = None if self._pinger is None else self._pinger.rtt_s(leg.hops[0].peer_id)
            self._observed.trained(leg, num_tokens, self._table.latest.router, time.monotonic(), way_s=way_s or 0.0)

    def failed(self, peer_id: str, error: Exception) -> None:
        """This peer failed; it becomes costly for a while, longer when it failed before. Busy relays are no fault."""
        if isinstance(error, RelaysBusy):
            self._observed[peer_id].hindered(time.monotonic(), error.retry_after_s)
            logger.info("no way to server %s for now: %s", self.name_of(peer_id), error)
            return
        self._observed[peer_id].failed(time.monotonic())
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
        return peer_id in self._observed and self._observed[peer_id].failed_at > self._directory.refreshed_at

    def _penalties(self, adapters: AdapterNeeds | None) -> dict[str, float]:
        """What visits of some servers cost besides: failures, and adapters that have to be brought there."""
        penalties = self._observed.penalties(time.monotonic())
        if adapters is not None:
            for record in self._directory.online:
                penalties[record.peer_id] = penalties.get(record.peer_id, 0.0) + adapters.load_s(record)
        return penalties


def _format_of(record: ServerRecord | None) -> tuple[str, str] | None:
    """How a server computes: nobody's answer shall change for the sake of speed."""
    return None if record is None else (record.dtype, record.quantization)
