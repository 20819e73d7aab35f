"""An adapter's bytes say the same to everybody, and no bytes from a stranger do harm."""

import json
import random
from hashlib import sha256

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.adapters.delta import MAX_RANK, BlockDelta, LinearDelta
from swarm.adapters.format import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardInfo,
    decode_shard,
    encode_shard,
    shard_info,
)
from swarm.adapters.layout import BlockShape, LinearShape
from swarm.errors import InvalidRequest

SHAPE = BlockShape(
    hidden_size=6,
    linears={"attn.q": LinearShape(num_inputs=6, num_outputs=4), "mlp.up": LinearShape(num_inputs=6, num_outputs=10)},
    kv_shape=(2, 3, 5),
)
NUM_VIRTUAL = 4
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def linear_deltas(draw, shape):
    """Any parts that go together."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def tensor(*size):
        return torch.randn(*size, generator=generator).to(draw(DTYPES))

    rank = draw(st.integers(0, 5))
    magnitude = rank > 0 and draw(st.booleans())
    wanted = {name: draw(st.booleans()) for name in ("input_scale_I", "output_scale_O", "bias_O", "base_bias_O")}
    vectors = {
        name: tensor(shape.num_inputs if name == "input_scale_I" else shape.num_outputs)
        for name, there in wanted.items()
        if there and not (name == "output_scale_O" and magnitude)
    }
    if rank:
        vectors |= {"a_rI": tensor(rank, shape.num_inputs), "b_Or": tensor(shape.num_outputs, rank)}
        vectors["scale"] = draw(st.floats(-1e6, 1e6, allow_subnormal=False))
    if magnitude:
        vectors["magnitude_O"] = tensor(shape.num_outputs)
    return LinearDelta(**vectors)


@st.composite
def deltas(draw):
    """Whatever an adapter may do to a block of SHAPE."""
    linears = {path: draw(linear_deltas(shape)) for path, shape in SHAPE.linears.items() if draw(st.booleans())}
    own = {}
    if draw(st.booleans()):
        own = {"prefix_k_PKD": torch.randn(NUM_VIRTUAL, 2, 3), "prefix_v_PKE": torch.randn(NUM_VIRTUAL, 2, 5)}
    if draw(st.booleans()):
        own["prompt_PH"] = torch.randn(NUM_VIRTUAL, 6)
    return BlockDelta(linears={path: it for path, it in linears.items() if it.tensors()}, **own)


def read(data, info=None, delta=None, shape=SHAPE):
    if info is None:
        info = shard_info(3, delta or small(), data)
    return decode_shard(bytes(data), info, shape, NUM_VIRTUAL)


def small(**changes):
    fields = {"a_rI": torch.ones(2, 6), "b_Or": torch.ones(4, 2), "scale": 0.5}
    return BlockDelta(linears={"attn.q": LinearDelta(**{**fields, **changes})})


@settings(max_examples=50)
@given(delta=deltas())
def test_a_shard_comes_back_as_it_was(delta):
    """All tensors to the bit, and scales; the same tensors give the same bytes, so the same name."""
    data = encode_shard(delta)
    assert encode_shard(delta) == data
    back = read(data, delta=delta)
    assert dict(back.linears).keys() == dict(delta.linears).keys()
    for path, linear in delta.linears.items():
        assert back.linears[path].scale == (linear.scale if linear.rank else 1.0)
        for name, tensor in linear.tensors().items():
            assert torch.equal(back.linears[path].tensors()[name], tensor)
    for name in ("prefix_k_PKD", "prefix_v_PKE", "prompt_PH"):
        one, other = getattr(delta, name), getattr(back, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 30))
def test_damaged_shards_are_refused_or_read_within_bounds(seed):
    """Bytes changed at random, whatever name they go by: an InvalidRequest or a fitting delta, nothing else."""
    dice = random.Random(seed)
    data = bytearray(encode_shard(small()))
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(dice.choice([16, len(data)]))] = dice.randrange(256)
    if dice.random() < 0.3:
        del data[dice.randrange(8, len(data)) :]
    try:
        delta = read(data)
    except InvalidRequest:
        return
    assert all(torch.isfinite(tensor).all() for tensor in delta.tensors())


def test_other_bytes_than_the_manifest_names_are_refused():
    """Truncated, longer, or changed in one place."""
    data = encode_shard(small())
    info = shard_info(3, small(), data)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    for wrong, message in ((data[:-1], "bytes"), (data + b"\0", "bytes"), (changed, "has hash")):
        with pytest.raises(InvalidRequest, match=message):
            read(wrong, info)


def with_header(change):
    """A shard whose header was edited, under its own right name."""
    data = encode_shard(small())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


A = "attn.q.lora_A"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[A].update(shape=[1 << 40, 1 << 40]),
        lambda header: header[A].update(shape=[-2, -6]),
        lambda header: header[A].update(shape=[6, 2]),
        lambda header: header[A].update(shape=[]),
        lambda header: header[A].update(dtype="F64"),
        lambda header: header[A].update(dtype="I8"),
        lambda header: header[A].update(data_offsets=[0, 1 << 60]),
        lambda header: header[A].update(data_offsets=[48, 0]),
        lambda header: header[A].update(data_offsets=header["attn.q.lora_B"]["data_offsets"]),
        lambda header: header.update({"attn.q.lora_C": header.pop(A)}),
        lambda header: header.update({"attn.k.lora_A": header.pop(A)}),
        lambda header: header.update({"prompt": header.pop(A)}),
        lambda header: header.pop(A),
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].update({"attn.q.scale": "nan"}),
        lambda header: header["__metadata__"].update({"attn.q.scale": "inf"}),
        lambda header: header["__metadata__"].update({"attn.q.scale": "one"}),
        lambda header: header.update({f"x{i}": header[A] for i in range(5000)}),
    ],
)
def test_a_header_that_lies_is_refused(change):
    """Sizes beyond the file, overlaps, unknown names and types, a scale that is no number."""
    with pytest.raises(InvalidRequest):
        read(with_header(change))


@pytest.mark.parametrize("start", [b"", b"\0" * 4, b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\2\0\0\0\0\0\0\0[]"])
def test_what_is_no_safetensors_file_is_refused(start):
    """Nothing is allocated for a header on its own word."""
    data = start.ljust(8, b"\0") + b"{" * 64
    with pytest.raises(InvalidRequest):
        read(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_rI": torch.full((2, 6), float("nan"))}, "not finite"),
        ({"b_Or": torch.full((4, 2), float("inf"))}, "not finite"),
        ({"a_rI": torch.ones(3, 6)}, r"lora_B has shape \(4, 2\), expected \(4, 3\)"),
        ({"bias_O": torch.ones(5)}, r"bias has shape \(5,\), expected \(4,\)"),
        ({"magnitude_O": torch.ones(4), "output_scale_O": torch.ones(4)}, "without output_scale"),
        ({"a_rI": torch.ones(MAX_RANK + 1, 6), "b_Or": torch.ones(4, MAX_RANK + 1)}, "rank 513, limit 512"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes, message):
    """With the block, the linear and both shapes."""
    delta = small(**changes)
    data = encode_shard(delta)
    info = ShardInfo(block=3, digest=shard_info(3, small(), data).digest, num_bytes=len(data), max_rank=2,
                     num_elements=sum(it.numel() for it in delta.tensors()))  # fmt: skip
    with pytest.raises(InvalidRequest, match=rf"adapter, block 3: .*{message}"):
        read(data, info)


def test_prefixes_fit_the_virtual_positions_and_the_attention():
    """Keys and values come together, as many as the manifest says, for a block that has attention."""
    k, v = torch.ones(NUM_VIRTUAL, 2, 3), torch.ones(NUM_VIRTUAL, 2, 5)
    blind = BlockShape(hidden_size=6, linears={}, kv_shape=None)
    for delta, shape, message in (
        (BlockDelta(prefix_k_PKD=k), SHAPE, "needs keys and values"),
        (BlockDelta(prefix_k_PKD=k[:3], prefix_v_PKE=v[:3]), SHAPE, r"shape \(3, 2, .\), expected \(4, 2, .\)"),
        (BlockDelta(prefix_k_PKD=k, prefix_v_PKE=v), blind, "has no attention"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read(encode_shard(delta), delta=delta, shape=shape)


def manifest(**changes):
    shards = tuple(
        ShardInfo(block=block, digest="ab" * 32, num_bytes=100, max_rank=4, num_elements=10) for block in (1, 3)
    )
    fields = {"method": "LORA", "base": "b", "num_blocks": 4, "hidden_size": 6, "shards": shards, **changes}
    return Manifest(**fields)


def test_a_manifest_is_named_by_its_bytes():
    """It comes back as it was, and says which shards a server needs."""
    one = manifest()
    assert Manifest.decode(one.encode(), digest=one.digest) == one
    assert one.num_bytes == 200
    assert [shard.block for shard in one.within(2, 4)] == [3]
    with pytest.raises(InvalidRequest, match="has hash"):
        Manifest.decode(one.encode(), digest=manifest(base="c").digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 3},
        {"num_blocks": 0},
        {"hidden_size": 0},
        {"num_virtual": 1 << 20},
        {"version": 2},
        {"method": "x" * 2000},
        {"shards": manifest().shards[::-1]},
        {"shards": manifest().shards[:1] * 2},
        {"shards": (msgspec.structs.replace(manifest().shards[0], max_rank=MAX_RANK + 1),)},
        {"shards": (msgspec.structs.replace(manifest().shards[0], num_bytes=1 << 40),)},
        {"shards": (msgspec.structs.replace(manifest().shards[0], digest="ab"),)},
    ],
)
def test_a_manifest_out_of_bounds_is_refused(changes):
    """Blocks that aren't there or come twice, absurd ranks and sizes."""
    wrong = manifest(**changes)
    with pytest.raises(InvalidRequest):
        Manifest.decode(wrong.encode(), digest=wrong.digest)


def test_a_manifest_of_any_bytes_is_refused():
    """Too long, or no msgpack."""
    for data in (b"", b"\xc1", b"\x90", b"\0" * (MAX_MANIFEST_BYTES + 1)):
        with pytest.raises(InvalidRequest):
            Manifest.decode(data, digest=sha256(data).hexdigest())
