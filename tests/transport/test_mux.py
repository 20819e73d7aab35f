"""The state of a connection: two muxes on a wire that cuts bytes anywhere, rules, flow control, heartbeats."""

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerBusy, PeerMisbehaved, PeerTimeout, ProtocolMismatch
from swarm.protocol import CIRCUIT_SERVICE, RELAY_SERVICE, error_from_wire
from swarm.transport.events import Credited, Event, Failed, Finished, Greeted, Opened, Received, Refused
from swarm.transport.frames import MAX_FRAGMENT_BYTES, Kind, encode_frame
from swarm.transport.limits import Budget, Limits
from swarm.transport.mux import MESSAGE_COST, Mux

LIMITS = Limits(window_bytes=4000, max_message_bytes=6000, max_buffered_bytes=20000)


def make_pair(limits: Limits = LIMITS, **options: object) -> tuple[Mux, Mux]:
    """Two muxes that have greeted each other."""
    dialler = Mux(is_dialler=True, limits=limits, now=0.0, **options)  # type: ignore[arg-type]
    acceptor = Mux(is_dialler=False, limits=limits, now=0.0)
    for sender, receiver in ((dialler, acceptor), (acceptor, dialler)):
        events = receiver.receive(sender.take_output(), 0.0)
        assert len(events) == 1 and isinstance(events[0], Greeted)
    return dialler, acceptor


def send(mux: Mux, stream_id: int, meta: bytes, body: bytes = b"", *, piece: int = MAX_FRAGMENT_BYTES) -> bytes:
    """A whole message as bytes, behind the control frames that wait."""
    mux.start_message(stream_id, len(meta) + len(body))
    pieces = [body[i : i + piece] for i in range(0, len(body), piece)] or [b""]
    data = mux.take_output()
    for index, part in enumerate(pieces):
        has_more = index + 1 < len(pieces)
        data += mux.encode_data(stream_id, b"" if index else meta, len(part), has_more=has_more) + part
    return data


def pump(sender: Mux, receiver: Mux, now: float = 0.0) -> list[Event]:
    """Carry the control frames over."""
    return receiver.receive(sender.take_output(), now)


def test_a_stream_lives_from_open_to_both_fins():
    """OPEN, DATA both ways, FIN both ways: the events come in order and nothing is left."""
    dialler, acceptor = make_pair()
    stream = dialler.open("echo")
    assert pump(dialler, acceptor) == [Opened(stream, "echo")]
    assert acceptor.receive(send(dialler, stream, b"ask", b"body"), 0.0) == [
        Received(stream, b"ask", bytearray(b"body"), 7 + 256)
    ]
    acceptor.consume(stream, 263)
    assert dialler.receive(send(acceptor, stream, b"answer"), 0.0)[0].meta == b"answer"  # type: ignore[union-attr]
    dialler.finish(stream)
    assert pump(dialler, acceptor) == [Finished(stream)]
    acceptor.finish(stream)
    assert pump(acceptor, dialler) == [Finished(stream)]
    assert not dialler.has(stream) and not acceptor.has(stream)
    assert dialler.num_buffered == acceptor.num_buffered == 0


def test_both_sides_open_streams_of_their_own():
    """The dialler's ids are odd, the acceptor's even."""
    dialler, acceptor = make_pair()
    assert [dialler.open("a"), dialler.open("a")] == [1, 3]
    assert [acceptor.open("b"), acceptor.open("b")] == [2, 4]
    assert len(pump(dialler, acceptor)) == len(pump(acceptor, dialler)) == 2


def test_an_error_ends_the_stream_on_both_sides():
    """ERR carries its bytes; frames that were under way are dropped, without harm."""
    dialler, acceptor = make_pair()
    stream = dialler.open("echo")
    pump(dialler, acceptor)
    acceptor.fail(stream, b"reason")
    late = send(dialler, stream, b"late")
    assert pump(acceptor, dialler) == [Failed(stream, b"reason")]
    assert acceptor.receive(late, 0.0) == []
    assert not dialler.has(stream) and acceptor.num_buffered == 0


def test_what_comes_after_our_fin_is_dropped_and_credited():
    """A peer that still sends is not blocked by our lack of interest."""
    dialler, acceptor = make_pair()
    stream = dialler.open("stream")
    pump(dialler, acceptor)
    acceptor.receive(send(dialler, stream, b"unread", bytes(3000)), 0.0)
    acceptor.finish(stream)
    assert Credited(stream) in pump(acceptor, dialler)
    for _ in range(20):
        assert dialler.may_send(stream)
        assert acceptor.receive(send(dialler, stream, b"more", bytes(3000)), 0.0) == []
        pump(acceptor, dialler)
    assert acceptor.num_buffered == 0


def test_credit_stops_a_sender_until_the_receiver_consumes():
    """The window bounds what waits at the receiver; consuming opens it again."""
    dialler, acceptor = make_pair()
    stream = dialler.open("stream")
    pump(dialler, acceptor)
    received = []
    while dialler.may_send(stream):
        received += acceptor.receive(send(dialler, stream, b"m", bytes(999)), 0.0)
    assert len(received) == 4 and acceptor.num_buffered <= LIMITS.window_bytes + 1256
    for event in received:
        assert isinstance(event, Received)
        acceptor.consume(stream, event.cost)
    assert Credited(stream) in pump(acceptor, dialler) and dialler.may_send(stream)


def test_a_sender_without_credit_is_misbehaving():
    """A peer that ignores the window is found out at its next message."""
    dialler, acceptor = make_pair()
    stream = dialler.open("stream")
    pump(dialler, acceptor)
    acceptor.receive(send(dialler, stream, b"m", bytes(4000)), 0.0)
    assert not dialler.may_send(stream)
    with pytest.raises(PeerMisbehaved, match="without credit: 4257 units are not given back, window 4000"):
        acceptor.receive(send(dialler, stream, b"m"), 0.0)


def test_a_message_in_pieces_is_put_together_and_bounded():
    """Pieces of two streams may alternate; a message above the limit is refused when it passes it."""
    dialler, acceptor = make_pair()
    first, second = dialler.open("a"), dialler.open("b")
    pump(dialler, acceptor)
    a, b = (send(dialler, s, b"meta", bytes([s]) * 3000, piece=1000) for s in (first, second))
    size_a, size_b = 16 + 4 + 1000, 16 + 1000
    mixed = b"".join(
        (a[:size_a], b[:size_a], a[size_a : size_a + size_b], b[size_a : size_a + size_b], a[-size_b:], b[-size_b:])
    )
    assert [event.body for event in acceptor.receive(mixed, 0.0)] == [bytes([s]) * 3000 for s in (1, 3)]  # type: ignore[union-attr]
    dialler, acceptor = make_pair()
    stream = dialler.open("a")
    pump(dialler, acceptor)
    with pytest.raises(PeerMisbehaved, match=r"message of over \d+ bytes, limit 6000"):
        acceptor.receive(send(dialler, stream, b"", bytes(7000), piece=1000), 0.0)


def test_a_connection_that_fills_its_buffers_loses_the_stream_that_does():
    """Many streams within their windows can still be too much together: the last one is refused as busy."""
    dialler, acceptor = make_pair()
    events: list[Event] = []
    for _ in range(5):
        stream = dialler.open("s")
        pump(dialler, acceptor)
        events += acceptor.receive(send(dialler, stream, b"", bytes(4000)), 0.0)
    refused = events[-1]
    assert isinstance(refused, Refused)
    assert isinstance(error_from_wire(refused.error, peer_id=None), PeerBusy)
    assert acceptor.num_buffered <= LIMITS.max_buffered_bytes
    assert pump(acceptor, dialler) == [Failed(refused.stream_id, refused.error)]


def test_connections_share_a_budget():
    """A budget that others have used up leaves no room here."""
    budget = Budget(limit=10_000, used=9_000)
    dialler, _ = make_pair()
    acceptor = Mux(is_dialler=False, limits=LIMITS, now=0.0, budget=budget)
    acceptor.receive(Mux(is_dialler=True, limits=LIMITS, now=0.0).take_output(), 0.0)
    stream = dialler.open("s")
    pump(dialler, acceptor)
    assert isinstance(acceptor.receive(send(dialler, stream, b"", bytes(3000)), 0.0)[-1], Refused)
    assert budget.used == 9_000
    acceptor.close()
    assert budget.used == 9_000


HELLO = encode_frame(Kind.HELLO, 0, b"swarm\0\1")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HELLO, "second HELLO"),
        (encode_frame(Kind.DATA, 7), "DATA on stream 7, which was never opened"),
        (encode_frame(Kind.DATA, 2), "DATA on stream 2, which was never opened"),
        (encode_frame(Kind.OPEN, 2, b"s"), "OPEN of stream 2"),
        (encode_frame(Kind.OPEN, 3, b"s") + encode_frame(Kind.OPEN, 1, b"s"), "OPEN of stream 1 after 3"),
        (encode_frame(Kind.OPEN, 1, b"\xff"), "not UTF-8"),
        (encode_frame(Kind.OPEN, 1, b"s") + encode_frame(Kind.CREDIT, 1, b"\0\0\0\1"), "credit of 4001"),
        (encode_frame(Kind.OPEN, 1, b"s") + 2 * encode_frame(Kind.FIN, 1), "after FIN"),
        (encode_frame(Kind.OPEN, 1, b"s") + encode_frame(Kind.FIN, 1) + encode_frame(Kind.DATA, 1), "DATA after FIN"),
        (
            encode_frame(Kind.OPEN, 1, b"s") + encode_frame(Kind.DATA, 1, flags=1) + encode_frame(Kind.FIN, 1),
            "middle of a message",
        ),
        (
            encode_frame(Kind.OPEN, 1, b"s") + encode_frame(Kind.DATA, 1, flags=1) + encode_frame(Kind.DATA, 1, b"x"),
            "meta in a later piece",
        ),
    ],
)
def test_a_broken_rule_is_named(data: bytes, reason: str):
    """Out-of-order frames are the peer's fault, and say what it did."""
    _, acceptor = make_pair()
    with pytest.raises(PeerMisbehaved, match=reason):
        acceptor.receive(data, 0.0)


def test_nothing_comes_before_hello():
    """The first frame must be HELLO, with our prefix."""
    for data in (encode_frame(Kind.PING, 0, bytes(8)), encode_frame(Kind.HELLO, 0, b"other\0\1")):
        with pytest.raises(PeerMisbehaved, match="before HELLO"):
            Mux(is_dialler=False, limits=LIMITS, now=0.0).receive(data, 0.0)


def test_versions_must_match_on_both_sides():
    """Each side learns from the other's HELLO that they can't talk, with both numbers."""
    old = Mux(is_dialler=True, limits=LIMITS, now=0.0, version=1)
    new = Mux(is_dialler=False, limits=LIMITS, now=0.0, version=2)
    from_old, from_new = old.take_output(), new.take_output()
    with pytest.raises(ProtocolMismatch, match="version 1, we speak 2"):
        new.receive(from_old, 0.0)
    with pytest.raises(ProtocolMismatch, match="version 2, we speak 1"):
        old.receive(from_new, 0.0)


@given(st.lists(st.binary(max_size=60), max_size=10), st.booleans())
def test_garbage_is_a_misbehaving_peer_and_nothing_else(chunks: list[bytes], is_greeted: bool):
    """Random bytes, before or after HELLO, never raise anything else."""
    mux = make_pair()[1] if is_greeted else Mux(is_dialler=False, limits=LIMITS, now=0.0)
    try:
        for chunk in chunks:
            mux.receive(chunk, 0.0)
    except PeerMisbehaved:
        pass


frames = st.builds(
    lambda kind, stream_id, meta, more: encode_frame(kind, stream_id, meta, flags=more if kind == Kind.DATA else 0),
    st.sampled_from(Kind),
    st.integers(0, 6),
    st.one_of(st.sampled_from([b"", b"meta", bytes(8), b"\0\0\0\1", b"swarm\0\1"]), st.binary(max_size=10)),
    st.integers(0, 1),
)


@given(st.lists(frames, max_size=30))
def test_any_order_of_frames_is_survived(data: list[bytes]):
    """Valid frames in any order are understood or are the peer's fault; accounts stay balanced."""
    _, mux = make_pair()
    mux.open("ours")
    received = []
    try:
        for frame in data:
            received += mux.receive(frame, 0.0)
    except PeerMisbehaved:
        pass
    for event in received:
        if isinstance(event, Received):
            mux.consume(event.stream_id, event.cost)
    mux.close()
    assert mux.num_buffered == 0


class Wire:
    """One direction: bytes in flight, handed over in pieces of random size."""

    def __init__(self, rng: random.Random):
        self.rng, self.data = rng, b""

    def carry(self, receiver: Mux, *, everything: bool) -> list[Event]:
        """Hand over some or all of the bytes."""
        size = len(self.data) if everything else self.rng.randint(0, len(self.data))
        data, self.data = self.data[:size], self.data[size:]
        return receiver.receive(data, 0.0)


@given(st.integers(0, 2**32), st.integers(10, 120))
def test_every_schedule_delivers_every_message_once_and_in_order(seed: int, num_actions: int):
    """Random opens, sends, consumes and cuts on both sides: messages arrive whole, in order, within the window."""
    rng = random.Random(seed)
    muxes, wires = make_pair(replace(LIMITS, max_buffered_bytes=1 << 30)), (Wire(rng), Wire(rng))
    sent: dict[tuple[int, int], list[bytes]] = {}
    got: dict[tuple[int, int], list[bytes]] = {}
    waiting: list[tuple[int, Received]] = []

    def deliver(side: int, *, everything: bool = False) -> None:
        """Take bytes that the other side sent."""
        wires[1 - side].data += muxes[1 - side].take_output()
        for event in wires[1 - side].carry(muxes[side], everything=everything):
            if isinstance(event, Opened):
                sent[side, event.stream_id] = []
            elif isinstance(event, Received):
                got.setdefault((side, event.stream_id), []).append(event.meta + event.body)
                waiting.append((side, event))
        max_waiting = LIMITS.window_bytes + LIMITS.max_message_bytes + 256
        assert muxes[side].num_buffered <= muxes[side].num_streams * max_waiting

    for _ in range(num_actions):
        side, action = rng.randint(0, 1), rng.random()
        if action < 0.1:
            sent[side, muxes[side].open("s")] = []
        elif action < 0.5 and (ours := [key for key in sent if key[0] == side and muxes[side].may_send(key[1])]):
            key = rng.choice(ours)
            message = rng.randbytes(rng.choice([1, 10, 700, 3000]))
            sent[key].append(message)
            wires[side].data += send(muxes[side], key[1], message[:5], message[5:], piece=rng.choice([400, 5000]))
        elif action < 0.7 and waiting:
            at, event = waiting.pop(rng.randrange(len(waiting)))
            muxes[at].consume(event.stream_id, event.cost)
        else:
            deliver(side)
    for side in (0, 1):
        deliver(side, everything=True)
    for at, event in waiting:
        muxes[at].consume(event.stream_id, event.cost)
    assert {(1 - side, stream): messages for (side, stream), messages in sent.items() if messages} == got
    assert muxes[0].num_buffered == muxes[1].num_buffered == 0


def run_clock(mux: Mux, until_s: float, *, peer: Mux | None = None, step_s: float = 0.5) -> None:
    """Tick twice a second, with a peer that answers or without."""
    now = 0.0
    while now < until_s:
        now += step_s
        mux.tick(now)
        if peer is not None:
            mux.receive(peer_answer(mux, peer, now), now)


def peer_answer(mux: Mux, peer: Mux, now: float) -> bytes:
    """What the peer says to what we said."""
    peer.receive(mux.take_output(), now)
    return peer.take_output()


def test_a_silent_peer_is_noticed_within_five_seconds():
    """PINGs go unanswered for 4 s: the connection is over. An answering peer stays."""
    dialler, _ = make_pair()
    with pytest.raises(PeerTimeout, match=r"silent for 4\.5 s, limit 4 s"):
        run_clock(dialler, 10.0)
    dialler, acceptor = make_pair()
    run_clock(dialler, 60.0, peer=acceptor)
    assert dialler.rtt_s == 0.0


def test_a_busy_connection_sends_no_pings():
    """Data from the peer is a sign of life by itself."""
    dialler, acceptor = make_pair()
    stream = dialler.open("s")
    pump(dialler, acceptor)
    for tick in range(1, 20):
        acceptor.receive(send(dialler, stream, b"m"), tick / 4)
        acceptor.tick(tick / 4)
        acceptor.consume(stream, 257)
    assert Kind.PING not in {frame[1] for frame in [acceptor.take_output()] if frame}


def test_our_own_standstill_is_not_blamed_on_the_peer():
    """A process that was stopped for a minute gives its peers their time again."""
    dialler, acceptor = make_pair()
    dialler.tick(0.5)
    dialler.tick(60.0)
    assert acceptor.receive(dialler.take_output(), 60.0) == []
    for step in range(9):
        dialler.tick(60.0 + step / 2)
    with pytest.raises(PeerTimeout, match="silent"):
        dialler.tick(64.5)


def test_a_peer_that_never_says_hello_is_dropped():
    """Half-open and slow connections end at the deadline, however slowly their bytes come."""
    mux = Mux(is_dialler=False, limits=LIMITS, now=0.0)
    for step in range(11):
        mux.receive(HELLO[step : step + 1], step / 2)
        mux.tick(step / 2)
    with pytest.raises(PeerTimeout, match="no HELLO within 5 s"):
        mux.tick(5.5)


def test_events_are_frozen():
    """Events are values."""
    with pytest.raises(AttributeError):
        Opened(1, "s").service = "other"  # type: ignore[misc]
    assert msgspec.structs.asdict(Finished(3)) == {"stream_id": 3}
    assert replace(LIMITS, window_bytes=1).window_bytes == 1


def test_streams_through_relays_have_a_narrow_window_on_both_sides():
    """What waits at a relay is little; who sends beyond it breaks the rules."""
    limits = replace(LIMITS, window_bytes=4000, narrow_window_bytes=1000)
    for service, window in (("echo", 4000), (RELAY_SERVICE, 1000), (CIRCUIT_SERVICE, 1000)):
        dialler, acceptor = make_pair(limits)
        stream_id, num_sent = dialler.open(service), 0
        while dialler.may_send(stream_id):
            acceptor.receive(send(dialler, stream_id, b"", bytes(100)), 0.0)
            num_sent += 1
        assert num_sent == -(-window // (100 + MESSAGE_COST))
        with pytest.raises(PeerMisbehaved, match=f"window {window}"):
            acceptor.receive(send(dialler, stream_id, b"", bytes(100)), 0.0)
