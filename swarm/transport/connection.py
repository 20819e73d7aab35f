"""One connection to a peer, whatever carries it: feeds the mux, wakes the streams, keeps the time.

carrier --data_received--> Mux --events--> Streams        Streams --send_now, pieces--> Mux --> carrier.write
                            ^-- tick (timer)                       carrier full: senders take turns
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

from swarm.errors import (
    AccessDenied,
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    ProtocolMismatch,
    SwarmError,
)
from swarm.protocol import MAX_META_BYTES, error_from_wire, error_to_wire
from swarm.transport.events import Credited, Failed, Finished, Greeted, Opened, Received, Refused
from swarm.transport.frames import MAX_FRAGMENT_BYTES
from swarm.transport.limits import Limits, Traffic
from swarm.transport.mux import Mux
from swarm.transport.stream import Stream

log = logging.getLogger(__name__)

WRITE_BUFFER_BYTES = 1 << 19
"""Senders wait while more than this is queued at the carrier."""
GOODBYE_S = 1.0
"""How long a peer may take to let go of a connection that we close."""
MAX_EARLY_BYTES = 1 << 20
"""What may come before we have looked at who is there."""
MAX_REST_S = 0.5
"""How long a peer is not read at most, far below what it takes for silence."""
_JOIN_BYTES = 1 << 16  # up to here one joined write is cheaper than two


class Owner(Protocol):
    """Who keeps a connection."""

    traffic: Traffic

    def on_greeted(self, connection: "Connection", ticket: bytes) -> None:
        """HELLO has come; sets `peer_id` where the ticket proves it. May raise a SwarmError to refuse."""

    def on_opened(self, connection: "Connection", stream: Stream) -> None:
        """The peer has opened a stream. May raise a SwarmError to refuse it."""

    def on_closed(self, connection: "Connection") -> None:
        """The connection is over."""


class Connection(asyncio.Protocol):
    """A connection that carries many streams.

    Args:
        owner: is told of new streams and of the end.
        carrier: "direct", "relay" or "p2p".
        make_mux: makes the protocol state for a given time.
        limits: timeouts and sizes.
        peer_id: the authenticated peer; empty until its ticket is seen.

    `account` is who is charged for what the peer does: itself, unless the owner says otherwise. `via` is the relay of a
    connection that we made through one.
    """

    is_ours = True

    def __init__(
        self, owner: Owner, carrier: str, make_mux: Callable[[float], Mux], limits: Limits, *, peer_id: str = ""
    ) -> None:
        self.peer_id = peer_id
        self.account = peer_id
        self.carrier = carrier
        self.via: str | None = None
        self.made_at = time.monotonic()
        self.num_refused = 0
        self.is_closed = False
        self.error: SwarmError | None = None
        """Why it is over."""
        self.idle_since: float | None = None
        self._owner = owner
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._mux = make_mux(time.monotonic())
        self._streams: dict[int, Stream] = {}
        self._transport: asyncio.Transport | None = None
        self._is_started = False
        self._early = bytearray()  # what came before `start`: from whom is not known until then
        self._gone = asyncio.Event()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._corked: list[bytes] = []
        self._is_corked = False
        self._rest_s = 0.0  # how long the peer is not to be read, since it asks for too much
        self._is_full = False  # the carrier takes no more for now
        self._turns: deque[asyncio.Future[None]] = deque()  # senders that wait for the carrier, first come first served
        self._timer = self._loop.call_later(limits.ping_period_s / 2, self._tick)

    # --- the owner's side ---

    def start(self) -> None:
        """Say HELLO; before that only the carrier's own handshake has been seen by the peer."""
        self._is_started = True
        early, self._early = bytes(self._early), bytearray()
        self._flush()
        if early:
            self.data_received(early)

    async def wait_greeted(self) -> None:
        """Wait for the peer's HELLO.

        Raises:
            ProtocolMismatch, PeerError: why it will not come.
        """
        await asyncio.shield(self._greeted)

    def open_stream(self, service: str) -> Stream:
        """Open a stream to a service of the peer.

        Raises:
            PeerDisconnected: when the connection is over.
        """
        if self.is_closed:
            raise PeerDisconnected(f"connection to {self.peer_id} is closed", peer_id=self.peer_id)
        stream_id = self._mux.open(service)
        stream = self._streams[stream_id] = Stream(self, stream_id, service)
        self._flush()
        return stream

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip in seconds."""
        return self._mux.rtt_s

    @property
    def is_greeted(self) -> bool:
        """Whether the peer has said HELLO."""
        return self._mux.is_greeted

    @property
    def num_streams(self) -> int:
        """Streams of both sides."""
        return self._mux.num_streams

    @property
    def num_peer_streams(self) -> int:
        """Streams that the peer has opened, as far as its frames have been looked at."""
        return sum(not self._mux.is_ours(stream_id) for stream_id in self._streams)

    @property
    def remote_host(self) -> str | None:
        """The address at the other end of a direct connection."""
        if self.carrier != "direct" or self._transport is None:
            return None
        name = self._transport.get_extra_info("peername")
        return str(name[0]) if name else None

    @property
    def transport(self) -> asyncio.Transport:
        """The carrier's transport, once connected."""
        assert self._transport is not None
        return self._transport

    def close(self, error: SwarmError) -> None:
        """End the connection; the peer and all streams get `error`."""
        if self.is_closed:
            return
        self.is_closed = True
        self._timer.cancel()
        if self._transport is not None and not self._transport.is_closing():
            if self._is_started:
                self._mux.fail(0, error_to_wire(error))
                self._corked.append(self._mux.take_output())
                self._uncork()
            self._transport.close()
            self._loop.call_later(GOODBYE_S, self._transport.abort)  # a peer that does not read must not keep it open
        self._end(error)

    async def wait_gone(self) -> None:
        """Wait until the carrier of a closed connection is gone; one whose peer is silent is cut off in the end.

        A carrier that says nothing even then is left alone: uvloop's TLS does so when its socket was closed under it.
        """
        if self._transport is None:
            return
        for _ in range(2):
            with suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._gone.wait()
                return
            self._transport.abort()

    # --- the streams' side ---

    def send_now(self, stream_id: int, meta: bytes, body: bytes | memoryview) -> bool:
        """Send a message in one frame at once if there is room for it; False when it must wait or be cut."""
        if len(body) > MAX_FRAGMENT_BYTES or self._is_full or not self._mux.may_send(stream_id):
            return False
        self.start_message(stream_id, meta, body)
        self.write(self._mux.encode_data(stream_id, meta, len(body), has_more=False), body)
        return True

    def may_send(self, stream_id: int) -> bool:
        """Whether the stream has credit to start a message."""
        return self._mux.may_send(stream_id) and not self.is_closed

    def start_message(self, stream_id: int, meta: bytes, body: bytes | memoryview) -> None:
        """Pay for a message.

        Raises:
            InvalidRequest: when it is larger than the peer accepts.
        """
        if len(meta) > MAX_META_BYTES or len(meta) + len(body) > self._limits.max_message_bytes:
            raise InvalidRequest(
                f"message of {len(meta)} + {len(body)} bytes, limit {MAX_META_BYTES} for the first part "
                f"and {self._limits.max_message_bytes} for both"
            )
        self._mux.start_message(stream_id, len(meta) + len(body))

    def pieces(
        self, stream_id: int, meta: bytes, body: bytes | memoryview
    ) -> Iterator[tuple[bytes, bytes | memoryview]]:
        """Head and body of the frames of one message."""
        view = memoryview(body)
        for start in range(0, max(len(view), 1), MAX_FRAGMENT_BYTES):
            piece = view[start : start + MAX_FRAGMENT_BYTES]
            has_more = start + MAX_FRAGMENT_BYTES < len(view)
            yield self._mux.encode_data(stream_id, meta, len(piece), has_more=has_more), piece
            meta = b""

    def write(self, head: bytes, body: bytes | memoryview) -> None:
        """Write a frame behind any control frames that wait."""
        if len(body) <= _JOIN_BYTES:
            self._send(b"".join((self._mux.take_output(), head, body)))
        else:
            self._send(self._mux.take_output() + head)
            self._uncork()
            self._write(bytes(body))  # a copy: some transports keep a view, and the caller may reuse its tensor

    async def wait_turn(self) -> None:
        """Wait until the carrier takes more and those who came before have had a turn; `end_turn` must follow."""
        if not self._is_full and not self._turns:
            return
        turn = self._loop.create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.end_turn()
            elif turn in self._turns:
                self._turns.remove(turn)
            raise

    def end_turn(self) -> None:
        """Let the next sender have its turn, when the carrier takes more."""
        while self._turns and not self._is_full:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def consume(self, stream_id: int, cost: int) -> None:
        """A stream's application has taken a message."""
        self._mux.consume(stream_id, cost)
        self._flush()

    def finish(self, stream_id: int) -> None:
        """A stream was closed on our side."""
        self._mux.finish(stream_id)
        self._drop_if_gone(stream_id)
        self._flush()

    def fail(self, stream_id: int, error: SwarmError) -> None:
        """A stream was aborted on our side."""
        self._mux.fail(stream_id, error_to_wire(error))
        self._drop_if_gone(stream_id)
        self._flush()

    # --- the carrier's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.is_closed:
            return
        if not self._is_started:
            self._early += data
            if len(self._early) > MAX_EARLY_BYTES:
                self.transport.abort()
            return
        self._owner.traffic.received += len(data)
        try:
            for event in self._mux.receive(data, time.monotonic()):
                self._on_event(event)
        except PeerMisbehaved as error:
            log.warning("dropping %s connection of %s: %s", self.carrier, self.peer_id or "a stranger", error)
            self.close(PeerMisbehaved(str(error), peer_id=self.peer_id))
        except SwarmError as error:
            log.info("closing %s connection of %s: %s", self.carrier, self.peer_id or "a stranger", error)
            self.close(error)
        else:
            self._flush()
            self._rest()

    def eof_received(self) -> None:
        """The peer has closed: nothing can be told to it, so the transport closes too."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._gone.set()
        if not self.is_closed:
            self.is_closed = True
            reason = f": {exc}" if exc else ""
            self._end(PeerDisconnected(f"connection to {self.peer_id} was lost{reason}", peer_id=self.peer_id))

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self.end_turn()

    # --- inside ---

    def _on_event(self, event: object) -> None:
        if isinstance(event, Received):
            if (stream := self._streams.get(event.stream_id)) is not None:
                stream.on_message(event.meta, event.body, event.cost)
        elif isinstance(event, Credited):
            if (stream := self._streams.get(event.stream_id)) is not None:
                stream.on_credit()
        elif isinstance(event, Opened):
            self._on_opened(event)
        elif isinstance(event, Finished):
            if (stream := self._streams.get(event.stream_id)) is not None:
                stream.on_finish()
                self._drop_if_gone(event.stream_id)
        elif isinstance(event, Failed | Refused):
            self._on_failed(event)
        elif isinstance(event, Greeted):
            self._owner.on_greeted(self, event.ticket)
            if not self._greeted.done():
                self._greeted.set_result(None)

    def _on_opened(self, event: Opened) -> None:
        stream = self._streams[event.stream_id] = Stream(self, event.stream_id, event.service)
        try:
            self._owner.on_opened(self, stream)
            self.num_refused = 0
        except SwarmError as error:
            self.num_refused += 1
            if self.num_refused >= self._limits.max_refused_opens:
                raise PeerMisbehaved(f"{self.num_refused} streams in a row had to be refused: {error}") from error
            if isinstance(error, PeerBusy):
                self._rest_s += 1 / self._limits.open_rate.per_s
            self.fail(event.stream_id, error)

    def _rest(self) -> None:
        """Leave a peer unread for as long as the streams that it was refused would have taken: refusing costs, too."""
        if self._rest_s and not self.transport.is_closing():
            self.transport.pause_reading()
            self._loop.call_later(min(self._rest_s, MAX_REST_S), self._read_on)
        self._rest_s = 0.0

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _on_failed(self, event: Failed | Refused) -> None:
        error = error_from_wire(event.error, peer_id=self.peer_id)
        if event.stream_id == 0:
            raise error
        if (stream := self._streams.pop(event.stream_id, None)) is not None:
            stream.on_failure(error, drop_inbox=isinstance(event, Refused))

    def _drop_if_gone(self, stream_id: int) -> None:
        if not self._mux.has(stream_id):
            self._streams.pop(stream_id, None)

    def _flush(self) -> None:
        if self._is_started and self._transport is not None and (output := self._mux.take_output()):
            self._send(output)

    def _send(self, data: bytes) -> None:
        """Write the first bytes of an iteration of the loop at once, and all that follow in one piece at its end."""
        if self.transport.get_write_buffer_size() > self._limits.max_unsent_bytes:
            return self.transport.abort()  # senders wait for the carrier: these are answers that nobody reads
        if self._is_corked:
            self._corked.append(data)
        else:
            self._is_corked = True
            self._loop.call_soon(self._uncork_again)
            self._write(data)

    def _uncork(self) -> None:
        if self._corked:
            data = b"".join(self._corked)
            self._corked.clear()
            self._write(data)

    def _write(self, data: bytes) -> None:
        self._owner.traffic.sent += len(data)
        self.transport.write(data)

    def _uncork_again(self) -> None:
        self._is_corked = False
        if not self.transport.is_closing():
            self._uncork()

    def _tick(self) -> None:
        now = time.monotonic()
        try:
            self._mux.tick(now)
        except PeerTimeout as error:
            log.info("%s connection of %s: %s", self.carrier, self.peer_id or "a stranger", error)
            self.close(PeerTimeout(f"{self.peer_id or 'peer'}: {error}", peer_id=self.peer_id))
            if self._transport is not None:
                self._transport.abort()
            return
        self._flush()
        self._timer = self._loop.call_later(self._limits.ping_period_s / 2, self._tick)
        if self._mux.num_streams or not self._mux.is_greeted:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        elif now - self.idle_since > self._limits.idle_timeout_s:
            self.close(PeerDisconnected("closed because nothing was using it"))

    def _end(self, error: SwarmError) -> None:
        """Everyone who waits learns that the connection is over."""
        blame = (
            error if isinstance(error, ProtocolMismatch | AccessDenied | PeerError) else PeerDisconnected(str(error))
        )
        if isinstance(blame, PeerError) and blame.peer_id is None:
            blame.peer_id = self.peer_id
        self.error = blame
        if not self._greeted.done():
            self._greeted.set_exception(blame)
            self._greeted.exception()  # retrieved, in case that nobody waits
        self._is_full = False
        for turn in self._turns:
            if not turn.done():
                turn.set_result(None)
        self._turns.clear()
        for stream in self._streams.values():
            stream.on_failure(blame)
        self._streams.clear()
        self._mux.close()
        self._owner.on_closed(self)
