"""A session at a server: opened, stepped, linked to the next one, asked how far it is; what a server says of itself."""

from enum import IntEnum
from typing import Annotated

import msgspec

from swarm.errors import InvalidRequest
from swarm.protocol.fields import (
    MAX_ADAPTERS,
    MAX_BATCH_SIZE,
    MAX_HOLDERS,
    MAX_HOPS,
    MAX_LENGTH,
    MAX_PINGS,
    MAX_STEP_TOKENS,
    AdapterIndex,
    Block,
    Count,
    Digest,
    Length,
    Message,
    Microseconds,
    PeerId,
    PeerName,
    PushKey,
    Rate,
    Rows,
    StepId,
    TensorSpec,
    Text,
)
from swarm.types import BlockRange


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
