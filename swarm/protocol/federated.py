"""Federated training: between clients, each of which has an adapter of its own for every round."""

from typing import Annotated

import msgspec

from swarm.protocol.fields import MAX_CONTRIBUTIONS, Digest, Message, PeerId, Signature, StepId


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
