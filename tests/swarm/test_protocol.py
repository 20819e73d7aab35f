"""Messages and errors survive the wire, and nothing hostile gets through."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import protocol
from swarm.errors import InvalidRequest, PeerBusy, PeerError, PeerMisbehaved, ProtocolMismatch, RouteNotFound
from swarm.protocol import DType, OpenSession, Step, TensorSpec, decode, encode, error_from_wire, error_to_wire

STEP = Step(
    step_id=7,
    positions=(5, 0),
    num_tokens=(1, 2),
    num_outputs=(1, 1),
    order=None,
    hidden_states=TensorSpec(DType.BFLOAT16, (3, 576)),
)


def test_a_message_survives_the_wire():
    """What was encoded is decoded, in few bytes."""
    assert decode(encode(STEP)) == STEP
    assert len(encode(STEP)) < 40


@given(st.binary(max_size=200))
def test_garbage_is_the_peers_fault(data):
    """Any bytes give a message or PeerMisbehaved, and never another exception."""
    with contextlib.suppress(PeerMisbehaved):
        assert isinstance(decode(data), protocol.Message)
    assert isinstance(error_from_wire(data, peer_id="p"), Exception)


@given(st.binary(min_size=1, max_size=4), st.integers(0, 30))
def test_a_damaged_message_never_raises_anything_else(noise, offset):
    """Flipping bytes in a valid message gives a checked message or PeerMisbehaved."""
    data = bytearray(encode(STEP))
    offset = min(offset, len(data) - 1)
    data[offset : offset + len(noise)] = noise
    with contextlib.suppress(PeerMisbehaved):
        decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        [5, 7, [5], [1], [1], None, [2, [1 << 17, 576], 0]],
        [5, 7, [5], [1], [1], None, [2, [1, 1 << 21], 0]],
        [5, 7, [-1], [1], [1], None, [2, [1, 576], 0]],
        [5, 7, [5], [1], [1], None, [9, [1, 576], 0]],
        [5, 7, [0] * 1025, [1], [1], None, [2, [1, 576], 0]],
        [5, 7, [], [], [], None, [2, [1, 576], 0]],
        [99, 1],
    ],
)
def test_values_out_of_range_are_refused(fields):
    """Sizes, positions, dtypes and row counts beyond the limits never become a message."""
    import msgspec

    with pytest.raises(PeerMisbehaved, match="malformed"):
        decode(msgspec.msgpack.encode(fields))


def test_an_oversized_message_is_refused_before_it_is_parsed():
    """A message longer than the limit is not looked at."""
    with pytest.raises(PeerMisbehaved, match="limit"):
        decode(b"\x00" * (protocol.MAX_META_BYTES + 1))


def test_an_empty_block_range_is_refused():
    """OpenSession's own range check is that of BlockRange."""
    message = OpenSession(session_id=b"0" * 16, model="a" * 64, start=4, end=4, batch_size=1, max_length=5)
    with pytest.raises(InvalidRequest, match="4:4 is empty"):
        _ = message.blocks


def test_errors_keep_their_class_across_the_wire():
    """The caller sees whose fault it was, and when a busy peer wants it back."""
    busy = error_from_wire(error_to_wire(PeerBusy("full", retry_after_s=2.5)), peer_id="p")
    assert isinstance(busy, PeerBusy) and busy.retry_after_s == 2.5 and busy.peer_id == "p"
    assert isinstance(error_from_wire(error_to_wire(ProtocolMismatch("v2")), peer_id="p"), ProtocolMismatch)
    assert type(error_from_wire(error_to_wire(RouteNotFound("none")), peer_id="p")) is PeerError
