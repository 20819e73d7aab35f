"""What clients of a federated run read of others: records, ballots, and updates."""

from contextlib import suppress
from hashlib import sha256

import msgspec
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm import protocol
from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import MAX_MANIFEST_BYTES, Manifest
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.errors import PeerMisbehaved, RoundFailed
from swarm.federated.agreement import MAX_CLIENTS, Head, Round, Terms, contribute
from swarm.federated.roll import ClientRecord
from swarm.federated.updates import MAX_NUMBER, Rules, check_manifest, pack_update, read_shard
from swarm.identity import Identity
from swarm.protocol import FederatedBallot
from tests.fuzz.target import Target, framed, pieces

RUN, HEAD = "a" * 64, Head(1, "b" * 64)
CLIENTS = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2)]
SHAPE = BlockShape(hidden_size=4, linears={"q": LinearShape(num_inputs=4, num_outputs=3)}, kv_shape=None)
RULES = Rules(
    layout=ModelLayout(blocks_path="layers", blocks=(SHAPE,)), linears={0: ["q"]}, max_rank=2, is_rank_fixed=False
)


def client_record(data: bytes) -> None:
    """A record of the DHT."""
    record = ClientRecord.decode(data, peer_id=CLIENTS[1].peer_id)
    assert len(record.run) == 64


def client_record_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode(ClientRecord(1, RUN, is_leaving)) for is_leaving in (False, True)]


def ballot(data: bytes) -> None:
    """Whatever a peer says, our own contribution counts, and others only if they have signed it."""
    own = contribute(CLIENTS[0], RUN, HEAD, "c" * 64, 1)
    terms = Terms(run=RUN, head=HEAD, min_clients=1, collect_until=1.0, ends_at=2.0)
    this, message = Round(terms, own), protocol.decode(data)
    if not isinstance(message, FederatedBallot):
        return
    with suppress(PeerMisbehaved):
        this.add(message.contributions)
        this.hear(CLIENTS[1].peer_id, message)
    assert this.contributors <= {it.peer_id for it in CLIENTS} and len(this.contributors) < MAX_CLIENTS
    with suppress(RoundFailed):
        assert [it.peer_id for it in this.decide(3.0) or [own]] == [CLIENTS[0].peer_id]


def ballot_seeds() -> list[bytes]:
    twice = tuple(contribute(CLIENTS[1], RUN, HEAD, digit * 64, 5) for digit in "de")
    return [
        protocol.encode(
            FederatedBallot(
                run=RUN,
                round=1,
                base=HEAD.base,
                contributions=twice[:number],
                is_final=number == 1,
                head_round=1,
                head_base=HEAD.base,
            )
        )
        for number in range(3)
    ]


def update(data: bytes) -> None:
    """A manifest and a shard: what comes through fits the rules; hashes are made to fit, since an attacker can."""
    first, *shards = [*pieces(data), b""]
    manifest = Manifest.decode(first[:MAX_MANIFEST_BYTES], digest=sha256(first[:MAX_MANIFEST_BYTES]).hexdigest())
    check_manifest(manifest, RULES)
    info = msgspec.structs.replace(
        manifest.shards[0], digest=sha256(shards[0]).hexdigest(), num_bytes=max(8, len(shards[0]))
    )
    check_manifest(msgspec.structs.replace(manifest, shards=(info,)), RULES)
    linear = read_shard(bytearray(shards[0]), info, RULES).linears["q"]
    assert linear.a_rI is not None and linear.a_rI.shape[1] == 4 and linear.rank <= 2
    assert float(linear.a_rI.abs().max()) <= MAX_NUMBER


def update_seeds() -> list[bytes]:
    packed = pack_update(
        {0: BlockDelta(linears={"q": LinearDelta(a_rI=torch.ones(2, 4), b_Or=torch.ones(3, 2), scale=0.5)})},
        RULES.layout,
    )
    return [framed([packed.manifest.encode(), packed.shards[0]])]


FEDERATED_TARGETS = {
    "federated_record": Target(run=client_record, seeds=client_record_seeds),
    "federated_ballot": Target(run=ballot, seeds=ballot_seeds),
    "federated_update": Target(run=update, seeds=update_seeds),
}
