"""Messages between peers: what each one carries, its checks, and its bytes.

A message is a msgspec Struct written as a msgpack array `[tag, field, ...]`; tensors travel behind it as raw bytes (the
body of the frame) and are described in the message by `TensorSpec`. Types, ranges and lengths are part of the
declarations, so whatever `decode` returns has been checked, and nothing is allocated on a peer's word alone.

This module knows nothing of connections, sessions or torch.

    transport --bytes--> decode --Message--> handler          transport <--bytes-- encode <--Message-- handler

docs/protocol.md lists every message byte by byte.
"""

import msgspec

from swarm.errors import PeerMisbehaved
from swarm.protocol.adapters import (
    AdapterLoading,
    AdapterOffer,
    AdapterPart,
    AdapterRequest,
)
from swarm.protocol.federated import (
    Contribution,
    FederatedBallot,
)
from swarm.protocol.fields import (
    ADAPTER_SERVICE,
    CIRCUIT_SERVICE,
    DIAL_BACK_SERVICE,
    FEDERATED_SERVICE,
    INFO_SERVICE,
    MAX_ADAPTERS,
    MAX_BATCH_SIZE,
    MAX_CONTRIBUTIONS,
    MAX_HOLDERS,
    MAX_HOPS,
    MAX_LENGTH,
    MAX_META_BYTES,
    MAX_PINGS,
    MAX_STEP_TOKENS,
    OFFER_SERVICE,
    PROTOCOL_VERSION,
    PUSH_SERVICE,
    RELAY_SERVICE,
    SESSION_SERVICE,
    STATE_SERVICE,
    TRAIN_SERVICE,
    AdapterIndex,
    Block,
    Count,
    Digest,
    DType,
    Encoding,
    Length,
    Message,
    Microseconds,
    NumBytes,
    PeerId,
    PeerName,
    Port,
    PushKey,
    Rate,
    Rows,
    Signature,
    StepId,
    TensorSpec,
    Text,
)
from swarm.protocol.moving import (
    HandedOver,
    HandOver,
    MoveAway,
    SentState,
    SessionState,
    StatePart,
    StateTaken,
)
from swarm.protocol.refusals import (
    WireError,
    error_from_wire,
    error_to_wire,
    printable,
)
from swarm.protocol.relays import (
    AskOffer,
    CircuitBytes,
    CircuitGreeting,
    CircuitOpened,
    DialBack,
    DialedBack,
    DirectOffer,
    OpenCircuit,
    Reserve,
    Reserved,
)
from swarm.protocol.sessions import (
    Forward,
    Forwarding,
    HopTrace,
    Info,
    InfoRequest,
    LinkDown,
    LinkFault,
    OpenSession,
    Ping,
    Probe,
    ProbeResult,
    PushAccepted,
    PushHello,
    SessionOpened,
    Step,
    StepResult,
    Trace,
    Waiting,
)
from swarm.protocol.training import (
    OpenTraining,
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
)

__all__ = [
    "ADAPTER_SERVICE",
    "CIRCUIT_SERVICE",
    "DIAL_BACK_SERVICE",
    "FEDERATED_SERVICE",
    "INFO_SERVICE",
    "MAX_ADAPTERS",
    "MAX_BATCH_SIZE",
    "MAX_CONTRIBUTIONS",
    "MAX_HOLDERS",
    "MAX_HOPS",
    "MAX_LENGTH",
    "MAX_META_BYTES",
    "MAX_PINGS",
    "MAX_STEP_TOKENS",
    "OFFER_SERVICE",
    "PROTOCOL_VERSION",
    "PUSH_SERVICE",
    "RELAY_SERVICE",
    "SESSION_SERVICE",
    "STATE_SERVICE",
    "TRAIN_SERVICE",
    "AdapterIndex",
    "AdapterLoading",
    "AdapterOffer",
    "AdapterPart",
    "AdapterRequest",
    "AnyMessage",
    "AskOffer",
    "Block",
    "CircuitBytes",
    "CircuitGreeting",
    "CircuitOpened",
    "Contribution",
    "Count",
    "DType",
    "DialBack",
    "DialedBack",
    "Digest",
    "DirectOffer",
    "Encoding",
    "FederatedBallot",
    "Forward",
    "Forwarding",
    "HandOver",
    "HandedOver",
    "HopTrace",
    "Info",
    "InfoRequest",
    "Length",
    "LinkDown",
    "LinkFault",
    "Message",
    "Microseconds",
    "MoveAway",
    "NumBytes",
    "OpenCircuit",
    "OpenSession",
    "OpenTraining",
    "PeerId",
    "PeerName",
    "Ping",
    "Port",
    "Probe",
    "ProbeResult",
    "PushAccepted",
    "PushHello",
    "PushKey",
    "Rate",
    "Reserve",
    "Reserved",
    "Rows",
    "SentState",
    "SessionOpened",
    "SessionState",
    "Signature",
    "StatePart",
    "StateTaken",
    "Step",
    "StepId",
    "StepResult",
    "TensorSpec",
    "Text",
    "Trace",
    "TrainBackward",
    "TrainForget",
    "TrainForward",
    "TrainGradients",
    "TrainLink",
    "TrainLinked",
    "TrainLost",
    "TrainOutputs",
    "TrainParameters",
    "TrainingOpened",
    "Waiting",
    "WireError",
    "decode",
    "encode",
    "error_from_wire",
    "error_to_wire",
    "printable",
]

AnyMessage = (
    InfoRequest
    | Info
    | OpenSession
    | SessionOpened
    | Step
    | StepResult
    | Forward
    | Forwarding
    | LinkDown
    | PushHello
    | PushAccepted
    | Waiting
    | Probe
    | ProbeResult
    | AdapterRequest
    | AdapterOffer
    | AdapterPart
    | AdapterLoading
    | OpenTraining
    | TrainingOpened
    | TrainParameters
    | TrainForward
    | TrainOutputs
    | TrainBackward
    | TrainGradients
    | TrainLost
    | TrainForget
    | TrainLink
    | TrainLinked
    | MoveAway
    | HandOver
    | HandedOver
    | SessionState
    | StatePart
    | StateTaken
    | FederatedBallot
    | Reserve
    | Reserved
    | OpenCircuit
    | CircuitOpened
    | CircuitGreeting
    | CircuitBytes
    | DialBack
    | DialedBack
    | AskOffer
    | DirectOffer
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes | bytearray | memoryview) -> Message:
    """Read a message from a peer.

    Raises:
        PeerMisbehaved: when the bytes are not a valid message; `.peer_id` is left to the caller, who knows it.
    """
    if len(data) > MAX_META_BYTES:
        raise PeerMisbehaved(f"message of {len(data)} bytes, limit {MAX_META_BYTES}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerMisbehaved(f"malformed message: {error}") from error
