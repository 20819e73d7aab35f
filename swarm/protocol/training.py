"""A training run at a server: a stream of its own, whose life is the run's life there."""

from typing import Annotated

import msgspec

from swarm.protocol.fields import (
    MAX_STEP_TOKENS,
    Block,
    Digest,
    Message,
    PeerId,
    PushKey,
    Rows,
    StepId,
    TensorSpec,
    Text,
)
from swarm.types import BlockRange


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
