"""Messages between peers: what each one carries, its checks, and its bytes.

A message is a msgspec Struct written as a msgpack array `[tag, field, ...]`; tensors travel behind it as raw bytes (the
body of the frame) and are described in the message by `TensorSpec`. Types, ranges and lengths are part of the
declarations, so whatever `decode` returns has been checked, and nothing is allocated on a peer's word alone.

This module knows nothing of connections, sessions or torch.

    transport --bytes--> decode --Message--> handler          transport <--bytes-- encode <--Message-- handler

docs/protocol.md lists every message byte by byte.
"""

from enum import IntEnum
from math import prod
from typing import Annotated

import msgspec

from swarm.errors import (
    AccessDenied,
    AdapterError,
    CheckpointMismatch,
    ConfigError,
    InvalidRequest,
    InvitationExpired,
    InvitationRevoked,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolMismatch,
    RequestError,
    RouteNotFound,
    SwarmError,
    SwarmIsPrivate,
    UnknownModel,
    UnsupportedModel,
)
from swarm.types import MAX_BLOCKS, BlockRange

PROTOCOL_VERSION = 3
"""Both sides must speak the same version; it is the first thing that either side checks."""

MAX_BATCH_SIZE = 1024
"""Sequences in one session."""
MAX_LENGTH = 1 << 24
"""Tokens in one sequence, above any model's context."""
MAX_STEP_TOKENS = 1 << 16
"""Tokens in one step over all rows; a server may set a lower limit of its own."""
MAX_META_BYTES = 1 << 18
"""Encoded size of a message without its body."""

MAX_HOPS = 256
"""Servers that one step may pass."""
MAX_PINGS = 64
"""Round trips that a server tells of."""

MAX_ADAPTERS = 128
"""Different adapters of one session."""
MAX_CONTRIBUTIONS = 128
"""Of one round of federated training; twice the clients that may take part."""
MAX_HOLDERS = 8
"""Peers of whom a client says that they may have its adapters."""

SESSION_SERVICE = "session"
PUSH_SERVICE = "push"
INFO_SERVICE = "info"
ADAPTER_SERVICE = "adapter"
TRAIN_SERVICE = "train"
STATE_SERVICE = "state"
FEDERATED_SERVICE = "federated"
RELAY_SERVICE = "relay"
CIRCUIT_SERVICE = "circuit"
DIAL_BACK_SERVICE = "dial-back"

Block = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
Length = Annotated[int, msgspec.Meta(ge=0, le=MAX_LENGTH)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Rows = Annotated[tuple[Length, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH_SIZE)]
AdapterIndex = Annotated[int, msgspec.Meta(ge=-1, lt=MAX_ADAPTERS)]
PeerId = Annotated[str, msgspec.Meta(max_length=128)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
StepId = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
NumBytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Microseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
PeerName = Annotated[str, msgspec.Meta(max_length=128)]
PushKey = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""Chosen by the client for one link: the right to push steps into the session that was opened with it."""


class DType(IntEnum):
    """Element types that may cross the wire."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


class Encoding(IntEnum):
    """How a tensor's elements are laid out in the body."""

    RAW = 0
    """Row-major elements, little-endian."""
    INT8_ROWS = 1
    """One fp32 scale per row of the last dimension (all scales first), then one signed byte per element."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Describes a tensor in the body of a frame: logical dtype, shape [tokens, hidden] and encoding."""

    dtype: DType
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP_TOKENS)], Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]]
    encoding: Encoding = Encoding.RAW

    @property
    def num_bytes(self) -> int:
        """Size of the encoded tensor."""
        if self.encoding is Encoding.INT8_ROWS:
            return self.shape[0] * (4 + self.shape[1])
        return prod(self.shape) * self.dtype.num_bytes


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything that peers say to each other."""


class InfoRequest(Message, frozen=True, tag=1):
    """Ask a server what it is. Answered by `Info`."""


class Ping(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A round trip between the server that says so and another peer."""

    peer_id: PeerName
    rtt_us: Microseconds


class Info(Message, frozen=True, tag=2):
    """What a server is and how busy it is now."""

    model: Digest
    model_name: Text
    start: Block
    end: Block
    state: Annotated[int, msgspec.Meta(ge=0, le=3)]
    version: Text
    dtype: Text
    quantization: Text
    num_sessions: Length
    kv_free_tokens: Count
    kv_total_tokens: Count
    hidden_size: Length = 0
    """Width of the hidden states that its blocks take; 0 where it doesn't say."""
    num_rows: Length = 0
    """Sequences of these sessions."""
    num_waiting: Length = 0
    """Sessions whose work waits for room in the cache."""
    load: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of its capacity that is in use."""
    tokens_per_s: Rate = 0.0
    """Tokens of all sessions that ran through its blocks lately."""
    queue_us: Microseconds = 0
    """How long tokens waited lately before their batch began, on average."""
    step_us: Microseconds = 0
    """How long their batch took, on average."""
    uptime_s: Annotated[float, msgspec.Meta(ge=0, le=1e10)] = 0.0
    num_tokens: Count = 0
    """Tokens that ran through its blocks since it started."""
    num_opened: Count = 0
    """Sessions that it let in since it started."""
    num_failed: Count = 0
    """Sessions among them that ended with an error, other than that somebody left."""
    pings: Annotated[tuple[Ping, ...], msgspec.Meta(max_length=MAX_PINGS)] = ()
    """Round trips to servers that it sends to."""


class OpenSession(Message, frozen=True, tag=3):
    """First message of a session stream: which blocks, how many rows of which length. Answered by `SessionOpened`.

    The stream is the session's life: when it ends, the server frees everything. The client keeps one to every hop.
    """

    session_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    push_key: PushKey
    model: Digest
    start: Block
    end: Block
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_SIZE)]
    max_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    is_last: bool
    """Whether the outputs are the client's, from each step's `outputs_from` on; if not, they wait for a `Forward`."""
    adapters: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_ADAPTERS)] = ()
    """The different adapters of its rows."""
    adapter_of: Annotated[tuple[AdapterIndex, ...], msgspec.Meta(max_length=MAX_BATCH_SIZE)] = ()
    """Which of them each row uses, -1 for none; may be left out where no row uses any."""
    holders: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=MAX_HOLDERS)] = ()
    """Servers that may have them; they are asked before the client is."""

    @property
    def row_adapters(self) -> tuple[str | None, ...]:
        """The adapter of each row, validated.

        Raises:
            InvalidRequest: rows and adapters don't belong to each other.
        """
        if not self.adapters and not self.adapter_of:
            return (None,) * self.batch_size
        used = {index for index in self.adapter_of if index >= 0}
        if len(self.adapter_of) != self.batch_size or used != set(range(len(self.adapters))):
            raise InvalidRequest(
                f"{len(self.adapters)} adapters, of which {len(used)} are used by {len(self.adapter_of)} rows of"
                f" {self.batch_size}"
            )
        if len(set(self.adapters)) != len(self.adapters):
            raise InvalidRequest(f"of {len(self.adapters)} adapters only {len(set(self.adapters))} are different")
        return tuple(self.adapters[index] if index >= 0 else None for index in self.adapter_of)

    @property
    def blocks(self) -> BlockRange:
        """The blocks to run, validated.

        Raises:
            InvalidRequest: when the range is empty.
        """
        return BlockRange(self.start, self.end)


class SessionOpened(Message, frozen=True, tag=4):
    """The server is ready for steps of at most `max_step_tokens` tokens over all rows."""

    max_step_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]
    can_rollback: bool


class HopTrace(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one hop did with a chunk: times in microseconds, `link_us` is half the round trip to whom it sent it."""

    queue_us: Microseconds
    compute_us: Microseconds
    batch_tokens: Annotated[int, msgspec.Meta(ge=0)]
    link_us: Microseconds


Trace = Annotated[tuple[HopTrace, ...], msgspec.Meta(max_length=MAX_HOPS)]


class Step(Message, frozen=True, tag=5):
    """Tokens for the rows of a session; the body is their hidden states, row after row.

    A step may come in several messages (chunks of a prompt, a replay, a message sent again); `step_id`, `order`, `base`
    and `outputs_from` are the same in all of them. A receiver that sees a new `step_id` first makes row i what row
    `order[i]` was, then forgets what row i holds from position `base[i]` on: once. Then row i receives the tokens
    [positions[i], positions[i] + num_tokens[i]), of which it skips those that it holds. The client wants the last
    block's outputs of row i from position `outputs_from[i]` on.
    """

    step_id: StepId
    order: Rows | None
    base: Rows
    positions: Rows
    num_tokens: Rows
    outputs_from: Rows
    hidden_states: TensorSpec
    trace: Trace = ()
    """The hops that this chunk has passed."""


class StepResult(Message, frozen=True, tag=6):
    """Outputs for the client, in the dtype of the step: row i's at [positions[i], positions[i] + num_tokens[i])."""

    step_id: StepId
    positions: Rows
    num_tokens: Rows
    hidden_states: TensorSpec
    trace: Trace


class Forward(Message, frozen=True, tag=7):
    """From now on the outputs of this session go to another peer, or (`peer_id` "") to the client.

    The receiver holds `held[i]` tokens of row i, in the order of the rows after step `as_of`; what it lacks is sent
    from history. Answered by `Forwarding` or `LinkDown` with the same `epoch`.
    """

    epoch: StepId
    peer_id: PeerName
    push_key: PushKey
    held: Rows
    as_of: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    max_step_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]


class Forwarding(Message, frozen=True, tag=8):
    """The link asked for by the Forward of that `epoch` is open."""

    epoch: StepId


class LinkFault(IntEnum):
    """Why a server can't send on."""

    UNREACHABLE = 0
    """The next peer can't be reached, refused, or is gone."""
    HISTORY_LOST = 1
    """The history that the next peer lacks is not kept any more."""


class LinkDown(Message, frozen=True, tag=9):
    """The link of that `epoch` could not be opened, or broke; outputs are kept until the next Forward."""

    epoch: StepId
    fault: LinkFault
    text: Text


class PushHello(Message, frozen=True, tag=10):
    """First message of a push stream: into which session or training run. Answered by `PushAccepted`.

    Then come Steps; or TrainForwards, with TrainBackwards in the other direction.
    """

    push_key: PushKey


class PushAccepted(Message, frozen=True, tag=11):
    """The session, or run, is there."""


class Waiting(Message, frozen=True, tag=12):
    """The step waits for room in the cache, for about `expected_s` seconds more."""

    step_id: StepId
    expected_s: Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Probe(Message, frozen=True, tag=13):
    """How far has this session come? Answered by `ProbeResult` at once, whatever is running."""

    nonce: StepId


class ProbeResult(Message, frozen=True, tag=14):
    """The latest step seen (-1: none), the tokens that came in and went out of the blocks, and whether it waits."""

    nonce: StepId
    step_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    received: Rows
    produced: Rows
    is_waiting: bool


class AdapterRequest(Message, frozen=True, tag=15):
    """Send me of this adapter its manifest and what it has for these blocks, in `AdapterPart`s.

    From a server to a client over the session stream, which answers with an `AdapterOffer` on a stream of its own; or
    first message of a stream to a peer's `adapter` service, which sends what it has and ends the stream.
    """

    digest: Digest
    with_manifest: bool
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(max_length=MAX_BLOCKS)]


class AdapterOffer(Message, frozen=True, tag=16):
    """First message of a stream to the `adapter` service: the parts that an `AdapterRequest` asked for follow.

    The server ends the stream when it has checked them all, or fails it with what is wrong with them.
    """

    digest: Digest


class AdapterPart(Message, frozen=True, tag=17):
    """Bytes of the manifest (`block` None) or of one block's shard, from `offset` on; the body. Parts come in order."""

    block: Block | None
    offset: NumBytes
    num_bytes: NumBytes
    """Of the whole manifest or shard."""


class AdapterLoading(Message, frozen=True, tag=18):
    """The session's steps wait for its adapters, of which so many bytes are there; once a second."""

    num_bytes: NumBytes
    total_bytes: NumBytes
    """As far as known by now."""


# -- training: a stream of its own, whose life is the run's life at this server ------------------------------------


class OpenTraining(Message, frozen=True, tag=40):
    """First message of a training stream: which blocks. Answered by `TrainingOpened`.

    The server before in the chain, which the client tells the key, may send to this run; see `TrainLink`.
    """

    push_key: PushKey
    model: Digest
    start: Block
    end: Block

    @property
    def blocks(self) -> BlockRange:
        """The blocks to run, validated.

        Raises:
            InvalidRequest: when the range is empty.
        """
        return BlockRange(self.start, self.end)


class TrainingOpened(Message, frozen=True, tag=41):
    """The server is ready for micro-batches."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]
    """Most tokens in one micro-batch."""
    good_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]
    """From how many on a larger one is no faster per token, but keeps others waiting: what it should have about."""


class TrainParameters(Message, frozen=True, tag=42):
    """A version of what is trained in the blocks, in the form of an adapter (`swarm.adapters.format`).

    The body is the manifest, which has this digest, and then its shards for the blocks of the stream, one after
    another; with a `base`, an earlier version that is not forgotten, only what is different from its shards
    (`swarm.adapters.difference`). Micro-batches name it by `version`; TrainForget frees it.
    """

    base: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    version: StepId
    digest: Digest
    manifest_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class TrainForward(Message, frozen=True, tag=43):
    """Whole sequences for the blocks; the body is their hidden states, row after row. Answered by `TrainOutputs`.

    `micro_batch` is greater than any before in this run. `version` -1: the blocks as they are. Of linked servers only
    the first gets it from the client, and each sends it on with its own outputs.
    """

    micro_batch: StepId
    version: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    num_tokens: Rows
    keep: bool
    """Whether a `TrainBackward` may follow: it is wanted, and all servers before keep what they need for it."""
    hidden_states: TensorSpec


class TrainOutputs(Message, frozen=True, tag=44):
    """The outputs of a micro-batch, or, None, that they were sent on; unless it `is_kept`, it can't go back."""

    micro_batch: StepId
    is_kept: bool
    hidden_states: TensorSpec | None


class TrainBackward(Message, frozen=True, tag=45):
    """Gradients of the outputs of a micro-batch. Answered by `TrainGradients` or `TrainLost`; it is not kept after.

    Of linked servers only the last gets it from the client, and each sends on the gradients of its inputs.
    """

    micro_batch: StepId
    gradients: TensorSpec
    wants_inputs: bool
    """Whether the client wants the gradients of the inputs."""


class TrainGradients(Message, frozen=True, tag=46):
    """Gradients of a micro-batch's inputs, then, in fp32, of the numbers of its version of the parameters.

    The former may be missing: sent on to the server before, or not wanted. The latter come block by block, tensors in
    the order of `swarm.adapters.BlockDelta.tensors`.
    """

    micro_batch: StepId
    gradients: TensorSpec | None
    num_parameters: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]


class TrainLost(Message, frozen=True, tag=47):
    """This micro-batch is not kept any more: it must come forward again, under another number."""

    micro_batch: StepId


class TrainForget(Message, frozen=True, tag=48):
    """These micro-batches will not go back, and these versions are stale."""

    micro_batches: Annotated[tuple[StepId, ...], msgspec.Meta(max_length=1 << 14)]
    versions: Annotated[tuple[StepId, ...], msgspec.Meta(max_length=1 << 10)]


class TrainLink(Message, frozen=True, tag=49):
    """Send outputs on to the run of that key at another server, which sends gradients back the same way.

    Comes at most once, before any micro-batch. Answered by `TrainLinked`.
    """

    peer_id: PeerId
    push_key: PushKey


class TrainLinked(Message, frozen=True, tag=50):
    """The link is open; or, with a `fault`, there is none: it could not be opened, or has broken."""

    fault: Text


# -- moving: a session goes to another server, with all that it has, while its client goes on -----------------------


class MoveAway(Message, frozen=True, tag=80):
    """From a server that is about to leave: have the session handed to another server within so long.

    The client answers with a `HandOver`, once it has opened a session for the same blocks elsewhere.
    """

    within_s: Annotated[float, msgspec.Meta(ge=0, le=86400)]


class HandOver(Message, frozen=True, tag=81):
    """Give this session, as it stands, to the empty one that was opened with `push_key` at that peer.

    Answered by `HandedOver` with the same nonce. `peer_id` "" says that there is nobody to give it to.
    """

    nonce: StepId
    peer_id: PeerName
    push_key: PushKey


class HandedOver(Message, frozen=True, tag=82):
    """The other server has the session, and this one does nothing more for it; or it hasn't, and this one goes on.

    What this server had to send to the client was sent before.
    """

    nonce: StepId
    is_done: bool
    text: Text
    """Why not."""


class SentState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a session sends on: the latest step whose outputs began, and which outputs are kept for the receiver."""

    step_id: StepId
    order: Rows | None
    base: Rows
    outputs_from: Rows
    starts: Rows
    """Per row the position of the first output in the body ..."""
    ends: Rows
    """... and the one after the last."""
    dtype: DType
    encoding: Encoding


class SessionState(Message, frozen=True, tag=83):
    """A session on its way to another server: on a `state` stream, behind PushHello and PushAccepted.

    Its bytes follow in `StatePart`s: for each row the numbers of its pages (4 bytes each, little-endian); the cache, as
    the blocks lay it out; the outputs of `sent`, row after row. Answered by `StateTaken`.
    """

    start: Block
    end: Block
    dtype: DType
    """Of keys and values."""
    lengths: Rows
    """Tokens of each row in the cache."""
    num_pages: Length
    """Different pages of all rows."""
    cache_bytes: NumBytes
    step_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    """The latest step that came in."""
    received: Rows
    """Tokens of each row that came in, after this step's order and rollback."""
    outputs_from: Rows
    order: Rows | None
    """What of `lengths` is to be done before the next tokens, where a step has begun without any: `order` and ..."""
    base: Rows | None
    """... rollback; None where there is nothing to be done."""
    sent: SentState | None
    """None before the first output."""


class StatePart(Message, frozen=True, tag=84):
    """Bytes of the state from `offset` on; the body. Parts come in order."""

    offset: NumBytes


class StateTaken(Message, frozen=True, tag=85):
    """The state has come, whole and sound: told to the server that sent it, and to the session's client."""

    step_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)]
    received: Rows


# -- federated training: between clients, each of which has an adapter of its own for every round ------------------


class Contribution(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a client says that it adds to a round; anybody may hand it on, since it is signed."""

    peer_id: PeerId
    digest: Digest
    """Of the adapter's manifest; its bytes come for an `AdapterRequest` on another stream of the service."""
    num_examples: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    signature: Signature
    """By `peer_id`, of run, round, base, digest and num_examples (`swarm.federated.agreement.statement`)."""


class FederatedBallot(Message, frozen=True, tag=64):
    """Whose contributions the sender has, checked, for a round; the answer is another one, of the same round.

    First and only message of a stream to a peer's `federated` service.
    """

    run: Digest
    """Of the run's name, its model and all settings that its clients must agree about."""
    round: StepId
    base: Digest
    """Of the adapter that the round began with."""
    contributions: Annotated[tuple[Contribution, ...], msgspec.Meta(max_length=MAX_CONTRIBUTIONS)]
    """Two that differ of one peer prove that it can't be counted."""
    is_final: bool
    """The sender has ended this round, with these."""
    head_round: StepId
    """Where the sender is now: the round that it is in or trains for ..."""
    head_base: Digest
    """... and what that began with."""


# -- ways to peers that nobody can connect to ------------------------------------------------------------------


class Reserve(Message, frozen=True, tag=96):
    """Carry connections to us while this stream is open. First on a `relay` stream; answered by `Reserved`."""


class Reserved(Message, frozen=True, tag=97):
    """The relay will. It opens a `circuit` stream to us for each connection."""

    max_circuits: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    """At once."""


class OpenCircuit(Message, frozen=True, tag=98):
    """Carry a connection to this peer. First on a `relay` stream; `CircuitBytes` of both sides follow."""

    peer_id: PeerId
    is_call_back: bool
    """The peer is rather to connect to us, who can be reached: the stream ends when it has."""


class CircuitOpened(Message, frozen=True, tag=99):
    """First on a `circuit` stream: this peer asked the relay for a connection to us. Answered by `CircuitGreeting`."""

    peer_id: PeerId
    is_call_back: bool


class CircuitGreeting(Message, frozen=True, tag=100):
    """Who answers at the end of a circuit, which no relay can feign."""

    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """SHA-256 of the certificate that it will show."""
    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """To be signed by who asked, as its ticket."""
    signature: Signature
    """By the peer that was asked for, of `swarm.transport.circuits.statement`."""


class CircuitBytes(Message, frozen=True, tag=101):
    """A piece of the TLS connection between the two ends; the body."""


class DialBack(Message, frozen=True, tag=102):
    """Try to connect to us, at the address that we come from. Answered by `DialedBack`."""

    port: Port
    """Of direct connections."""
    fingerprint: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """Of the certificate shown there."""
    control_port: Port
    """Of libp2p."""


class DialedBack(Message, frozen=True, tag=103):
    """Whether that worked."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    """The address that we come from."""
    is_reachable: bool


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


class WireError(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A refusal in the form in which it crosses the wire."""

    code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    text: Text
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0


# A peer's own trouble reaches the caller in the PeerError branch; the caller's faults keep their class.
_REQUEST_CODES: dict[int, type[RequestError]] = {
    1: RequestError,
    2: InvalidRequest,
    3: UnknownModel,
    4: UnsupportedModel,
    5: CheckpointMismatch,
    6: ProtocolMismatch,
    7: ConfigError,
    8: AdapterError,
    16: AccessDenied,
    17: SwarmIsPrivate,
    18: InvitationExpired,
    19: InvitationRevoked,
}
_PEER_CODES: dict[int, type[PeerError]] = {
    32: PeerError,
    33: PeerUnreachable,
    34: PeerDisconnected,
    35: PeerTimeout,
    37: PeerMisbehaved,
}
_BUSY_CODE = 36
_CODES: dict[type[SwarmError], int] = {
    **{cls: code for code, cls in _REQUEST_CODES.items()},
    **{cls: code for code, cls in _PEER_CODES.items()},
    PeerBusy: _BUSY_CODE,
    RouteNotFound: 32,
}
_error_encoder = msgspec.msgpack.Encoder()
_error_decoder = msgspec.msgpack.Decoder(WireError)


def error_to_wire(error: SwarmError) -> bytes:
    """A refusal as msgpack. Unknown kinds travel as a plain PeerError, so no detail of this process leaks."""
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), 32)
    retry = error.retry_after_s if isinstance(error, PeerBusy) else 0.0
    return _error_encoder.encode(WireError(code, str(error)[:1024], min(max(retry, 0.0), 86400.0)))


def error_from_wire(data: bytes | bytearray | memoryview, *, peer_id: str | None) -> SwarmError:
    """The error that a peer refused us with; a malformed one becomes PeerMisbehaved, never an exception here."""
    try:
        wire = _error_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return PeerMisbehaved(f"malformed error message: {error}", peer_id=peer_id)
    text = printable(wire.text)
    if wire.code in _REQUEST_CODES:
        return _REQUEST_CODES[wire.code](text)
    if wire.code == _BUSY_CODE:
        return PeerBusy(text, peer_id=peer_id, retry_after_s=wire.retry_after_s)
    return _PEER_CODES.get(wire.code, PeerError)(text, peer_id=peer_id)


def printable(text: str) -> str:
    """A peer's text without what could move a cursor, break a line or run a terminal's commands."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
