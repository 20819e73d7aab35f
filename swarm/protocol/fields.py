"""What the fields of messages are made of: sizes, ranges, tensors, names of services. It knows no message."""

from enum import IntEnum
from math import prod
from typing import Annotated

import msgspec

from swarm.types import MAX_BLOCKS

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
OFFER_SERVICE = "offer"

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
