"""One server from start to stop: joins the swarm, loads its blocks, announces itself, serves, leaves.

ServerConfig ─► plan ─► Node, Transport ─► announce JOINING ─► BlockSpan.load (thread) ─► Executor, Handler
                                                                                  ─► announce ONLINE ... OFFLINE
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
import torch

from swarm import __version__
from swarm.adapters.load import load_adapter
from swarm.catalog import ModelEntry, announce_model, refuse_other_content
from swarm.checkpoint.source import Checkpoint, resolve
from swarm.directory import Directory
from swarm.errors import ConfigError, PeerError, SwarmError
from swarm.network.node import Node, NodeConfig
from swarm.pings import Pinger
from swarm.protocol import ADAPTER_SERVICE, INFO_SERVICE, PUSH_SERVICE, SESSION_SERVICE, STATE_SERVICE, TRAIN_SERVICE
from swarm.registry import MAX_TIME_S, Registry, ServerRecord
from swarm.server.adapter_desk import AdapterDesk
from swarm.server.adapter_intake import Base
from swarm.server.blocks.span import BlockSpan
from swarm.server.blocks.step import Chunk
from swarm.server.config import ServerConfig
from swarm.server.executor import Executor
from swarm.server.handler import Handler
from swarm.server.limits import HandlerLimits
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.scout import Scout
from swarm.server.training import TrainingDesk
from swarm.transport import Transport
from swarm.types import BlockRange, ServerState

logger = logging.getLogger(__name__)

ANNOUNCE_TIMEOUT_S = 15.0
"""How long one renewal of the record may take; the next one comes anyway."""
OFFLINE_TIMEOUT_S = 2.0
"""How long leaving may take to say so; the record expires anyway."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ServerConfig with every "auto" resolved against the machine and the model."""

    checkpoint: Checkpoint
    num_blocks: int
    blocks: BlockRange
    device: torch.device
    dtype: torch.dtype
    quantization: str


def make_plan(config: ServerConfig) -> Plan:
    """Resolve the model and every "auto".

    Raises:
        UnknownModel: no such model.
        ConfigError: a device, dtype or block range that can't be.
    """
    checkpoint = resolve(
        config.model,
        revision=config.revision,
        cache_dir=config.cache_dir,
        token=config.token,
        is_offline=config.credentials is not None,
    )
    text_config = checkpoint.config().get_text_config()
    num_blocks = int(text_config.num_hidden_layers)
    blocks = config.blocks or BlockRange(0, num_blocks)
    if blocks.end > num_blocks:
        raise ConfigError(f"blocks {blocks} are outside {checkpoint.name}, which has blocks 0:{num_blocks}")
    device = _choose_device(config.device)
    quantization = config.quantization
    if quantization == "auto":
        quantization = "int8" if device.type == "cuda" else "none"
    return Plan(
        checkpoint=checkpoint,
        num_blocks=num_blocks,
        blocks=blocks,
        device=device,
        dtype=_choose_dtype(config.dtype, device, getattr(text_config, "dtype", None)),
        quantization=quantization,
    )


class LoadingStopped(SwarmError):
    """The server was told to stop while it loaded its blocks."""


class Server:
    """A running server. Use `async with Server(config, plan) as server: await server.serve_until(stop)`."""

    def __init__(self, config: ServerConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.node: Node
        self.executor: Executor
        self.handler: Handler | None = None
        self.training: TrainingDesk
        self.state = ServerState.JOINING
        self.adapters: dict[str, str] = {}
        """Digests of the adapters that it was told to have."""
        self.metrics_url: str | None = None
        self._registry: Registry
        self._scout: Scout
        self._decode_tps = 0.0
        self._stack = AsyncExitStack()

    async def join(self) -> None:
        """Start the network and announce JOINING.

        Raises:
            ConfigError: port in use, bad identity file or address.
            PeerUnreachable: none of the initial peers answers.
            AccessDenied: the swarm is private, and we may not serve in it.
            CheckpointMismatch: the swarm serves this model's name with other content.
        """
        config = self.config
        if config.metrics_port is not None:
            await self._serve_metrics(config.metrics_port)
        self.node = await Node.start(
            NodeConfig(
                identity_path=config.identity_path,
                initial_peers=config.initial_peers,
                host=config.host,
                port=config.port,
                announce=config.announce,
                credentials=config.credentials,
            )
        )
        self._stack.push_async_callback(self.node.close)
        self.transport = Transport(
            self.node, listen=(config.host, config.data_port), announce_hosts=_hosts(config.announce) or None
        )
        await self.transport.start()
        self._stack.push_async_callback(self.transport.close)
        self._registry = Registry(self.node)
        generator = np.random.default_rng()
        self._scout = Scout(
            Pinger(self.transport, generator),
            Directory(self._registry, model=self.plan.checkpoint.digest, num_blocks=self.plan.num_blocks),
            own_id=self.node.peer_id,
            blocks=self.plan.blocks,
            generator=generator,
        )
        await refuse_other_content(self.node, self.plan.checkpoint.name, self.plan.checkpoint.digest)
        await self._announce()

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
        self._decode_tps = await asyncio.to_thread(measure_decode, span)
        self._check_stopped("stopped after loading")
        self.executor = Executor(
            span,
            asyncio.get_running_loop(),
            kept_bytes=self.config.training_bytes,
            adapter_bytes=self.config.adapter_bytes,
        )
        self.executor.start()
        self._stack.push_async_callback(self.executor.stop)
        self.handler = Handler(
            self.executor,
            self.transport,
            model=plan.checkpoint.digest,
            model_name=plan.checkpoint.name,
            quantization=plan.quantization,
            max_positions=span.max_positions,
            limits=HandlerLimits(history_bytes=self.config.history_bytes),
        )
        self._stack.push_async_callback(self.handler.close)
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

    async def serve_until(self, stop: asyncio.Event, *, on_drain: Callable[[int], None] = lambda count: None) -> None:
        """Keep announcing until `stop` is set, then drain, and say OFFLINE.

        Args:
            stop: whether to go.
            on_drain: is told how many sessions have to move, where there are any.

        Raises:
            PeerError: the device thread failed.
            AccessDenied: we are no member of this private swarm any more.
        """
        while True:
            announcing = asyncio.create_task(self.renew())
            is_over = await self._stopped_within(stop, ANNOUNCE_TIMEOUT_S, announcing)
            announcing.cancel()
            if is_over or await self._stopped_within(stop, self.config.announce_period_s):
                break
        if stop.is_set():
            if self.handler is not None and self.handler.num_sessions and self.config.drain_timeout_s > 0:
                on_drain(self.handler.num_sessions)
            await self.drain(self.config.drain_timeout_s)
        await self.leave()
        self.node.check_access()
        if self.executor.died.is_set():
            raise PeerError("the device thread failed; the log says why")

    async def _stopped_within(
        self, stop: asyncio.Event, timeout_s: float, work: asyncio.Task[None] | None = None
    ) -> bool:
        """Wait for the end, for `work`, or for `timeout_s`, whichever comes first; whether it is the end."""
        events = (stop, self.executor.died, self.node.denied)
        ends = [asyncio.create_task(event.wait()) for event in events]
        await asyncio.wait([*ends, *([work] if work else [])], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        return any(event.is_set() for event in events)

    async def drain(self, timeout_s: float) -> None:
        """Let go of everybody: announce DRAINING, admit nobody, end training runs, have sessions moved elsewhere.

        Returns when all sessions have gone, or at the latest after `timeout_s`; those that are left then are replayed
        by their clients once this server is gone.
        """
        if self.handler is None or timeout_s <= 0:
            return
        self.state = self.handler.state = ServerState.DRAINING
        self.training.drain()
        announcing = asyncio.create_task(self._announce())
        await self.handler.drain(timeout_s)
        announcing.cancel()

    async def leave(self) -> None:
        """Announce OFFLINE; waits at most OFFLINE_TIMEOUT_S for it."""
        self.state = ServerState.OFFLINE
        if self.handler is not None:
            self.handler.state = ServerState.OFFLINE
        try:
            async with asyncio.timeout(OFFLINE_TIMEOUT_S):
                await self._announce()
        except TimeoutError:
            logger.info("could not announce OFFLINE within %.0f s; the record will expire", OFFLINE_TIMEOUT_S)

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def renew(self) -> None:
        """Look where the other servers are, have sessions moved to them if need be, and announce ourselves again."""
        await self._scout.look()
        if self.handler is not None:
            self.handler.relieve(self._scout.replicas)
        await self._announce()

    async def _announce(self) -> None:
        config, plan = self.config, self.plan
        ttl_s = 3 * config.announce_period_s
        handler, executor = self.handler, self.executor if self.handler is not None else None
        record = ServerRecord(
            peer_id=self.node.peer_id,
            model=plan.checkpoint.digest,
            blocks=plan.blocks,
            state=self.state,
            decode_tps=self._decode_tps,
            load=handler.load if handler is not None else 0.0,
            queue_s=min(handler.queue_s, MAX_TIME_S) if handler is not None else 0.0,
            kv_free_tokens=executor.free_tokens if executor is not None else 0,
            quantization=plan.quantization,
            dtype=str(plan.dtype).removeprefix("torch."),
            public_name=config.public_name,
            version=__version__,
            place=self._scout.place,
            pings=self._scout.pings,
            period_s=config.announce_period_s,
            expires_at=time.time() + ttl_s,
            adapters=handler.adapters.notes() if handler is not None and handler.adapters is not None else (),
        )
        entry = ModelEntry(digest=plan.checkpoint.digest, name=plan.checkpoint.name, num_blocks=plan.num_blocks)
        try:
            await self._registry.announce(record, ttl_s)
            if self.state is not ServerState.OFFLINE:
                await announce_model(self.node, entry)
        except SwarmError as error:
            logger.warning("could not announce %s: %s", self.state.name, error)


def measure_decode(span: BlockSpan, num_steps: int = 8) -> float:
    """Tokens per second through one block, one row at a time: the median of a few steps after a warm-up."""
    table = PageTable(PageAllocator(span.num_pages))
    hidden_states = torch.zeros(1, span.hidden_size)
    state = span.new_state()
    times = []
    for position in range(min(num_steps, span.max_positions, span.num_pages)):
        table.grow(position + 1)
        chunk = Chunk(
            hidden_states=hidden_states,
            position=position,
            pages=table.pages,
            entry=span.blocks.start,
            exit=span.blocks.end,
            state=state,
        )
        started = time.perf_counter()
        span.run([chunk])
        times.append(time.perf_counter() - started)
    step_s = sorted(times[1:] or times)[len(times[1:] or times) // 2]
    return len(span.blocks) / max(step_s, 1e-9)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} can't serve blocks; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} asked, but torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def _choose_dtype(name: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """On CPU fp32: exact and, without AMX, fastest. Elsewhere what the checkpoint holds, at most 16 bits."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def _hosts(announce: tuple[str, ...]) -> tuple[str, ...]:
    """The host parts of announced addresses ("1.2.3.4" or "/ip4/1.2.3.4/tcp/...")."""
    return tuple(address.split("/")[2] if address.startswith("/") else address for address in announce)
