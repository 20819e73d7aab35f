"""The client's side of the network for synchronous callers: one event loop in a thread of its own.

    generate (caller's thread) ─► SwarmSession.step ─► loop thread: RemoteSession ─► Transport ─► servers

Everything that awaits lives on the loop; callers block on a future, and an interrupt (Ctrl-C) cancels what they waited
for.
"""

import asyncio
import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

import torch

from swarm.adapters.layout import ModelLayout
from swarm.checkpoint.source import Checkpoint
from swarm.client.config import SessionConfig
from swarm.client.parameters import Parameters
from swarm.client.peers import Peers
from swarm.client.row_adapters import ClientAdapter, RowAdapters
from swarm.client.session import RemoteSession
from swarm.client.supervisor import WaitingFor
from swarm.client.timings import HopTiming
from swarm.client.training import Call, RemoteTraining
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.network.node import Node, NodeConfig
from swarm.network.tasks import TaskSet
from swarm.private.credentials import Credentials
from swarm.protocol import ADAPTER_SERVICE
from swarm.transport import Stream, Transport
from swarm.types import BlockRange, Hop

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
FRESH_S = 5.0
"""Records this old are good enough to find out who has an adapter."""

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self, name: str = "swarm-client"):
        self._loop = _new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for it; an exception in the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def post(self, function: Callable[[], object]) -> None:
        """Call a function on the loop, without waiting; nothing happens when the loop has ended."""
        if self.is_running:
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Stop the loop and join the thread."""
        if self.is_running:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            if pending:
                self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self._loop.close()


class SwarmSession:
    """A `swarm.client.session.RemoteSession` for synchronous callers."""

    def __init__(self, loop: LoopThread, remote: RemoteSession):
        self._loop, self._remote = loop, remote
        self.batch_size = remote.machine.batch_size
        self.max_length = remote.machine.max_length
        self._closed = False

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order."""
        return self._remote.route

    @property
    def timings(self) -> Sequence[HopTiming]:
        """The latest answered steps, hop by hop."""
        return tuple(self._remote.timings)

    @property
    def num_replays(self) -> int:
        """Servers that were replaced in the middle of this session."""
        return self._remote.machine.num_replays

    @property
    def num_moves(self) -> int:
        """Servers that have handed this session to another, so that nothing was replayed."""
        return self._remote.moves.num_moves

    @property
    def num_pushes(self) -> int:
        """Hops that get their inputs straight from the hop before them; all but the first, where nothing is wrong."""
        return self._remote.machine.num_pushes

    @property
    def waiting(self) -> WaitingFor | None:
        """Which server has no room for the step under way, for other threads to look at while they wait."""
        return self._remote.waiting

    def __repr__(self) -> str:
        return repr(self._remote)

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run one step through all blocks; see `swarm.session.Session.begin`."""
        return self._loop.run(
            self._remote.step(
                hidden_states, positions=positions, num_tokens=num_tokens, num_outputs=num_outputs, order=order
            )
        )

    def close(self) -> None:
        """Free the session on all its servers; may be called twice."""
        if not self._closed and self._loop.is_running:
            self._closed = True
            self._loop.run(self._remote.close(), CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SwarmTraining:
    """A `swarm.client.training.RemoteTraining` for synchronous callers."""

    def __init__(self, loop: LoopThread, remote: RemoteTraining):
        self._loop, self.remote = loop, remote

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order."""
        return self.remote.route

    def forth(
        self,
        hidden_states: torch.Tensor,
        lengths: Sequence[int],
        *,
        parameters: Parameters | None,
        wants_gradients: bool,
    ) -> tuple[Call, torch.Tensor]:
        """Run whole sequences; see `RemoteTraining.forth`."""
        return self._loop.run(
            self.remote.forth(hidden_states, lengths, parameters=parameters, wants_gradients=wants_gradients)
        )

    def back(
        self, call: Call, gradients: torch.Tensor, *, wants_inputs: bool = True
    ) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
        """Gradients of a call's inputs and parameters; see `RemoteTraining.back`."""
        return self._loop.run(self.remote.back(call, gradients, wants_inputs=wants_inputs))

    def drop(self, call: Call) -> None:
        """Nobody will go back through this call."""
        self._loop.post(lambda: self.remote.drop(call))

    def forget(self, version: int) -> None:
        """No call uses this version of the parameters any more."""
        self._loop.post(lambda: self.remote.forget(version))

    def close(self) -> None:
        """End the run at all its servers."""
        self._loop.run(self.remote.close(), CLOSE_TIMEOUT_S)


class SwarmService:
    """The remote blocks of one model, reached through the swarm."""

    def __init__(
        self, loop: LoopThread, node: Node, transport: Transport, peers: Peers, config: SessionConfig, hidden: int
    ):
        self._loop, self._node, self._transport, self.peers = loop, node, transport, peers
        self._config = config
        self.num_blocks, self.hidden_size = peers.num_blocks, hidden
        self._sessions: weakref.WeakSet[SwarmSession] = weakref.WeakSet()
        self._trainings: list[SwarmTraining] = []
        self._tasks = TaskSet()
        atexit.register(self.close)

    @property
    def initial_peers(self) -> tuple[str, ...]:
        """Addresses under which we have found the swarm."""
        return self._node.config.initial_peers

    @property
    def credentials(self) -> Credentials | None:
        """Our invitation, where the swarm is private."""
        return self._node.config.credentials

    def open_session(self, *, batch_size: int, max_length: int, adapters: RowAdapters | None = None) -> SwarmSession:
        """A new session; servers are contacted at its first step."""
        remote = RemoteSession(
            self.peers,
            self._transport,
            batch_size=batch_size,
            max_length=max_length,
            config=self._config,
            adapters=adapters,
        )
        session = SwarmSession(self._loop, remote)
        self._sessions.add(session)
        return session

    def fetch_adapter(self, digest: str, layout: ModelLayout) -> ClientAdapter:
        """An adapter of which only the digest is known, from the servers that have it.

        Raises:
            AdapterError: nobody has it, or it does not fit a model laid out so.
            PeerTimeout: the DHT doesn't answer.
        """
        from swarm.client.adapter_fetch import fetch_adapter

        def open_stream(peer_id: str) -> Coroutine[Any, Any, Stream]:
            return self._transport.open(peer_id, ADAPTER_SERVICE, timeout_s=self._config.open_timeout_s)

        async def fetch() -> ClientAdapter:
            await self.peers.refresh(max_age_s=FRESH_S)
            return await fetch_adapter(digest, self.peers.records, open_stream, layout)

        return self._loop.run(fetch())

    def find_route(self) -> tuple[Hop, ...]:
        """The servers that a new session would go through, by what is known now.

        Raises:
            RouteNotFound: blocks are missing.
            PeerTimeout: the DHT doesn't answer.
        """
        return self._loop.run(self.peers.route(BlockRange(0, self.num_blocks)))

    def check_access(self) -> None:
        """Whether we belong to the swarm still.

        Raises:
            AccessDenied: the swarm is private, and our invitation has expired or was revoked.
        """
        self._node.check_access()

    def when_denied(self, then: Callable[[], None]) -> None:
        """Call `then` on the loop's thread when `check_access` fails from now on; never in an open swarm."""

        async def wait() -> None:
            await self._node.denied.wait()
            then()

        self.start(wait(), name="wait for the end of our membership")

    def start(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a coroutine on the loop until this is closed; what goes wrong with the swarm is only logged."""

        async def supervised() -> None:
            try:
                await coroutine
            except SwarmError as error:
                logger.info("%s: %s", name, error)

        self._loop.post(lambda: self._tasks.spawn(supervised(), name=name))

    def open_training(self, blocks: BlockRange) -> SwarmTraining:
        """A new training run through some blocks; servers are contacted at its first use."""
        remote = RemoteTraining(self.peers, self._transport, blocks=blocks, config=self._config)
        training = SwarmTraining(self._loop, remote)
        self._trainings.append(training)
        return training

    def close(self) -> None:
        """Close all sessions, leave the swarm and stop the loop; may be called twice."""
        atexit.unregister(self.close)
        if not self._loop.is_running:
            return
        for session in list(self._sessions):
            close_in_time("a session", session.close)
        for training in self._trainings:
            close_in_time("a training run", training.close)
        close_in_time("the network", lambda: self._loop.run(self._leave(), CLOSE_TIMEOUT_S))
        self._loop.stop()

    async def _leave(self) -> None:
        """In this order: a connection that somebody still makes would outlive the transport."""
        await leave(self._transport, self._node, self._tasks)


def close_in_time(what: str, close: Callable[[], None]) -> None:
    """Close one thing; what takes too long must not keep the rest open."""
    try:
        close()
    except TimeoutError:
        logger.warning("%s did not close within %g s", what, CLOSE_TIMEOUT_S)


def connect(
    checkpoint: Checkpoint,
    *,
    num_blocks: int,
    hidden_size: int,
    initial_peers: Sequence[str],
    config: SessionConfig | None = None,
    identity: Identity | None = None,
    credentials: Credentials | None = None,
) -> SwarmService:
    """Join the swarm as a client of one model.

    Args:
        checkpoint: says which model, by content.
        num_blocks: blocks of the model.
        hidden_size: width of its hidden states.
        initial_peers: full addresses (/ip4/.../tcp/.../p2p/...) of any peers of the swarm.
        config: patience and encoding of sessions.
        identity: who the servers see; somebody new by default.
        credentials: our invitation into a private swarm.

    Raises:
        PeerUnreachable: none of the initial peers answers.
        AccessDenied: the swarm is private, and we have no invitation that is good.
        ConfigError: an address is malformed.
    """
    loop = LoopThread()
    try:
        node, transport = loop.run(join(tuple(initial_peers), identity, credentials))
    except BaseException:
        loop.stop()
        raise
    peers = Peers(node, transport, model=checkpoint.digest, model_name=checkpoint.name, num_blocks=num_blocks)
    service = SwarmService(loop, node, transport, peers, config or SessionConfig(), hidden_size)
    service.start(peers.get_acquainted(), name="get acquainted")
    return service


async def join(
    initial_peers: tuple[str, ...], identity: Identity | None = None, credentials: Credentials | None = None
) -> tuple[Node, Transport]:
    """Join a swarm as a client, which neither listens nor stores; errors as `connect`."""
    node = await Node.start(
        NodeConfig(identity=identity, initial_peers=initial_peers, client_mode=True, credentials=credentials)
    )
    transport = Transport(node, listen=None)
    await transport.start()
    return node, transport


async def leave(transport: Transport, node: Node, tasks: TaskSet | None = None) -> None:
    """Close what `join` opened, and first the tasks that use it; the node's process ends even if the rest hangs."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S / 2):
            if tasks is not None:
                await tasks.close()
            await transport.close()
    except TimeoutError:
        logger.warning("connections did not close within %g s", CLOSE_TIMEOUT_S / 2)
    finally:
        await node.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
