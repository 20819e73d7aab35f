"""What serves the blocks that a server holds now: made when they are loaded, gone before others are.

    BlockSpan ─► Executor ─┬─► Handler ──────┬─ open ──────► services of the transport ◄~~ peers
                           └─► TrainingDesk ─┘   drain, withdraw, close

It does not know where the blocks come from, what the swarm is told of them, nor what the server does next.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from swarm.adapters.peft import LoadedAdapter
from swarm.errors import ConfigError, SwarmError
from swarm.protocol import ADAPTER_SERVICE, INFO_SERVICE, PUSH_SERVICE, SESSION_SERVICE, STATE_SERVICE, TRAIN_SERVICE
from swarm.server.adapter_intake import Base
from swarm.server.blocks.span import BlockSpan
from swarm.server.config import ServerConfig
from swarm.server.executor import Executor
from swarm.server.handler import Handler
from swarm.server.limits import HandlerLimits
from swarm.server.plan import Plan
from swarm.server.training import TrainingDesk
from swarm.transport import Stream, Transport
from swarm.types import ServerState


class Serving:
    """Serves one span of blocks, from `open` on; its device thread runs as soon as it is made.

    Args:
        span: the blocks, which nobody else uses.
        transport: where peers come from.
        config: how much memory for what.
        plan: the model, and how it is run.
        died: to be set when the device thread has failed.

    Attributes:
        executor: the device thread.
        handler: the blocks' face to peers.
        training: the same for training runs.
    """

    def __init__(self, span: BlockSpan, transport: Transport, config: ServerConfig, plan: Plan, died: asyncio.Event):
        self.adapters: dict[str, str] = {}
        """Digests of the adapters that it was told to have."""
        self._transport, self._is_open = transport, False
        model, model_name = plan.checkpoint.digest, plan.checkpoint.name
        self.executor = Executor(
            span,
            asyncio.get_running_loop(),
            kept_bytes=config.training_bytes,
            adapter_bytes=config.adapter_bytes,
            died=died,
        )
        self.handler = Handler(
            self.executor,
            transport,
            model=model,
            model_name=model_name,
            quantization=plan.quantization,
            max_positions=span.max_positions,
            limits=HandlerLimits(history_bytes=config.history_bytes),
        )
        if config.adapter_bytes:
            self.handler.take_adapters(_base_of(span, plan), config.adapter_bytes)
        self.training = TrainingDesk(
            self.executor, self.handler.pushes, model=model, model_name=model_name, state=lambda: self.handler.state
        )
        self.executor.start()

    @property
    def state(self) -> ServerState:
        """JOINING until it is open, then what the handler says."""
        return self.handler.state if self._is_open else ServerState.JOINING

    async def keep(self, name: str, adapter: LoadedAdapter) -> None:
        """Have an adapter for good.

        Raises:
            AdapterError: it does not fit the model.
            PeerBusy: nor the memory.
            ConfigError: there is no memory for adapters.
        """
        if self.handler.adapters is None:
            raise ConfigError(f"adapter {name} needs memory, but there is none for adapters")
        await self.handler.adapters.keep(adapter.manifest, adapter.shards)
        self.adapters[name] = adapter.digest

    def open(self) -> None:
        """Let peers in."""
        for service, serve in self._services().items():
            self._transport.serve(service, serve)
        self._is_open = True

    async def drain(self, timeout_s: float) -> None:
        """Admit nobody, end training runs, and have sessions moved elsewhere; returns when all have gone, or at the
        latest after `timeout_s`."""
        self.handler.state = ServerState.DRAINING
        self.training.drain()
        await self.handler.drain(timeout_s)

    async def withdraw(self, error: SwarmError) -> None:
        """End what still runs; whoever comes is told `error` from now on."""
        for service in self._services():
            await self._transport.stop_serving(service, error)

    async def close(self) -> None:
        """End the device thread, and what the transport does not know of."""
        await self.handler.close()
        await self.executor.stop()

    def _services(self) -> dict[str, Callable[[Stream], Coroutine[Any, Any, None]]]:
        handler = self.handler
        services: dict[str, Callable[[Stream], Coroutine[Any, Any, None]]] = {
            SESSION_SERVICE: handler.session,
            PUSH_SERVICE: handler.push,
            STATE_SERVICE: handler.receive_state,
            TRAIN_SERVICE: self.training.serve,
            INFO_SERVICE: handler.info,
        }
        if handler.adapters is not None:
            services[ADAPTER_SERVICE] = handler.adapter
        return services


def _base_of(span: BlockSpan, plan: Plan) -> Base:
    """What adapters must fit."""
    return Base(
        blocks=span.blocks,
        shapes={block: span.shape(block) for block in span.blocks},
        num_blocks=plan.num_blocks,
        hidden_size=span.hidden_size,
        name=plan.checkpoint.name,
    )
