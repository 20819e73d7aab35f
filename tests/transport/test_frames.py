"""Frames: any split of the bytes gives the same frames, and any garbage a misbehaving peer."""

import struct
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.errors import PeerMisbehaved
from swarm.transport.frames import (
    FLAG_MORE,
    HEADER_BYTES,
    HELLO_PREFIX,
    MAGIC,
    MAX_FRAGMENT_BYTES,
    Frame,
    FrameDecoder,
    Kind,
    encode_frame,
)

stream_ids = st.integers(1, (1 << 32) - 1)
nothing = st.just(bytearray())


def frames_of(
    kind: Kind, stream_id: st.SearchStrategy[int], meta: st.SearchStrategy[bytes]
) -> st.SearchStrategy[Frame]:
    """Frames without flags and body."""
    return st.builds(Frame, st.just(kind), st.just(0), stream_id, meta, nothing)


frames = st.one_of(
    frames_of(Kind.HELLO, st.just(0), st.binary(max_size=64).map(lambda ticket: b"swarm\0\1" + ticket)),
    frames_of(Kind.OPEN, stream_ids, st.binary(min_size=1, max_size=64)),
    st.builds(
        Frame, st.just(Kind.DATA), st.sampled_from([0, FLAG_MORE]), stream_ids, st.binary(), st.binary().map(bytearray)
    ),
    frames_of(Kind.FIN, stream_ids, st.just(b"")),
    frames_of(Kind.ERR, st.integers(0, 9), st.binary()),
    frames_of(Kind.CREDIT, stream_ids, st.binary(min_size=4, max_size=4)),
    frames_of(Kind.PING, st.just(0), st.binary(min_size=8, max_size=8)),
    frames_of(Kind.PONG, st.just(0), st.binary(min_size=8, max_size=8)),
)


def encode(frame: Frame) -> bytes:
    """A frame as bytes."""
    head = encode_frame(
        Kind(frame.kind), frame.stream_id, frame.meta, flags=frame.flags, num_body_bytes=len(frame.body)
    )
    return head + bytes(frame.body)


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 600), max_size=20))
def test_any_split_gives_the_same_frames(sent: list[Frame], cuts: list[int]):
    """However the byte stream is cut, the frames come out whole and in order."""
    data = b"".join(encode(frame) for frame in sent)
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder = FrameDecoder()
    received = [frame for start, end in pairwise(bounds) for frame in decoder.feed(data[start:end])]
    assert received == sent


def test_byte_by_byte_is_a_split_too():
    """The slowest sender of all is understood."""
    data = encode(Frame(Kind.DATA, 0, 3, b"meta", bytearray(b"body")))
    decoder = FrameDecoder()
    assert [len(decoder.feed(bytes([byte]))) for byte in data] == [0] * (len(data) - 1) + [1]


@given(st.lists(st.binary(max_size=100), max_size=20))
@example([struct.pack("!BBHIII", MAGIC, 2, 0, 1, 0, 1 << 31)])
def test_garbage_is_a_misbehaving_peer_and_nothing_else(chunks: list[bytes]):
    """Random bytes either wait to become a frame or raise PeerMisbehaved."""
    decoder = FrameDecoder()
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except PeerMisbehaved:
        pass


@given(st.integers(0, 255), st.integers(0, 65535), st.integers(0, 1), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_random_headers_are_judged_before_their_content_comes(
    kind: int, flags: int, stream_id: int, meta: int, body: int
):
    """A header alone decides: what it may announce is bounded, whatever the rest would have been."""
    decoder = FrameDecoder()
    try:
        decoder.feed(struct.pack("!BBHIII", MAGIC, kind, flags, stream_id, meta, body))
    except PeerMisbehaved:
        return
    assert kind <= 7 and meta <= 1 << 18 and body <= MAX_FRAGMENT_BYTES


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ((0x54, 2, 0, 1, 0, 0), "0x5402 do not start a frame"),
        ((MAGIC, 8, 0, 1, 0, 0), "0x5308 do not start a frame"),
        ((MAGIC, Kind.DATA, 0, 1, 0, MAX_FRAGMENT_BYTES + 1), "body of 262145 bytes, limit 262144"),
        ((MAGIC, Kind.DATA, 0, 1, (1 << 18) + 1, 0), "262145 bytes of meta"),
        ((MAGIC, Kind.DATA, 2, 1, 0, 0), "unknown flags 0x0002"),
        ((MAGIC, Kind.DATA, 0, 0, 0, 0), "DATA on stream 0"),
        ((MAGIC, Kind.OPEN, 0, 1, 0, 0), "OPEN with 0 bytes of meta"),
        ((MAGIC, Kind.FIN, 0, 1, 0, 5), "FIN with a body of 5 bytes"),
        ((MAGIC, Kind.PING, 0, 7, 8, 0), "PING on stream 7"),
        ((MAGIC, Kind.HELLO, 0, 0, 100, 0), "HELLO with 100 bytes"),
        ((MAGIC, Kind.CREDIT, 0, 1, 5, 0), "CREDIT with 5 bytes"),
    ],
)
def test_each_rule_is_checked_on_the_header(header: tuple[int, ...], reason: str):
    """The error names the kind, the size and the limit."""
    with pytest.raises(PeerMisbehaved, match=reason):
        FrameDecoder().feed(struct.pack("!BBHIII", *header))


def test_a_header_takes_sixteen_bytes():
    """The layout that docs/protocol.md describes."""
    data = encode_frame(Kind.DATA, 0x01020304, b"meta", flags=FLAG_MORE, num_body_bytes=0x50)
    assert data == bytes.fromhex("5302 0001 01020304 00000004 00000050") + b"meta"
    assert len(data) - 4 == HEADER_BYTES and HELLO_PREFIX == b"swarm"


def test_content_does_not_keep_the_receive_buffer_alive():
    """A small message copied out of a large chunk is small."""
    chunk = encode(Frame(Kind.DATA, 0, 1, b"m", bytearray(b"b"))) + encode(
        Frame(Kind.DATA, 0, 1, b"", bytearray(200_000))
    )
    small, _ = FrameDecoder().feed(chunk)
    assert isinstance(small.meta, bytes) and isinstance(small.body, bytearray) and len(small.body) == 1
