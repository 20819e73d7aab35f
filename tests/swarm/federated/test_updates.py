"""What a client's update has to be before it counts: each way of being wrong is named."""

from dataclasses import replace

import msgspec
import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import HashMismatch
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.errors import InvalidRequest
from swarm.federated.updates import Rules, check_manifest, pack_update, read_shard

LINEARS = {"q": LinearShape(num_inputs=8, num_outputs=6), "v": LinearShape(num_inputs=8, num_outputs=4)}
SHAPE = BlockShape(hidden_size=8, linears=LINEARS, kv_shape=(2, 2, 2))
LAYOUT = ModelLayout(blocks_path="model.layers", blocks=(SHAPE, SHAPE))
RULES = Rules(layout=LAYOUT, linears={1: ["q", "v"]}, max_rank=2, is_rank_fixed=True, scale=2.0)


def linear(path: str = "q", rank: int = 2, scale: float = 2.0) -> LinearDelta:
    shape = LINEARS[path]
    a = torch.arange(rank * 8.0).reshape(rank, 8)
    return LinearDelta(a_rI=a, b_Or=torch.ones(shape.num_outputs, rank), scale=scale)


GOOD = {1: BlockDelta(linears={"q": linear("q"), "v": linear("v")})}


def read(update, rules: Rules = RULES):
    """As a peer's bytes are read."""
    packed = pack_update(update, LAYOUT)
    check_manifest(packed.manifest, rules)
    return {
        info.block: read_shard(bytearray(packed.shards[info.block]), info, rules) for info in packed.manifest.shards
    }


def test_a_good_update_comes_through_to_the_bit():
    """With its scale."""
    found = read(GOOD)[1].linears["v"]
    assert torch.equal(found.a_rI, linear("v").a_rI) and found.scale == 2.0


def with_q(**changes) -> dict[int, BlockDelta]:
    return {1: BlockDelta(linears={"q": replace(linear("q"), **changes), "v": linear("v")})}


@pytest.mark.parametrize(
    ("update", "why"),
    [
        ({0: GOOD[1], **GOOD}, "changes 2 blocks, need the 1"),
        ({0: GOOD[1]}, "changes 1 blocks"),
        ({}, "changes 0 blocks"),
        ({1: BlockDelta(linears={"q": linear("q")})}, "linears \\['q'\\], need \\['q', 'v'\\]"),
        (with_q(b_Or=torch.full((6, 2), torch.nan)), "not finite"),
        (with_q(a_rI=torch.full((2, 8), torch.inf)), "not finite"),
        (with_q(b_Or=torch.full((6, 2), 6e5)), "a number of 1.2e\\+06, limit 1e\\+06"),
        (with_q(a_rI=torch.full((2, 8), 2e6)), "limit 1e\\+06"),
        (with_q(a_rI=torch.ones(1, 8), b_Or=torch.ones(6, 1)), "rank 1, need 2"),
        (with_q(a_rI=torch.ones(3, 8), b_Or=torch.ones(6, 3)), "rank 3, limit 2"),
        (with_q(a_rI=torch.ones(2, 7)), "has shape \\(2, 7\\)"),
        (with_q(scale=1.0), "scale 1.0, need 2.0"),
        (with_q(bias_O=torch.ones(6)), "need lora_A and lora_B and nothing else"),
        (with_q(a_rI=None, b_Or=None, output_scale_O=torch.ones(6)), "need lora_A and lora_B"),
        ({1: replace(GOOD[1], prompt_PH=torch.ones(0, 8))}, "shape"),
    ],
)
def test_what_is_wrong_is_named(update, why):
    """By the manifest, or when a shard is read; nothing of it is used."""
    with pytest.raises(InvalidRequest, match=why):
        read(update)


def test_a_manifest_may_promise_no_more_than_the_rules_allow():
    """Bytes and numbers are bounded before a shard is asked for."""
    manifest = pack_update(GOOD, LAYOUT).manifest
    limit = RULES.max_shard_bytes(1)
    for change in ({"num_bytes": limit + 1}, {"num_elements": limit}):
        info = msgspec.structs.replace(manifest.shards[0], **change)
        with pytest.raises(InvalidRequest, match=f"limit {limit} bytes"):
            check_manifest(msgspec.structs.replace(manifest, shards=(info,)), RULES)
    for change in ({"num_blocks": 3}, {"hidden_size": 16}, {"num_virtual": 1}):
        with pytest.raises(InvalidRequest, match="the model has|virtual positions"):
            check_manifest(msgspec.structs.replace(manifest, **change), RULES)


def test_a_rank_that_the_manifest_hides_is_found():
    """Where any rank within the limit will do."""
    rules = replace(RULES, is_rank_fixed=False, max_rank=1)
    packed = pack_update(GOOD, LAYOUT)
    info = msgspec.structs.replace(packed.manifest.shards[0], max_rank=1)
    with pytest.raises(InvalidRequest, match="q has rank 2, limit 1"):
        read_shard(bytearray(packed.shards[1]), info, rules)


def test_an_update_that_fills_its_rank_fits():
    """The bound on bytes has room for names and headers."""
    rules = replace(RULES, max_rank=2)
    assert len(pack_update(GOOD, LAYOUT).shards[1]) <= rules.max_shard_bytes(1)


def test_other_bytes_than_the_manifest_names_are_their_senders_fault():
    """Told apart from an update that is wrong itself."""
    packed = pack_update(GOOD, LAYOUT)
    data = bytearray(packed.shards[1])
    data[-1] ^= 1
    with pytest.raises(HashMismatch):
        read_shard(data, packed.manifest.shards[0], RULES)


def test_the_common_a_is_common_to_the_bit():
    """Or the mean of B would not be the mean of the products."""
    rules = replace(RULES, common_a=GOOD)
    assert read(GOOD, rules)
    with pytest.raises(InvalidRequest, match="block 1, q has an A of its own"):
        read(with_q(a_rI=torch.zeros(2, 8)), rules)
