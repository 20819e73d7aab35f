"""One server from start to stop: joins the swarm, loads its blocks, announces itself, serves, leaves.

Plan ─► Node, Transport ─► Placing: which blocks ─► announce JOINING ─► BlockSpan.load (thread) ─► Executor, Handler
                                                             ▲                        ─► announce ONLINE ... OFFLINE
                                                             └── Mover: let go, unload ──┘
From JOINING to OFFLINE, whatever it does: every period, renew ─► Announcer.

What lives as long as the server is in `_stack`; what belongs to the blocks that it holds now, in `_serving`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import torch

from swarm import __version__
from swarm.adapters.load import load_adapter
from swarm.catalog import ModelEntry, refuse_other_content
from swarm.checkpoint.partial import shards_for
from swarm.errors import ConfigError, PeerBusy, PeerError, SwarmError
from swarm.network.node import Node
from swarm.network.tasks import TaskSet
from swarm.placement import Holding
from swarm.protocol import ADAPTER_SERVICE, INFO_SERVICE, PUSH_SERVICE, SESSION_SERVICE, STATE_SERVICE, TRAIN_SERVICE
from swarm.registry import MAX_TIME_S, Registry, ServerRecord, shard_of
from swarm.server.adapter_desk import AdapterDesk
from swarm.server.adapter_intake import Base
from swarm.server.announcer import Announcer
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import ServerConfig
from swarm.server.executor import Executor
from swarm.server.handler import Handler
from swarm.server.lean import settle_heap, thaw_heap
from swarm.server.limits import HandlerLimits
from swarm.server.pages import PAGE_SIZE
from swarm.server.patience import patiently
from swarm.server.placing import Placing
from swarm.server.plan import Plan
from swarm.server.reach import Reach
from swarm.server.training import TrainingDesk
from swarm.server.weight_files import MeasuredFiles
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

OFFLINE_TIMEOUT_S = 2.0
"""How long leaving may take to say so; the record expires anyway."""
LOOK_WAIT_S = 10.0
"""How long a renewal of our record waits for a look at the others."""
_SERVICES = (SESSION_SERVICE, PUSH_SERVICE, STATE_SERVICE, ADAPTER_SERVICE, TRAIN_SERVICE, INFO_SERVICE)


class LoadingStopped(SwarmError):
    """The server was told to stop while it loaded its blocks."""


class Server:
    """A running server. Use `async with Server(config, plan) as server: await server.serve_until(stop)`."""

    def __init__(self, config: ServerConfig, plan: Plan):
        self._files = MeasuredFiles(plan.checkpoint.store)
        self.config, self.plan = config, replace(plan, checkpoint=replace(plan.checkpoint, store=self._files))
        self.node: Node
        self.executor: Executor
        self.handler: Handler | None = None
        self.training: TrainingDesk | None = None
        self.state = ServerState.JOINING
        self.adapters: dict[str, str] = {}
        """Digests of the adapters that it was told to have."""
        self.metrics_url: str | None = None
        self.reason = ""
        """Why it has taken its blocks, in one line, where it has chosen them itself."""
        self._registry: Registry
        self._placing: Placing
        self._announcer: Announcer
        self._announcing: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._blocks_before = plan.blocks
        self._was_settled = False
        self._on_moved: Callable[[], None] = lambda: None
        self._tasks = TaskSet()
        self._fetching: asyncio.Task[None] | None = None
        """Gets files of the blocks that it leaves for."""
        self._died = asyncio.Event()
        """Set when the device thread has failed."""
        self._telling: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        self._serving = AsyncExitStack()

    async def join(self) -> None:
        """Start the network, choose blocks where none were given, and announce JOINING, again and again from then on.

        Raises:
            ConfigError: port in use, bad identity file or address, or not one block fits.
            PeerUnreachable: none of the initial peers answers; or nobody can connect to us, and nobody relays.
            PeerTimeout: the DHT did not answer for minutes.
            AccessDenied: the swarm is private, and we may not serve in it.
            CheckpointMismatch: the swarm serves this model's name with other content.
        """
        config = self.config
        if config.metrics_port is not None:
            await self._serve_metrics(config.metrics_port)
        self.reach = Reach(config)
        self._stack.push_async_callback(self.reach.close)
        await self.reach.enter()
        self.node, self.transport = self.reach.node, self.reach.transport
        self._registry = Registry(self.node)
        checkpoint = self.plan.checkpoint
        await patiently(lambda: refuse_other_content(self.node, checkpoint.name, checkpoint.digest))
        self._placing = Placing(self, self.transport, self._registry, self._files)
        self._announcer = Announcer(
            self.node,
            self._registry,
            ModelEntry(digest=checkpoint.digest, name=checkpoint.name, num_blocks=self.plan.num_blocks),
            period_s=config.announce_period_s,
            describe=self._record,
        )
        self.transport.look_up = self._look_up
        if self.plan.is_auto:
            blocks, self.reason = await patiently(self._placing.choose)
            self.plan = replace(self.plan, blocks=blocks)
        await self._announce()
        self.reach.follow(self._possible_relays, self._on_relays_changed)

    async def load(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load the blocks and serve them.

        Raises:
            UnsupportedModel: the block runner would run this model wrongly.
            LoadingStopped: `leave` was called meanwhile.
        """
        plan, size = self.plan, self.config.cache_size

        def progress(done: int, total: int) -> None:
            self._check_stopped(f"stopped after loading {done} of {total} blocks")
            if on_progress is not None:
                on_progress(done, total)

        started = time.monotonic() - self._files.seconds
        try:
            span = await asyncio.to_thread(
                BlockSpan.load,
                plan.checkpoint,
                plan.blocks,
                device=plan.device,
                dtype=plan.dtype,
                quantization=plan.quantization,
                num_pages=None if size.tokens is None else -(-size.tokens // PAGE_SIZE),
                kv_bytes=size.num_bytes,
                on_progress=progress,
            )
        except (RuntimeError, MemoryError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"blocks {plan.blocks} can't be loaded here: {reason}") from error
        try:
            await asyncio.to_thread(self._placing.loaded, span, time.monotonic() - self._files.seconds - started)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"blocks {plan.blocks} can't be run here: {error or type(error).__name__}") from error
        self._check_stopped("stopped after loading")
        self.executor = Executor(
            span,
            asyncio.get_running_loop(),
            kept_bytes=self.config.training_bytes,
            adapter_bytes=self.config.adapter_bytes,
            died=self._died,
        )
        self.executor.start()
        self._serving.push_async_callback(self.executor.stop)
        self.handler = Handler(
            self.executor,
            self.transport,
            model=plan.checkpoint.digest,
            model_name=plan.checkpoint.name,
            quantization=plan.quantization,
            max_positions=span.max_positions,
            limits=HandlerLimits(history_bytes=self.config.history_bytes),
        )
        self._serving.push_async_callback(self.handler.close)
        if self.config.adapter_bytes:
            base = Base(
                blocks=plan.blocks,
                shapes={block: span.shape(block) for block in plan.blocks},
                num_blocks=plan.num_blocks,
                hidden_size=span.hidden_size,
                name=plan.checkpoint.name,
            )
            await self._keep_adapters(self.handler.take_adapters(base, self.config.adapter_bytes))
            self.transport.serve(ADAPTER_SERVICE, self.handler.adapter)
        self.transport.serve(SESSION_SERVICE, self.handler.session)
        self.transport.serve(PUSH_SERVICE, self.handler.push)
        self.transport.serve(STATE_SERVICE, self.handler.receive_state)
        self.transport.serve(INFO_SERVICE, self.handler.info)
        self.training = TrainingDesk(
            self.executor,
            self.handler.pushes,
            model=plan.checkpoint.digest,
            model_name=plan.checkpoint.name,
            state=lambda: self.state,
        )
        self.transport.serve(TRAIN_SERVICE, self.training.serve)
        self._check_stopped("stopped after loading adapters")
        self.state = ServerState.ONLINE
        await self._announce()

    def _check_stopped(self, where: str) -> None:
        """Raise LoadingStopped if `leave` was called meanwhile."""
        if self.state is ServerState.OFFLINE:
            raise LoadingStopped(where)

    async def _keep_adapters(self, desk: AdapterDesk) -> None:
        """Load the adapters that this server was told to have.

        Raises:
            SwarmError: one of them can't be had, or does not fit.
        """
        config, checkpoint = self.config, self.plan.checkpoint
        for name in config.adapters:
            loaded = await asyncio.to_thread(
                load_adapter, name, checkpoint, cache_dir=config.cache_dir, token=config.token
            )
            self._check_stopped("stopped while loading adapters")
            await desk.keep(loaded.manifest, loaded.shards)
            self.adapters[name] = loaded.digest

    async def _serve_metrics(self, port: int) -> None:
        from swarm.server.metrics import MetricsServer, ServerCollector

        metrics = await MetricsServer.start(ServerCollector(self), host=self.config.metrics_host, port=port)
        self._stack.push_async_callback(metrics.close)
        self.metrics_url = metrics.url

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
        self._on_moved = on_moved
        self._renew_beside()
        moving = asyncio.create_task(self._placing.keep_moving(), name="moves")
        try:
            await self._end(stop, moving)
        finally:
            moving.cancel()  # before we say OFFLINE: it must not announce anything after that
            await asyncio.wait([moving])
        if stop.is_set():
            if self.handler is not None and self.handler.num_sessions and self.config.drain_timeout_s > 0:
                on_drain(self.handler.num_sessions)
            await self.drain(self.config.drain_timeout_s)
        await self.leave()
        self.node.check_access()
        if not moving.cancelled():
            moving.result()
        if self._died.is_set():
            raise PeerError("the device thread failed; the log says why")

    async def _end(self, stop: asyncio.Event, moving: asyncio.Task[None]) -> None:
        """Wait until we are told to go, or can't go on."""
        ends = [asyncio.create_task(event.wait()) for event in (stop, self.node.denied, self._died)]
        try:
            await asyncio.wait([*ends, moving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Let go of everybody: announce DRAINING, admit nobody, end training runs, have sessions moved elsewhere.

        Returns when all sessions have gone, or at the latest after `timeout_s`; those that are left then are replayed
        by their clients once this server is gone.
        """
        if self.handler is None or timeout_s <= 0:
            return
        self.state = self.handler.state = ServerState.DRAINING
        if self.training is not None:
            self.training.drain()
        announcing = self._tasks.spawn(self._announce(), name="announce DRAINING")
        await self.handler.drain(timeout_s)
        announcing.cancel()

    # -- moving: what `swarm.server.mover` does with a server ---------------------------------------------------

    @property
    def holding(self) -> Holding:
        """What it holds now, or is about to."""
        facts = self._placing.facts
        capacity_tps = 0.0 if facts is None else facts.batch_tps
        return Holding(peer_id=self.node.peer_id, blocks=self.plan.blocks, capacity_tps=capacity_tps)

    @property
    def num_sessions(self) -> int:
        """Sessions that it carries."""
        return 0 if self.handler is None else self.handler.num_sessions

    async def announce_blocks(self, blocks: BlockRange) -> None:
        """Tell the swarm that it is about to load these."""
        self.plan = replace(self.plan, blocks=blocks)
        await self._announce()

    async def leave_for(self, blocks: BlockRange, *, drain_s: float) -> None:
        """Let go of sessions and blocks, and tell the swarm that it is about to load others.

        Args:
            blocks: the others; their files are fetched from now on.
            drain_s: how long sessions may take to be handed over; then their clients go on elsewhere by a replay.
        """
        self._blocks_before = self.plan.blocks
        self._fetching = self._tasks.spawn(self._fetch(blocks), name=f"fetch blocks {blocks}")
        await self.drain(drain_s)
        await self._unload()
        await self.announce_blocks(blocks)

    async def arrive(self) -> bool:
        """Load the blocks that it has left for; if they can't be had, those of before. Whether it has the new ones.

        Raises:
            SwarmError: neither can be loaded.
        """
        before, has_them = self._blocks_before, True
        try:
            if self._fetching is not None:
                await asyncio.wait([self._fetching])
            await self.load()
        except LoadingStopped:
            raise
        except SwarmError as error:
            logger.warning("blocks %s can't be loaded (%s), going back to %s", self.plan.blocks, error, before)
            has_them = False
        if not has_them:  # when the error is gone, which holds on to what was loaded
            await self._unload()
            await self.announce_blocks(before)
            await self.load()
        if self._was_settled:
            settle_heap()
            self._was_settled = False
        self._on_moved()
        return has_them

    async def _fetch(self, blocks: BlockRange) -> None:
        """Get the files of these blocks while something else is done; what fails will fail again in `load`."""

        def fetch() -> None:
            checkpoint = self.plan.checkpoint
            for shard in shards_for(checkpoint, blocks):
                self._check_stopped("stopped while fetching files")
                checkpoint.ensure([shard])

        try:
            await asyncio.to_thread(fetch)
        except (SwarmError, OSError) as error:
            logger.info("can't fetch the files of blocks %s: %s", blocks, error)

    async def _unload(self) -> None:
        """End what still runs, and free the memory of the blocks."""
        self.state, self.handler, self.training = ServerState.JOINING, None, None
        for service in _SERVICES:
            await self.transport.stop_serving(service, PeerBusy("the server goes to other blocks", retry_after_s=60.0))
        await self._serving.aclose()
        if hasattr(self, "executor"):
            del self.executor
        self._was_settled |= thaw_heap()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- announcing ---------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Announce OFFLINE, and nothing after that; waits at most OFFLINE_TIMEOUT_S for it."""
        self.state = ServerState.OFFLINE
        for task in (self._announcing, self._renewal, self._telling):
            if task is not None:
                task.cancel()
        if self.handler is not None:
            self.handler.state = ServerState.OFFLINE
        try:
            async with asyncio.timeout(OFFLINE_TIMEOUT_S):
                await self._announcer.tell()
        except TimeoutError:
            logger.info("could not announce OFFLINE within %.0f s; the record will expire", OFFLINE_TIMEOUT_S)

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._tasks.close()
        await self._serving.aclose()
        await self._stack.aclose()

    async def renew(self) -> None:
        """Look where the others are and how fast we are, have sessions moved if need be, and announce ourselves."""
        if not self.plan.is_auto:  # else the mover looks, more often
            await self._look()
        if self.handler is not None:
            self.handler.relieve(self._placing.scout.replicas)
            self._placing.ran(self.executor.meter.plain)
        await self._announce()

    async def _look(self) -> None:
        """Look at the others; if a slow DHT makes that long, it goes on while we announce ourselves."""
        if self._looking is None or self._looking.done():
            self._looking = self._tasks.spawn(self._placing.scout.look(), name="look")
        await asyncio.wait([self._looking], timeout=LOOK_WAIT_S)

    async def _announce(self) -> None:
        """Tell the swarm what we are now; from the first time on we do so every period, whatever we do meanwhile."""
        await self._announcer.tell()
        if self._announcing is None:
            self._announcing = self._tasks.spawn(self._keep_announced(), name="announce")

    async def _keep_announced(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            next_at = max(next_at + self.config.announce_period_s, loop.time())
            await asyncio.sleep(next_at - loop.time())
            await asyncio.wait([self._renew_beside()])

    def _renew_beside(self) -> asyncio.Task[None]:
        """Begin to renew the record; if that fails it is logged, and another one comes."""
        self._renewal = self._tasks.spawn(self.renew(), name="renewal")
        return self._renewal

    async def _look_up(self, peer_id: str) -> None:
        """Read the record of a server that a client names before we have seen it."""
        checkpoint = self.plan.checkpoint
        await self._registry.lookup_shards(checkpoint.digest, [shard_of(peer_id)], num_blocks=self.plan.num_blocks)

    def _possible_relays(self) -> list[str]:
        """Servers that can be reached."""
        return [record.peer_id for record in self._placing.scout.others if not record.is_relayed]

    def _on_relays_changed(self) -> None:
        """Tell the swarm at once through whom we are reached."""
        if self._telling is None or self._telling.done():
            self._telling = self._tasks.spawn(self._tell_relays(), name="announce relays")

    async def _tell_relays(self) -> None:
        """Announce ourselves until what was announced is so."""
        told: tuple[str, ...] | None = None
        while told != self.reach.relays and self.state is not ServerState.OFFLINE:
            told = self.reach.relays
            await self._announce()

    def _record(self, expires_at: float) -> ServerRecord:
        """What there is to be said of us now."""
        config, plan, facts, scout = self.config, self.plan, self._placing.facts, self._placing.scout
        handler, executor = self.handler, self.executor if self.handler is not None else None
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
            kv_free_tokens=executor.free_tokens if executor is not None else 0,
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
