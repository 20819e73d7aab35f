"""Messages and errors survive the wire, nothing hostile gets through, and the bytes are those of docs/protocol.md."""

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import protocol
from swarm.errors import InvalidRequest, PeerBusy, PeerError, PeerMisbehaved, ProtocolMismatch, RouteNotFound
from swarm.protocol import (
    AdapterLoading,
    AdapterOffer,
    AdapterPart,
    AdapterRequest,
    AskOffer,
    CircuitBytes,
    CircuitGreeting,
    CircuitOpened,
    Contribution,
    DialBack,
    DialedBack,
    DirectOffer,
    DType,
    Encoding,
    FederatedBallot,
    Forward,
    Forwarding,
    HandedOver,
    HandOver,
    HopTrace,
    Info,
    InfoRequest,
    LinkDown,
    LinkFault,
    Message,
    MoveAway,
    OpenCircuit,
    OpenSession,
    OpenTraining,
    Probe,
    ProbeResult,
    PushAccepted,
    PushHello,
    Reserve,
    Reserved,
    SentState,
    SessionOpened,
    SessionState,
    StatePart,
    StateTaken,
    Step,
    StepResult,
    TensorSpec,
    TrainBackward,
    TrainForget,
    TrainForward,
    TrainGradients,
    TrainingOpened,
    TrainLink,
    TrainLinked,
    TrainLost,
    TrainOutputs,
    TrainParameters,
    Waiting,
    decode,
    encode,
    error_from_wire,
    error_to_wire,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"

STEP = Step(
    step_id=7,
    order=None,
    base=(5, 0),
    positions=(5, 0),
    num_tokens=(1, 2),
    outputs_from=(5, 1),
    hidden_states=TensorSpec(DType.BFLOAT16, (3, 576)),
)
TRACE = (HopTrace(queue_us=10, compute_us=2000, batch_tokens=3, link_us=500),)
OPEN = OpenSession(
    session_id=b"s" * 16,
    push_key=b"k" * 16,
    model="a" * 64,
    start=0,
    end=4,
    batch_size=1,
    max_length=5,
    is_last=False,
)
STATE = SessionState(
    start=0,
    end=4,
    dtype=DType.FLOAT32,
    lengths=(5, 2),
    num_pages=2,
    cache_bytes=1 << 20,
    step_id=7,
    received=(5, 2),
    outputs_from=(4, 1),
    order=None,
    base=None,
    sent=SentState(
        step_id=7,
        order=(1, 0),
        base=(4, 1),
        outputs_from=(4, 1),
        starts=(0, 2),
        ends=(5, 2),
        dtype=DType.BFLOAT16,
        encoding=Encoding.RAW,
    ),
)
MESSAGES: list[Message] = [
    InfoRequest(),
    Info(
        model="a" * 64,
        model_name="m",
        start=0,
        end=4,
        state=2,
        version="1",
        dtype="float32",
        quantization="",
        num_sessions=1,
        kv_free_tokens=2,
        kv_total_tokens=3,
    ),
    OPEN,
    SessionOpened(max_step_tokens=1024, can_rollback=True),
    STEP,
    StepResult(
        step_id=7, positions=(5, 1), num_tokens=(1, 1), hidden_states=TensorSpec(DType.FLOAT32, (2, 576)), trace=TRACE
    ),
    Forward(epoch=3, peer_id="12D3KooW", push_key=b"k" * 16, held=(5, 0), as_of=-1, max_step_tokens=1024),
    Forwarding(epoch=3),
    LinkDown(epoch=3, fault=LinkFault.HISTORY_LOST, text="gone"),
    PushHello(push_key=b"k" * 16),
    PushAccepted(),
    Waiting(step_id=7, expected_s=1.5),
    Probe(nonce=9),
    ProbeResult(nonce=9, step_id=-1, received=(5, 0), produced=(0, 0), is_waiting=False),
    OpenTraining(push_key=bytes(range(16)), model="a" * 64, start=0, end=4),
    TrainingOpened(max_tokens=8192, good_tokens=128),
    TrainParameters(base=2, version=3, digest="a" * 64, manifest_bytes=200),
    TrainForward(
        micro_batch=5, version=-1, num_tokens=(2, 1), keep=True, hidden_states=TensorSpec(DType.FLOAT32, (3, 576))
    ),
    TrainOutputs(micro_batch=5, is_kept=True, hidden_states=TensorSpec(DType.FLOAT32, (3, 576))),
    TrainOutputs(micro_batch=5, is_kept=True, hidden_states=None),
    TrainBackward(micro_batch=5, gradients=TensorSpec(DType.FLOAT32, (3, 576)), wants_inputs=False),
    TrainGradients(micro_batch=5, gradients=TensorSpec(DType.FLOAT32, (3, 576)), num_parameters=4096),
    TrainGradients(micro_batch=5, gradients=None, num_parameters=4096),
    TrainLost(micro_batch=5),
    TrainForget(micro_batches=(4, 5), versions=(2,)),
    TrainLink(peer_id="12D3KooW", push_key=bytes(range(16))),
    TrainLinked(fault="gone"),
    AdapterRequest(digest="d" * 64, with_manifest=True, blocks=(0, 1)),
    AdapterOffer(digest="d" * 64),
    AdapterPart(block=None, offset=0, num_bytes=100),
    AdapterLoading(num_bytes=10, total_bytes=100),
    MoveAway(within_s=30.0),
    HandOver(nonce=4, peer_id="12D3KooW", push_key=b"k" * 16),
    HandedOver(nonce=4, is_done=False, text="no room"),
    STATE,
    StatePart(offset=0),
    StateTaken(step_id=7, received=(5, 2)),
    Reserve(),
    Reserved(max_circuits=64),
    OpenCircuit(peer_id="12D3KooW", is_call_back=False),
    CircuitOpened(peer_id="12D3KooW", is_call_back=True),
    CircuitGreeting(fingerprint=bytes(32), nonce=bytes(range(32)), signature=bytes(64)),
    CircuitBytes(),
    DialBack(port=1, fingerprint=bytes(32), control_port=65535),
    DialedBack(host="192.0.2.7", is_reachable=True),
    AskOffer(),
    DirectOffer(hosts=("192.168.1.7",), port=4001, fingerprint=bytes(32), ticket=bytes(32)),
    FederatedBallot(
        run="a" * 64,
        round=3,
        base="b" * 64,
        contributions=(Contribution("12D3", "d" * 64, 100, bytes(64)),),
        is_final=False,
        head_round=4,
        head_base="c" * 64,
    ),
]
by_name = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


@by_name
def test_a_message_survives_the_wire(message: Message) -> None:
    """What was encoded is decoded."""
    assert decode(encode(message)) == message


def test_every_message_is_in_the_list_above() -> None:
    """A new message can't be forgotten by these tests."""
    assert {type(message) for message in MESSAGES} == set(protocol.AnyMessage.__args__)


def test_a_decoding_step_takes_few_bytes() -> None:
    """The message beside a token's hidden state is small."""
    assert len(encode(STEP)) < 40


@given(st.binary(max_size=200))
def test_garbage_is_the_peers_fault(data: bytes) -> None:
    """Any bytes give a message or PeerMisbehaved, and never another exception."""
    with contextlib.suppress(PeerMisbehaved):
        assert isinstance(decode(data), protocol.Message)
    assert isinstance(error_from_wire(data, peer_id="p"), Exception)


@given(st.sampled_from(MESSAGES), st.binary(min_size=1, max_size=4), st.integers(0, 200))
def test_a_damaged_message_never_raises_anything_else(message: Message, noise: bytes, offset: int) -> None:
    """Flipping bytes in a valid message gives a checked message or PeerMisbehaved."""
    data = bytearray(encode(message))
    offset = min(offset, len(data) - 1)
    data[offset : offset + len(noise)] = noise
    with contextlib.suppress(PeerMisbehaved):
        decode(data)


@by_name
def test_a_message_with_a_field_too_few_or_too_many_is_refused(message: Message) -> None:
    """Arrays are exact; only the trace of a Step and the last fields of Info and OpenSession may be left out."""
    fields: list[Any] = msgspec.msgpack.decode(encode(message))
    with pytest.raises(PeerMisbehaved, match="malformed"):
        decode(msgspec.msgpack.encode([*fields, 0]))
    if len(fields) > 1 and not isinstance(message, Step | OpenSession | Info):
        with pytest.raises(PeerMisbehaved, match="malformed"):
            decode(msgspec.msgpack.encode(fields[:-1]))


KEY = b"k" * 16
SPEC = [2, [1, 576], 0]


@pytest.mark.parametrize(
    "fields",
    [
        [5, 7, None, [5], [5], [1], [5], [2, [1 << 17, 576], 0], []],
        [5, 7, None, [5], [5], [1], [5], [2, [1, 1 << 21], 0], []],
        [5, 7, None, [5], [5], [1], [5], [9, [1, 576], 0], []],
        [5, 7, None, [5], [-1], [1], [5], SPEC, []],
        [5, 7, [-1], [5], [5], [1], [5], SPEC, []],
        [5, -1, None, [5], [5], [1], [5], SPEC, []],
        [5, 7, None, [5], [5], [1 << 25], [5], SPEC, []],
        [5, 7, None, [0] * 1025, [5], [1], [5], SPEC, []],
        [5, 7, None, [], [], [], [], SPEC, []],
        [5, 7, None, [5], [5], [1], [5], SPEC, [[1, 1, 1, 1]] * 257],
        [5, 7, None, [5], [5], [1], [5], SPEC, [[1, 1, 1]]],
        [5, 7, None, [5], [5], [1], [5], SPEC, [[1, 1, -1, 1]]],
        [7, 1, "p" * 129, KEY, [5], 0, 1],
        [7, 1, "p", b"k" * 15, [5], 0, 1],
        [7, 1, "p", KEY, [], 0, 1],
        [7, 1, "p", KEY, [5], -2, 1],
        [7, 1, "p", KEY, [5], 0, 0],
        [7, 1, "p", KEY, [5], 0, 65537],
        [9, 1, 2, ""],
        [9, 1, 0, "x" * 1025],
        [10, b"k" * 17],
        [12, 1, -0.5],
        [12, 1, float("nan")],
        [14, 1, -2, [1], [1], False],
        [15, "x" * 64, True, []],
        [15, "d" * 64, True, [5000]],
        [16, "d" * 63],
        [17, -1, 0, 1],
        [17, None, -1, 1],
        [17, None, 0, 1 << 60],
        [18, -1, 0],
        [3, KEY, KEY, "a" * 64, 0, 4, 1, 5, False, ["d" * 64] * 129],
        [3, KEY, KEY, "a" * 64, 0, 4, 1, 5, False, ["d" * 64], [-2]],
        [3, KEY, KEY, "a" * 64, 0, 4, 1, 5, False, ["d" * 64], [128]],
        [3, KEY, KEY, "a" * 64, 0, 4, 1, 5, False, ["d" * 64], [0], ["p"] * 9],
        [80, -1.0],
        [81, 1, "p", b"k" * 15],
        [81, -1, "p", KEY],
        [82, 1, True, "x" * 1025],
        [83, 0, 4, 9, [5], 1, 10, 7, [5], [4], None, None, None],
        [83, 0, 4, 0, [5], -1, 10, 7, [5], [4], None, None, None],
        [83, 0, 4, 0, [-5], 1, 10, 7, [5], [4], None, None, None],
        [83, 0, 4, 0, [5], 1, 1 << 60, 7, [5], [4], None, None, None],
        [83, 0, 4, 0, [5], 1, 10, 7, [5], [4], None, None, [7, None, [4], [4], [0], [5], 0]],
        [84, -1],
        [85, -2, [1]],
        [99, 1],
    ],
)
def test_values_out_of_range_are_refused(fields: list[object]) -> None:
    """Sizes, positions, dtypes, keys and row counts beyond the limits never become a message."""
    with pytest.raises(PeerMisbehaved, match="malformed"):
        decode(msgspec.msgpack.encode(fields))


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    """A message longer than the limit is not looked at."""
    with pytest.raises(PeerMisbehaved, match="limit"):
        decode(b"\x00" * (protocol.MAX_META_BYTES + 1))


def test_the_largest_step_fits_into_a_message() -> None:
    """1024 rows of the largest positions stay below the limit of a message, with a trace of 256 hops."""
    rows = (protocol.MAX_LENGTH,) * protocol.MAX_BATCH_SIZE
    trace = (HopTrace(queue_us=1 << 62, compute_us=1 << 62, batch_tokens=1 << 62, link_us=1 << 62),) * 256
    spec = TensorSpec(DType.FLOAT32, (protocol.MAX_STEP_TOKENS, 1 << 20))
    step = Step(
        step_id=1 << 62,
        order=rows,
        base=rows,
        positions=rows,
        num_tokens=rows,
        outputs_from=rows,
        hidden_states=spec,
        trace=trace,
    )
    assert decode(encode(step)) == step


def test_the_largest_state_of_a_session_fits_into_a_message() -> None:
    """1024 rows of the largest positions stay below the limit; numbers of pages are in the body."""
    rows = (protocol.MAX_LENGTH,) * protocol.MAX_BATCH_SIZE
    sent = SentState(step_id=1 << 62, order=rows, base=rows, outputs_from=rows, starts=rows, ends=rows,
                     dtype=DType.FLOAT32, encoding=Encoding.RAW)  # fmt: skip
    state = SessionState(start=0, end=4096, dtype=DType.FLOAT32, lengths=rows, num_pages=protocol.MAX_LENGTH,
                         cache_bytes=1 << 48, step_id=1 << 62, received=rows, outputs_from=rows, order=rows, base=rows,
                         sent=sent)  # fmt: skip
    assert decode(encode(state)) == state


def test_an_empty_block_range_is_refused() -> None:
    """OpenSession's own range check is that of BlockRange."""
    with pytest.raises(InvalidRequest, match="4:4 is empty"):
        _ = msgspec.structs.replace(OPEN, start=4).blocks


def test_errors_keep_their_class_across_the_wire() -> None:
    """The caller sees whose fault it was, and when a busy peer wants it back."""
    hostile = error_from_wire(error_to_wire(InvalidRequest("no\x1b[2J\nserver fine")), peer_id="p")
    assert str(hostile) == "no\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}server fine"
    busy = error_from_wire(error_to_wire(PeerBusy("full", retry_after_s=2.5)), peer_id="p")
    assert isinstance(busy, PeerBusy) and busy.retry_after_s == 2.5 and busy.peer_id == "p"
    assert isinstance(error_from_wire(error_to_wire(ProtocolMismatch("v2")), peer_id="p"), ProtocolMismatch)
    assert type(error_from_wire(error_to_wire(RouteNotFound("none")), peer_id="p")) is PeerError


# -- the document -----------------------------------------------------------------------------------------------


@by_name
def test_the_document_lists_every_message_with_its_fields_in_order(message: Message) -> None:
    """docs/protocol.md and the code say the same of each message."""
    kind = type(message)
    row = re.search(rf"^\| (\d+) +\| {kind.__name__} +\| ([^|;]*)", DOCUMENT.read_text(), re.MULTILINE)
    assert row is not None
    fields = ", ".join(kind.__struct_fields__) or "–"
    assert (int(row[1]), row[2].strip()) == (kind.__struct_config__.tag, fields)


def test_the_examples_of_the_document_are_right() -> None:
    """The bytes that are given there are messages, and the version is ours."""
    text = DOCUMENT.read_text()
    assert text.startswith(f"# Protocol, version {protocol.PROTOCOL_VERSION}\n")
    section = text[text.index("## 5. Messages") :]
    examples = re.findall(r"^    ((?:[0-9a-f]{2} )*[0-9a-f]{2})  ", section, re.MULTILINE)
    assert [decode(bytes.fromhex(example)) for example in examples] == [
        Step(
            step_id=7,
            order=None,
            base=(5,),
            positions=(5,),
            num_tokens=(1,),
            outputs_from=(5,),
            hidden_states=TensorSpec(DType.FLOAT32, (1, 576)),
        ),
        StepResult(
            step_id=7,
            positions=(5,),
            num_tokens=(1,),
            hidden_states=TensorSpec(DType.FLOAT32, (1, 576)),
            trace=(HopTrace(queue_us=60, compute_us=9000, batch_tokens=4, link_us=250),),
        ),
        Forward(epoch=3, peer_id="", push_key=bytes(16), held=(5,), as_of=6, max_step_tokens=1024),
    ]
