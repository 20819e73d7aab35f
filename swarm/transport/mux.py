"""The state of one connection that carries many streams. Pure: bytes and the time go in, events and bytes come out.

Per stream, each side: OPEN -> DATA* -> FIN, or ERR at any time. A stream is gone when both sides have sent FIN or one
has sent ERR; frames that were under way then are dropped. Flow control counts units (a message costs its bytes and
256 for itself): a sender starts a message while it has credit left, and the receiver gives credit back as its
application consumes messages. So at most `window + one message` waits at the receiver, per stream.

    bytes --receive(now)--> [FrameDecoder] --frames--> state --> events (Greeted, Opened, Received, Finished, ...)
    open / send / finish / fail / consume / tick(now) --> take_output() --> bytes

The side that dialled opens odd streams, the other even ones; ids only grow.
"""

from collections.abc import Callable

from swarm.errors import PeerBusy, PeerMisbehaved, PeerTimeout, ProtocolMismatch
from swarm.protocol import PROTOCOL_VERSION, error_to_wire
from swarm.rates import Rates
from swarm.transport.events import Credited, Event, Failed, Finished, Greeted, Opened, Received, Refused
from swarm.transport.frames import FLAG_MORE, HELLO_PREFIX, Frame, FrameDecoder, Kind, encode_frame
from swarm.transport.limits import Budget, Limits

MESSAGE_COST = 256
"""Units that a message costs beyond its bytes, so that empty ones are not free."""
MAX_STREAM_ID = (1 << 32) - 1
_HELLO_BYTES = len(HELLO_PREFIX) + 2


class _State:
    """What is known of one stream."""

    __slots__ = (
        "body",
        "cost",
        "credit",
        "is_discarding",
        "is_finished",
        "is_peer_finished",
        "meta",
        "returned",
        "unconsumed",
        "window",
    )

    def __init__(self, window: int) -> None:
        self.credit = self.window = window
        self.unconsumed = 0  # units received and not given back
        self.returned = 0  # units consumed whose CREDIT is not sent yet
        self.is_finished = False
        self.is_peer_finished = False
        self.is_discarding = False
        self.meta: bytes | None = None  # of a message that is still coming
        self.body = bytearray()
        self.cost = 0


class Mux:
    """One side of a connection.

    Args:
        is_dialler: whether this side made the connection.
        limits: what the peer may do.
        budget: bytes that wait to be consumed, over all connections that share it.
        now: the time, in seconds of any steady clock.
        ticket: goes into our HELLO.
    """

    def __init__(
        self,
        *,
        is_dialler: bool,
        limits: Limits,
        now: float,
        budget: Budget | None = None,
        ticket: bytes = b"",
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self.version = version
        self.rtt_s: float | None = None
        self.is_greeted = False
        self.num_buffered = 0
        self._limits = limits
        self._budget = budget or Budget(limits.max_buffered_bytes)
        self._decoder = FrameDecoder()
        self._streams: dict[int, _State] = {}
        self._next_id = 1 if is_dialler else 2
        self._last_peer_id = 0 if is_dialler else -1
        self._started = self._last_tick = self._last_received = self._last_ping = now
        self._ping_sent: float | None = None
        self._frame_began = now
        self._pings = Rates(limits.ping_rate, max_keys=1)
        hello = HELLO_PREFIX + version.to_bytes(2, "big") + ticket
        self._output: list[bytes] = [encode_frame(Kind.HELLO, 0, hello)]
        self._handlers: dict[int, Callable[[Frame, list[Event], float], None]] = {
            Kind.HELLO: self._on_second_hello,
            Kind.OPEN: self._on_open,
            Kind.DATA: self._on_data,
            Kind.FIN: self._on_fin,
            Kind.ERR: self._on_err,
            Kind.CREDIT: self._on_credit,
            Kind.PING: self._on_ping,
            Kind.PONG: self._on_pong,
        }

    # --- what comes in ---

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer.

        Raises:
            ProtocolMismatch: when its HELLO has another version.
            PeerMisbehaved: when it breaks a rule. The connection must be closed after either.
        """
        self._last_received = now
        events: list[Event] = []
        frames = self._decoder.feed(data)
        if frames or not self._decoder.num_waiting:
            self._frame_began = now
        for frame in frames:
            if self.is_greeted:
                self._handlers[frame.kind](frame, events, now)
            else:
                self._on_hello(frame, events)
        return events

    def tick(self, now: float) -> None:
        """Let time pass: sends a PING when the peer is silent. Call it at least twice per `ping_period_s`.

        Raises:
            PeerTimeout: when the peer has been silent for too long, or has not said HELLO or ended a frame in time.
        """
        if now - self._last_tick > 2 * self._limits.ping_period_s:
            self._started += now - self._last_tick  # it was us who stood still: the peer gets its time back
            self._frame_began += now - self._last_tick
            self._last_received = self._last_ping = now
        self._last_tick = now
        silent_s = now - self._last_received
        if not self.is_greeted and now - self._started > self._limits.hello_timeout_s:
            raise PeerTimeout(f"no HELLO within {self._limits.hello_timeout_s:g} s")
        if self._decoder.num_waiting and now - self._frame_began > self._limits.frame_timeout_s:
            raise PeerTimeout(f"a frame was not complete after {self._limits.frame_timeout_s:g} s")
        if silent_s > self._limits.silence_timeout_s:
            raise PeerTimeout(f"silent for {silent_s:.1f} s, limit {self._limits.silence_timeout_s:g} s")
        if silent_s >= self._limits.ping_period_s / 2 and now - self._last_ping >= self._limits.ping_period_s:
            self._last_ping = self._ping_sent = now
            self._output.append(encode_frame(Kind.PING, 0, bytes(8)))

    # --- what goes out ---

    def take_output(self) -> bytes:
        """Control frames that wait to be sent."""
        if not self._output:
            return b""
        output, self._output = b"".join(self._output), []
        return output

    def open(self, service: str) -> int:
        """Open a stream; returns its id."""
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise PeerBusy("all stream ids of this connection are used up")
        self._next_id += 2
        self._streams[stream_id] = _State(self._limits.window_of(service))
        self._output.append(encode_frame(Kind.OPEN, stream_id, service.encode()))
        return stream_id

    def may_send(self, stream_id: int) -> bool:
        """Whether the stream has credit to start a message."""
        state = self._streams.get(stream_id)
        return state is not None and state.credit > 0

    def start_message(self, stream_id: int, num_bytes: int) -> None:
        """Pay for a message of `num_bytes` of meta and body; its DATA frames (`encode_data`) must follow."""
        self._streams[stream_id].credit -= num_bytes + MESSAGE_COST

    @staticmethod
    def encode_data(stream_id: int, meta: bytes, num_body_bytes: int, *, has_more: bool) -> bytes:
        """Header and meta of one DATA frame."""
        return encode_frame(
            Kind.DATA, stream_id, meta, flags=FLAG_MORE if has_more else 0, num_body_bytes=num_body_bytes
        )

    def finish(self, stream_id: int) -> None:
        """Send FIN. What waits and what still comes is dropped and credited, so that the peer can finish too."""
        state = self._streams.get(stream_id)
        if state is None or state.is_finished:
            return
        state.is_finished = state.is_discarding = True
        self._output.append(encode_frame(Kind.FIN, stream_id))
        self.consume(stream_id, state.unconsumed - state.cost)
        self._forget_if_done(stream_id, state)

    def fail(self, stream_id: int, error: bytes) -> None:
        """Send ERR, drop what waits on the stream and forget it (0: tell the peer why the connection ends)."""
        state = self._streams.pop(stream_id, None)
        if state is not None:
            self._release(state.unconsumed)
        if state is not None or stream_id == 0:
            self._output.append(encode_frame(Kind.ERR, stream_id, error))

    def consume(self, stream_id: int, cost: int) -> None:
        """The application has taken messages worth `cost`; gives credit back to the peer now and then."""
        self._release(cost)
        state = self._streams.get(stream_id)
        if state is None or not cost:
            return
        state.unconsumed -= cost
        state.returned += cost
        if state.returned >= state.window // 4 and not state.is_peer_finished:
            self._output.append(
                encode_frame(Kind.CREDIT, stream_id, min(state.returned, MAX_STREAM_ID).to_bytes(4, "big"))
            )
            state.returned = 0

    def close(self) -> None:
        """The connection is over: nothing waits on it any more."""
        self._streams.clear()
        self._release(self.num_buffered)

    def has(self, stream_id: int) -> bool:
        """Whether the stream is still known, that is, not finished on both sides and not failed."""
        return stream_id in self._streams

    @property
    def num_streams(self) -> int:
        """Streams that are open, on either side's initiative."""
        return len(self._streams)

    def is_ours(self, stream_id: int) -> bool:
        """Whether a stream of this id is one that this side opens."""
        return stream_id % 2 == self._next_id % 2

    # --- one method per kind of frame ---

    def _on_hello(self, frame: Frame, events: list[Event]) -> None:
        if frame.kind != Kind.HELLO or not frame.meta.startswith(HELLO_PREFIX):
            raise PeerMisbehaved(f"{Kind(frame.kind).name} before HELLO")
        version = int.from_bytes(frame.meta[len(HELLO_PREFIX) : _HELLO_BYTES], "big")
        if version != self.version:
            raise ProtocolMismatch(f"the peer speaks protocol version {version}, we speak {self.version}")
        self.is_greeted = True
        events.append(Greeted(frame.meta[_HELLO_BYTES:]))

    def _on_second_hello(self, frame: Frame, events: list[Event], now: float) -> None:
        raise PeerMisbehaved("second HELLO")

    def _on_open(self, frame: Frame, events: list[Event], now: float) -> None:
        if self.is_ours(frame.stream_id) or frame.stream_id <= self._last_peer_id:
            raise PeerMisbehaved(f"OPEN of stream {frame.stream_id} after {self._last_peer_id}")
        try:
            service = frame.meta.decode()
        except UnicodeDecodeError as error:
            raise PeerMisbehaved("OPEN of a service whose name is not UTF-8") from error
        self._last_peer_id = frame.stream_id
        self._streams[frame.stream_id] = _State(self._limits.window_of(service))
        events.append(Opened(frame.stream_id, service))

    def _on_data(self, frame: Frame, events: list[Event], now: float) -> None:
        state = self._state(frame)
        if state is None:
            return
        if state.is_peer_finished:
            raise PeerMisbehaved(f"DATA after FIN on stream {frame.stream_id}")
        self._account(frame, state)
        has_more = frame.flags & FLAG_MORE
        if state.meta is None and not has_more:  # the usual case: a message in one frame
            cost, state.cost, body, meta = state.cost, 0, frame.body, frame.meta
        else:
            if state.meta is not None and frame.meta:
                raise PeerMisbehaved(f"meta in a later piece of a message on stream {frame.stream_id}")
            state.meta = frame.meta if state.meta is None else state.meta
            if not state.is_discarding:
                state.body += frame.body
            if has_more:
                return self._check_buffered(frame.stream_id, events)
            cost, body, meta = state.cost, state.body, state.meta
            state.cost, state.body, state.meta = 0, bytearray(), None
        if state.is_discarding:
            return self.consume(frame.stream_id, cost)
        events.append(Received(frame.stream_id, meta, body, cost))
        self._check_buffered(frame.stream_id, events)

    def _account(self, frame: Frame, state: _State) -> None:
        """Check a DATA frame against the window and the message limit, and count it."""
        if state.meta is None:
            if state.unconsumed + state.returned >= state.window:
                raise PeerMisbehaved(
                    f"message on stream {frame.stream_id} without credit: {state.unconsumed + state.returned} units "
                    f"are not given back, window {state.window}"
                )
            state.cost = MESSAGE_COST
            state.unconsumed += MESSAGE_COST
            self._release(-MESSAGE_COST)
        size = len(frame.meta) + len(frame.body)
        state.cost += size
        state.unconsumed += size
        self._release(-size)
        if state.cost - MESSAGE_COST > self._limits.max_message_bytes:
            raise PeerMisbehaved(
                f"message of over {state.cost - MESSAGE_COST} bytes, limit {self._limits.max_message_bytes}"
            )

    def _check_buffered(self, stream_id: int, events: list[Event]) -> None:
        """Refuse the stream that fills the buffers of this connection."""
        if self.num_buffered > self._limits.max_buffered_bytes or self._budget.used > self._budget.limit:
            error = error_to_wire(
                PeerBusy(
                    f"{self.num_buffered} bytes wait on this connection, limit {self._limits.max_buffered_bytes}; "
                    f"{self._budget.used} on all, limit {self._budget.limit}"
                )
            )
            self.fail(stream_id, error)
            events.append(Refused(stream_id, error))

    def _on_fin(self, frame: Frame, events: list[Event], now: float) -> None:
        state = self._state(frame)
        if state is None:
            return
        if state.is_peer_finished or state.meta is not None:
            raise PeerMisbehaved(f"FIN on stream {frame.stream_id} in the middle of a message or after FIN")
        state.is_peer_finished = True
        events.append(Finished(frame.stream_id))
        self._forget_if_done(frame.stream_id, state)

    def _on_err(self, frame: Frame, events: list[Event], now: float) -> None:
        if frame.stream_id == 0:
            events.append(Failed(0, frame.meta))
        elif (state := self._state(frame)) is not None:
            self._forget(frame.stream_id, state)
            events.append(Failed(frame.stream_id, frame.meta))

    def _on_credit(self, frame: Frame, events: list[Event], now: float) -> None:
        state = self._state(frame)
        if state is None:
            return
        state.credit += int.from_bytes(frame.meta, "big")
        if state.credit > state.window:
            raise PeerMisbehaved(f"credit of {state.credit} on stream {frame.stream_id}, window {state.window}")
        events.append(Credited(frame.stream_id))

    def _on_ping(self, frame: Frame, events: list[Event], now: float) -> None:
        if not self._pings.charge("", now):
            raise PeerMisbehaved(f"more than {self._limits.ping_rate.per_s:g} PINGs per second")
        self._output.append(encode_frame(Kind.PONG, 0, frame.meta))

    def _on_pong(self, frame: Frame, events: list[Event], now: float) -> None:
        if self._ping_sent is not None:
            self.rtt_s, self._ping_sent = now - self._ping_sent, None

    def _state(self, frame: Frame) -> _State | None:
        """The stream of a frame; None for one that is over."""
        state = self._streams.get(frame.stream_id)
        if state is None:
            last = self._next_id - 2 if self.is_ours(frame.stream_id) else self._last_peer_id
            if frame.stream_id > last:
                raise PeerMisbehaved(f"{Kind(frame.kind).name} on stream {frame.stream_id}, which was never opened")
        return state

    def _forget_if_done(self, stream_id: int, state: _State) -> None:
        if state.is_finished and state.is_peer_finished:
            self._forget(stream_id, state)

    def _forget(self, stream_id: int, state: _State) -> None:
        """The stream is over; whole messages that wait are still to be consumed, a piece of one is not."""
        del self._streams[stream_id]
        self._release(state.cost)

    def _release(self, num_bytes: int) -> None:
        self.num_buffered -= num_bytes
        self._budget.used -= num_bytes
