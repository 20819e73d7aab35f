"""One server from start to stop: joins the swarm, says what it is as long as it is there, serves, leaves.

    join ─► Reach: Node, Transport ─► Placing: which blocks ─► JOINING
    load ─► Tenancy.load ─► ONLINE                     Placing.keep_moving ─► Tenancy: other blocks, JOINING ... ONLINE
    serve_until ─ stop ─► Tenancy.drain: DRAINING ─► leave ─► OFFLINE

From JOINING to OFFLINE, whatever it does: every period, Announcer ─► renew ─► tell. It does not know how blocks are
loaded, served or exchanged for others (`swarm.server.tenancy`), nor when that pays.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from swarm import __version__
from swarm.catalog import ModelEntry, refuse_other_content
from swarm.errors import PeerError
from swarm.network.node import Node
from swarm.network.tasks import TaskSet
from swarm.registry import MAX_TIME_S, Registry, ServerRecord, shard_of
from swarm.server.announcer import Announcer
from swarm.server.config import ServerConfig
from swarm.server.latest_facts import LatestFacts
from swarm.server.loading import Loader
from swarm.server.patience import patiently
from swarm.server.placing import Placing
from swarm.server.plan import Plan
from swarm.server.reach import Reach
from swarm.server.serving import Serving
from swarm.server.tenancy import Tenancy
from swarm.server.weight_files import MeasuredFiles
from swarm.transport import Transport
from swarm.types import ServerState

LOOK_WAIT_S = 10.0
"""How long a renewal of our record waits for a look at the others."""


class Server:
    """A running server. Use `async with Server(config, plan) as server: await server.serve_until(stop)`.

    Attributes:
        reach: its place in the network; `node` and `transport` are there once it has joined.
        tenancy: the blocks that it holds.
        metrics_url: where its metrics are, if anywhere.
        reason: why it has taken its blocks, in one line, where it has chosen them itself.
    """

    node: Node
    transport: Transport

    def __init__(self, config: ServerConfig, plan: Plan):
        files = MeasuredFiles(plan.checkpoint.store)
        plan = replace(plan, checkpoint=replace(plan.checkpoint, store=files))
        self.config, self.reason = config, ""
        self.metrics_url: str | None = None
        self.reach = Reach(config)
        self._loader = Loader(config, plan, files)
        self._facts = LatestFacts(plan, config.cache_dir)
        self.tenancy = Tenancy(
            config,
            plan,
            reach=self.reach,
            loader=self._loader,
            facts=self._facts,
            announce=lambda: self._announcer.tell(),
        )
        self._registry: Registry
        self._placing: Placing
        self._announcer: Announcer
        self._looking: asyncio.Task[None] | None = None
        self._tasks = TaskSet()
        self._stack = AsyncExitStack()

    @property
    def plan(self) -> Plan:
        """What it makes of its configuration, with the blocks that it holds or is about to hold."""
        return self.tenancy.plan

    @property
    def state(self) -> ServerState:
        """What others may expect of it."""
        return self.tenancy.state

    @property
    def serving(self) -> Serving | None:
        """What serves its blocks, where any are loaded."""
        return self.tenancy.serving

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._tasks.close()
        await self._stack.aclose()

    async def join(self) -> None:
        """Start the network, choose blocks where none were given, and announce JOINING, again and again from then on.

        Raises:
            ConfigError: port in use, bad identity file or address, or not one block fits.
            PeerUnreachable: none of the initial peers answers; or nobody can connect to us, and nobody relays.
            PeerTimeout: the DHT did not answer for minutes.
            AccessDenied: the swarm is private, and we may not serve in it.
            CheckpointMismatch: the swarm serves this model's name with other content.
        """
        if self.config.metrics_port is not None:
            await self._serve_metrics(self.config.metrics_port)
        self._stack.push_async_callback(self.reach.close)
        await self.reach.enter()
        self.node, self.transport = self.reach.node, self.reach.transport
        self._stack.push_async_callback(self.tenancy.close)
        checkpoint = self.plan.checkpoint
        await patiently(lambda: refuse_other_content(self.node, checkpoint.name, checkpoint.digest))
        self._meet_swarm()
        self._stack.push_async_callback(self._announcer.close)
        blocks = self.plan.blocks
        if self.plan.is_auto:
            blocks, self.reason = await patiently(self._placing.choose)
        await self.tenancy.announce_blocks(blocks)
        self.reach.follow(self._possible_relays, self._announcer.tell_beside)

    async def load(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load the blocks and serve them; raises what `Tenancy.load` raises.

        Args:
            on_progress: called in any thread, with how many of how many blocks are loaded.
        """
        await self.tenancy.load(on_progress)

    async def serve_until(
        self,
        stop: asyncio.Event,
        *,
        on_drain: Callable[[int], None] = lambda count: None,
        on_moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve, and move if the blocks were chosen, until `stop` is set; then drain, and say OFFLINE.

        Args:
            stop: whether to go.
            on_drain: is told how many sessions have to move, where there are any.
            on_moved: called when other blocks are served.

        Raises:
            PeerError: the device thread failed.
            AccessDenied: we are no member of this private swarm any more.
            SwarmError: other blocks were to be loaded, and neither they nor those of before could be.
        """
        self.tenancy.on_moved = on_moved
        self._announcer.renew_beside()
        moving = asyncio.create_task(self._placing.keep_moving(), name="moves")
        try:
            await self._end(stop, moving)
        finally:
            moving.cancel()  # before we say OFFLINE: it must not announce anything after that
            await asyncio.wait([moving])
        if stop.is_set():
            drain_s, num_sessions = self.config.drain_timeout_s, self.tenancy.num_sessions
            if num_sessions and drain_s > 0:
                on_drain(num_sessions)
            await self.tenancy.drain(drain_s)
        await self.leave()
        self.node.check_access()
        if not moving.cancelled():
            moving.result()
        if self.tenancy.died.is_set():
            raise PeerError("the device thread failed; the log says why")

    async def leave(self) -> None:
        """Announce OFFLINE, and nothing after that."""
        self.tenancy.end()
        await self._announcer.tell_last()

    async def renew(self) -> None:
        """Look where the others are and how fast we are, have sessions moved if need be, and announce ourselves."""
        if not self.plan.is_auto:  # else the mover looks, more often
            await self._look()
        if self.serving is not None:
            self.serving.handler.relieve(self._placing.scout.replicas)
            self._facts.ran(self.serving.executor.meter.plain)
        await self._announcer.tell()

    async def _serve_metrics(self, port: int) -> None:
        from swarm.server.metrics import MetricsServer, ServerCollector

        metrics = await MetricsServer.start(ServerCollector(self), host=self.config.metrics_host, port=port)
        self._stack.push_async_callback(metrics.close)
        self.metrics_url = metrics.url

    def _meet_swarm(self) -> None:
        """Get ready to see the others, and to be seen by them."""
        plan, self._registry = self.plan, Registry(self.node)
        self.transport.look_up = self._look_up
        self._placing = Placing(
            self.config,
            self.tenancy,
            facts=self._facts,
            loader=self._loader,
            transport=self.transport,
            registry=self._registry,
        )
        self._announcer = Announcer(
            self.node,
            self._registry,
            ModelEntry(digest=plan.checkpoint.digest, name=plan.checkpoint.name, num_blocks=plan.num_blocks),
            period_s=self.config.announce_period_s,
            describe=self._record,
            renew=self.renew,
        )

    async def _end(self, stop: asyncio.Event, moving: asyncio.Task[None]) -> None:
        """Wait until we are told to go, or can't go on."""
        ends = [asyncio.create_task(event.wait()) for event in (stop, self.node.denied, self.tenancy.died)]
        try:
            await asyncio.wait([*ends, moving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def _look(self) -> None:
        """Look at the others; if a slow DHT makes that long, it goes on while we announce ourselves."""
        if self._looking is None or self._looking.done():
            self._looking = self._tasks.spawn(self._placing.scout.look(), name="look")
        await asyncio.wait([self._looking], timeout=LOOK_WAIT_S)

    async def _look_up(self, peer_id: str) -> None:
        """Read the record of a server that a client names before we have seen it."""
        checkpoint = self.plan.checkpoint
        await self._registry.lookup_shards(checkpoint.digest, [shard_of(peer_id)], num_blocks=self.plan.num_blocks)

    def _possible_relays(self) -> list[str]:
        """Servers that can be reached."""
        return [record.peer_id for record in self._placing.scout.others if not record.is_relayed]

    def _record(self, expires_at: float) -> ServerRecord:
        """What there is to be said of us now."""
        config, plan, facts, scout = self.config, self.plan, self._facts.latest, self._placing.scout
        handler = None if self.serving is None else self.serving.handler
        return ServerRecord(
            peer_id=self.node.peer_id,
            model=plan.checkpoint.digest,
            blocks=plan.blocks,
            state=self.state,
            decode_tps=0.0 if facts is None else facts.single_tps,
            batch_tps=0.0 if facts is None else facts.batch_tps,
            prefill_tps=0.0 if facts is None else facts.prefill_tps,
            load=handler.load if handler is not None else 0.0,
            queue_s=min(handler.queue_s, MAX_TIME_S) if handler is not None else 0.0,
            kv_free_tokens=handler.executor.free_tokens if handler is not None else 0,
            is_relayed=self.reach.is_relayed,
            relays=self.reach.relays,
            quantization=plan.quantization,
            dtype=str(plan.dtype).removeprefix("torch."),
            public_name=config.public_name,
            version=__version__,
            place=scout.place,
            pings=scout.pings,
            period_s=config.announce_period_s,
            expires_at=expires_at,
            adapters=handler.adapters.notes() if handler is not None and handler.adapters is not None else (),
        )
