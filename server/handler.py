"""The server's face to other peers: answers `info`, admits sessions, and lets other servers push into them.

Stream ──InfoRequest──► info ─► Info
       ──OpenSession──► session: check, admit ─► ServedSession.run      until FIN, an error or silence
       ──PushHello────► PushDesk ─► ServedSession.receive_pushes, receive_state
       ──AdapterOffer, AdapterRequest──► AdapterDesk.serve
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from swarm import __version__
from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy, SwarmError
from swarm.protocol import ADAPTER_SERVICE, MAX_META_BYTES, MAX_PINGS, Info, InfoRequest, OpenSession, Ping
from swarm.rates import Rate, Rates
from swarm.registry import ServerRecord
from swarm.server.adapter_desk import AdapterDesk
from swarm.server.adapter_intake import Base
from swarm.server.executor import Executor
from swarm.server.history import HistoryBudget
from swarm.server.limits import HandlerLimits
from swarm.server.meters import SessionMeter
from swarm.server.moving import MoveDesk
from swarm.server.pages import PAGE_SIZE
from swarm.server.push import PushDesk
from swarm.server.relief import Guest, Replica, sessions_to_move
from swarm.server.session import ServedSession
from swarm.transport import Limits, Stream, Transport
from swarm.transport.limits import Budget
from swarm.types import ServerState

logger = logging.getLogger(__name__)

RUNNING_S = 30.0
"""A session that did something so recently counts as running."""
QUIET_S = 2.0
"""A session that can't move and did nothing for so long ..."""
QUIET_SHARE = 0.5
"""... holds up nobody who wants to leave, when this part of the time to drain is over."""
RELIEF_S = 60.0
"""What a session is told that has to move for want of room; nothing happens to it after that."""
LOOK_S = 0.25
"""How often it is looked whether only such sessions are left, and who should be asked again."""
FULL_LOAD_SESSIONS = 32
"""Running sessions at which a server calls itself fully loaded."""


class Handler:
    """Serves one span of blocks.

    Args:
        executor: the device thread that runs the blocks.
        transport: how to reach other servers.
        model: content digest of the checkpoint.
        model_name: what people call it.
        quantization: how the weights are stored, for `info`.
        max_positions: longest sequence that the model can run.
        limits: what to refuse.
    """

    def __init__(
        self,
        executor: Executor,
        transport: Transport,
        *,
        model: str,
        model_name: str,
        quantization: str,
        max_positions: int,
        limits: HandlerLimits | None = None,
    ):
        self.executor = executor
        self.state = ServerState.ONLINE
        self.num_rows = 0
        self._model, self._model_name = model, model_name
        self._quantization, self._max_positions = quantization, max_positions
        self._limits = limits or HandlerLimits()
        self.history = HistoryBudget(self._limits.history_bytes)
        self._pending = Budget(self._limits.max_total_pending_bytes)
        self.meter = SessionMeter()
        self._transport, self._started = transport, time.monotonic()
        self.pushes = PushDesk(transport, self._limits)
        self._moves = MoveDesk(executor, self._limits, self.meter, self.pushes.open_state)
        self.adapters: AdapterDesk | None = None
        """None where this server takes none."""
        self._sessions: set[ServedSession] = set()
        self._num_swapped = 0
        """Pages that had left the cache when that was last looked at."""
        self._left = asyncio.Event()
        """A session has ended."""
        self._rows_of: Counter[str] = Counter()
        self._sessions_of: Counter[str] = Counter()
        self._opens = Rates(Rate(burst=self._limits.max_new_sessions, per_s=self._limits.new_sessions_per_s))
        # fp32 is the widest dtype that a step may have
        largest = (Limits().max_message_bytes - MAX_META_BYTES) // (4 * executor.span.hidden_size)
        self._max_step_tokens = max(1, min(self._limits.max_step_tokens, largest))

    @property
    def num_sessions(self) -> int:
        """Sessions that are open."""
        return sum(self._sessions_of.values())

    @property
    def load(self) -> float:
        """How much of its capacity is in use, 0 to 1; 1 where steps wait for room in the cache."""
        if self.executor.num_waiting:
            return 1.0
        now = time.monotonic()
        num_running = sum(now - session.last_active < RUNNING_S for session in self._sessions)
        return min(1.0, max(self.meter.load.waiting_share(now), num_running / FULL_LOAD_SESSIONS))

    @property
    def queue_s(self) -> float:
        """How long a step has waited here for its batch, lately."""
        return self.meter.load.mean_s(time.monotonic())[0]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sessions together that ran through the blocks lately."""
        return self.meter.load.tokens_per_s(time.monotonic())

    @property
    def uptime_s(self) -> float:
        """Since when it serves."""
        return time.monotonic() - self._started

    def __repr__(self) -> str:
        return (
            f"<Handler {self.state.name} | {self.num_sessions} sessions, {self.num_rows} rows"
            f" | {self.tokens_per_s:.0f} tokens/s | load {self.load:.2f}>"
        )

    def take_adapters(self, base: Base, limit_bytes: int) -> AdapterDesk:
        """Serve sessions with adapters from now on.

        Args:
            base: what they must fit.
            limit_bytes: host memory for them.
        """
        self.adapters = AdapterDesk(self.executor, base, limit_bytes=limit_bytes, open_stream=self._open_adapter_stream)
        return self.adapters

    async def close(self) -> None:
        """End what the transport does not know of."""
        if self.adapters is not None:
            await self.adapters.close()
        await self.pushes.close()

    async def info(self, stream: Stream) -> None:
        """Answer one InfoRequest."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, InfoRequest):
            raise InvalidRequest(f"expected InfoRequest, got {type(message).__name__}")
        await stream.send(self.describe(), timeout_s=self._limits.send_timeout_s)

    def describe(self) -> Info:
        """What `info` answers."""
        span = self.executor.span
        queue_s, step_s = self.meter.load.mean_s(time.monotonic())
        return Info(
            model=self._model,
            model_name=self._model_name,
            start=span.blocks.start,
            end=span.blocks.end,
            state=int(self.state),
            version=__version__,
            dtype=str(span.dtype).removeprefix("torch."),
            quantization=self._quantization,
            num_sessions=self.num_sessions,
            kv_free_tokens=self.executor.free_tokens,
            kv_total_tokens=self.executor.total_tokens,
            hidden_size=span.hidden_size,
            num_rows=self.num_rows,
            num_waiting=self.executor.num_waiting,
            load=self.load,
            tokens_per_s=self.tokens_per_s,
            queue_us=int(queue_s * 1e6),
            step_us=int(step_s * 1e6),
            uptime_s=self.uptime_s,
            num_tokens=self.meter.num_tokens,
            num_opened=self.meter.num_opened,
            num_failed=self.meter.num_failed,
            pings=self._pings(),
        )

    def _pings(self) -> tuple[Ping, ...]:
        """Round trips to servers that we send to: whom we connected to ourselves, which is no client."""
        nearest = sorted(self._transport.round_trips().items(), key=lambda item: item[1])[:MAX_PINGS]
        return tuple(Ping(peer_id=peer_id, rtt_us=int(rtt_s * 1e6)) for peer_id, rtt_s in nearest)

    async def session(self, stream: Stream) -> None:
        """Run one session until the client ends it, errs or falls silent; all that it had is freed in every case."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, OpenSession):
            raise InvalidRequest(f"expected OpenSession, got {type(message).__name__}")
        try:
            self._admit(message, stream.account)
            self.pushes.check(message.push_key)
        except SwarmError as error:
            self.meter.refuse(error)
            raise
        session = ServedSession(
            stream,
            message,
            executor=self.executor,
            limits=self._limits,
            max_step_tokens=self._max_step_tokens,
            budget=self.history,
            pending=self._pending,
            meter=self.meter,
            open_push=partial(self.pushes.open, client=stream.account),
            move_desk=self._moves,
            adapters=self.adapters,
        )
        self._count(stream.account, 1, message.batch_size)
        self._sessions.add(session)
        self.pushes.add(message.push_key, session)
        self.meter.opened()
        ending: BaseException | None = None
        try:
            await session.run()
        except BaseException as error:
            ending = error
            raise
        finally:
            self.meter.end(ending)
            self.pushes.remove(message.push_key)
            self._sessions.discard(session)
            self._left.set()
            self._count(stream.account, -1, -message.batch_size)

    async def push(self, stream: Stream) -> None:
        """Let another server send steps into a session whose key it knows."""
        await self.pushes.serve(stream)

    async def receive_state(self, stream: Stream) -> None:
        """Let another server hand a session over to one whose key it knows, and that is still empty."""
        await self.pushes.serve_state(stream)

    async def drain(self, timeout_s: float) -> None:
        """Let no more sessions in, and have those that are here moved to other servers.

        Returns when all have gone, or at the latest after `timeout_s`. Clients that know nobody who would take theirs
        are asked again, since a replica may have room a moment later. What can't move may go on until the end; but
        nobody waits so long for a session that does nothing.
        """
        self.state = ServerState.DRAINING
        now = time.monotonic()
        until, quiet_until = now + timeout_s, now + QUIET_SHARE * timeout_s
        while now < until and any(now < quiet_until or self._must_stay_for(it) for it in self._sessions):
            for session in self._sessions:
                session.moves.urge(until - now)
            self._left.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(until - now, LOOK_S)):
                    await self._left.wait()
            now = time.monotonic()

    def relieve(self, replicas: Sequence[ServerRecord]) -> None:
        """If sessions had to leave the cache since this was called last, ask some to move to servers with room.

        Those that were asked and found nobody are reason enough: they are asked again.

        Args:
            replicas: servers of all our blocks.
        """
        num_swapped = self.executor.meter.num_swapped_out
        is_short = num_swapped != self._num_swapped or any(session.moves.has_nowhere for session in self._sessions)
        if self.state is not ServerState.ONLINE or not is_short or not replicas:
            return
        self._num_swapped = num_swapped
        used = {digest for session in self._sessions for digest in session.opened.adapters}
        places = [
            Replica(
                free_pages=record.kv_free_tokens // PAGE_SIZE,
                adapters=frozenset(it for it in used if any(note.is_about(it) for note in record.adapters)),
            )
            for record in replicas
        ]
        guests = [
            Guest(
                key=session,
                num_pages=session.num_pages,
                stays_until=session.moves.stays_until,
                adapters=frozenset(session.opened.adapters),
            )
            for session in self._sessions
        ]
        num_pages = self.executor.total_tokens // PAGE_SIZE
        asked = sessions_to_move(guests, places, num_pages, time.monotonic())
        for session in asked:
            session.moves.ask(RELIEF_S)
        if asked:
            logger.info("the cache is short: asked %d of %d sessions to move", len(asked), len(guests))

    def _must_stay_for(self, session: ServedSession) -> bool:
        return not session.moves.has_nowhere or time.monotonic() - session.last_active < QUIET_S

    async def adapter(self, stream: Stream) -> None:
        """Take adapters that were asked for, and give others those that are here."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if self.adapters is None:
            raise PeerBusy("this server takes no adapters", retry_after_s=3600.0)
        await self.adapters.serve(stream, message)

    async def _open_adapter_stream(self, peer_id: str, client: str) -> Stream:
        self.pushes.charge(client)
        if peer_id == self._transport.node.peer_id:
            raise PeerBusy("that is this server itself", peer_id=peer_id)
        return await self._transport.open(peer_id, ADAPTER_SERVICE, timeout_s=self._limits.push_open_timeout_s)

    def _count(self, account: str, sessions: int, rows: int) -> None:
        self.num_rows += rows
        for counter, change in ((self._sessions_of, sessions), (self._rows_of, rows)):
            counter[account] += change
            if not counter[account]:
                del counter[account]

    def _admit(self, message: OpenSession, account: str) -> None:
        """Refuse what can't be served.

        Raises:
            CheckpointMismatch: another checkpoint is asked for.
            InvalidRequest: lengths that this server never serves.
            PeerBusy: not now, or it has gone to other blocks.
        """
        span = self.executor.span
        if message.model != self._model:
            raise CheckpointMismatch(
                f"this server runs {self._model_name} {self._model[:12]}, not {message.model[:12]}"
            )
        if not span.blocks.covers(message.blocks):
            raise PeerBusy(f"this server runs blocks {span.blocks}, not {message.blocks}", retry_after_s=60.0)
        if message.max_length > self._max_positions:
            raise InvalidRequest(
                f"{message.max_length} tokens asked, {self._model_name} has {self._max_positions} positions"
            )
        if any(message.row_adapters) and self.adapters is None:
            raise PeerBusy("this server takes no adapters", retry_after_s=3600.0)
        if self.state is not ServerState.ONLINE:
            raise PeerBusy(f"the server is {self.state.name}", retry_after_s=60.0)
        self._admit_rate(account)
        self._admit_rows(message.batch_size, account)

    def _admit_rate(self, account: str) -> None:
        """Refuse a session of who opens too many one after the other.

        Raises:
            PeerBusy: with the limit, and when to come back.
        """
        now = time.monotonic()
        if not self._opens.charge(account, now):
            raise PeerBusy(
                f"you opened {self._limits.max_new_sessions} sessions lately, limit"
                f" {self._limits.new_sessions_per_s:g} per second",
                retry_after_s=self._opens.retry_after_s(account, now),
            )

    def _admit_rows(self, batch_size: int, account: str) -> None:
        """Refuse a session beyond the limits of all peers together, or of this one.

        Raises:
            PeerBusy: with what is open and what the limits are.
        """
        limits, share = self._limits, self._limits.max_peer_share
        max_rows = limits.max_stateful_rows if self.executor.span.stateful else limits.max_rows
        for sessions, rows, part in (
            (self.num_sessions, self.num_rows, 1.0),
            (self._sessions_of[account], self._rows_of[account], share),
        ):
            if sessions >= part * limits.max_sessions or rows + batch_size > part * max_rows:
                whose = "" if part == 1.0 else "you have "
                raise PeerBusy(
                    f"{whose}{sessions} sessions with {rows} rows open, limits {part * limits.max_sessions:.0f} and"
                    f" {part * max_rows:.0f}",
                    retry_after_s=5.0,
                )
        if batch_size * PAGE_SIZE > self.executor.total_tokens:
            raise PeerBusy(
                f"{batch_size} rows need at least {batch_size} pages of KV cache, the server has"
                f" {self.executor.total_tokens // PAGE_SIZE}",
                retry_after_s=600.0,
            )
