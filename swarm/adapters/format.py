"""Adapters as bytes: a shard per block in safetensors, and a manifest that names them all by hash.

    BlockDelta --encode_shard--> bytes --sha256--> ShardInfo ┐
                                                             ├─ Manifest --encode--> bytes --sha256--> its name
    base's shape, virtual positions, ... ────────────────────┘
    bytes from a peer --Manifest.decode, decode_shard (sizes, names, shapes, ranks, NaN)--> BlockDelta

An adapter's name is the hash of its manifest, so whoever knows it can take manifest and shards from anybody. A server
asks for the shards of its own blocks only. Everything is checked before memory is allocated for it. It knows no PEFT,
no stores and no network.
"""

import math
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from swarm.adapters.delta import LINEAR_TENSORS, MAX_PREFIX, MAX_RANK, BlockDelta, LinearDelta
from swarm.adapters.layout import BlockShape
from swarm.errors import InvalidRequest
from swarm.protocol import Block, Digest, Text
from swarm.types import MAX_BLOCKS

MAX_MANIFEST_BYTES = 1 << 20
"""Of an encoded manifest: some 200 bytes per block."""
MAX_SHARD_BYTES = 1 << 30
"""Of what an adapter has for one block."""
MAX_SHARD_TENSORS = 4096
_MAX_HEADER_BYTES = 1 << 20
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_PREFIX_K, _PREFIX_V, _PROMPT = "prefix.k", "prefix.v", "prompt"


class HashMismatch(InvalidRequest):
    """Bytes are not those of the name that they were asked for by: whoever sent them is to blame, not the adapter."""


class ShardInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an adapter has for one block."""

    block: Block
    digest: Digest
    num_bytes: Annotated[int, msgspec.Meta(ge=8, le=MAX_SHARD_BYTES)]
    max_rank: Annotated[int, msgspec.Meta(ge=0, le=MAX_RANK)]
    """Largest rank of a linear."""
    num_elements: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARD_BYTES)]
    """Numbers in all tensors: what it takes on a device, times the size of its dtype."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What an adapter is made of."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    method: Text
    """"LORA", "IA3", ...: for people."""
    base: Text
    """What the adapter was trained on, as its author called it: for people."""
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    """Of the base model."""
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    """Of the base model."""
    num_virtual: Annotated[int, msgspec.Meta(ge=0, le=MAX_PREFIX)] = 0
    """Positions [0, P) that the adapter puts before a sequence: the client sends P rows for them like for any token."""
    shards: Annotated[tuple[ShardInfo, ...], msgspec.Meta(max_length=MAX_BLOCKS)]
    """Of the blocks that it changes, ascending."""

    def encode(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @property
    def digest(self) -> str:
        """The adapter's name."""
        return sha256(self.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def within(self, start: int, end: int) -> tuple[ShardInfo, ...]:
        """The shards of blocks [start, end)."""
        return tuple(shard for shard in self.shards if start <= shard.block < end)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, *, digest: str) -> "Manifest":
        """Read a manifest from a peer.

        Raises:
            HashMismatch: it is not the one of that name.
            InvalidRequest: it is malformed.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise InvalidRequest(f"adapter manifest of {len(data)} bytes, limit {MAX_MANIFEST_BYTES}")
        check_digest(data, digest, "adapter manifest")
        try:
            manifest = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"malformed adapter manifest: {error}") from error
        blocks = [shard.block for shard in manifest.shards]
        if blocks != sorted(set(blocks)) or (blocks and blocks[-1] >= manifest.num_blocks):
            raise InvalidRequest(f"the adapter's shards are not of ascending blocks below {manifest.num_blocks}")
        return manifest


def encode_shard(delta: BlockDelta) -> bytes:
    """One block's part of an adapter as safetensors; the same tensors give the same bytes."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, str] = {}
    for path, linear in sorted(delta.linears.items()):
        for name, tensor in linear.tensors().items():
            tensors[f"{path}.{name}"] = tensor.detach().cpu().contiguous()
        if linear.rank:
            scales[f"{path}.scale"] = float(linear.scale).hex()
    for name, own in ((_PREFIX_K, delta.prefix_k_PKD), (_PREFIX_V, delta.prefix_v_PKE), (_PROMPT, delta.prompt_PH)):
        if own is not None:
            tensors[name] = own.detach().cpu().contiguous()
    return _sorted_metadata(save(tensors), scales)


def shard_info(block: int, delta: BlockDelta, data: bytes) -> ShardInfo:
    """How a manifest names this shard."""
    return ShardInfo(
        block=block,
        digest=sha256(data).hexdigest(),
        num_bytes=len(data),
        max_rank=max((linear.rank for linear in delta.linears.values()), default=0),
        num_elements=sum(tensor.numel() for tensor in delta.tensors()),
    )


def decode_shard(
    data: bytes | bytearray | memoryview, info: ShardInfo, shape: BlockShape, num_virtual: int
) -> BlockDelta:
    """Read one block's part of an adapter from a peer.

    Args:
        data: the bytes, already as many as `info` says. Where they can be written to (a bytearray), tensors are views
            into them, so that they take memory once; nobody may change them then.
        info: what the manifest says of them.
        shape: of the block.
        num_virtual: positions that the manifest says the adapter puts before a sequence.

    Raises:
        HashMismatch: other bytes than the manifest names.
        InvalidRequest: tensors that don't fit the block; names which.
    """
    if len(data) != info.num_bytes:
        raise InvalidRequest(f"adapter shard of {len(data)} bytes, {info.num_bytes} declared")
    check_digest(data, info.digest, f"adapter shard of block {info.block}")
    tensors, metadata = _parse(data, info)
    where = f"adapter, block {info.block}"
    parts: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in (_PREFIX_K, _PREFIX_V, _PROMPT):
            own[key] = tensor
            continue
        path, _, name = key.rpartition(".")
        if name not in LINEAR_TENSORS:
            raise InvalidRequest(f"{where}: {key!r} is no tensor of an adapter")
        parts.setdefault(path, {})[name] = tensor
    linears = {path: _linear(path, named, metadata, shape, where) for path, named in parts.items()}
    _check_own(own, shape, num_virtual, where)
    return BlockDelta(
        linears=linears,
        prefix_k_PKD=own.get(_PREFIX_K),
        prefix_v_PKE=own.get(_PREFIX_V),
        prompt_PH=own.get(_PROMPT),
    )


def check_digest(data: bytes | bytearray | memoryview, digest: str, what: str) -> None:
    """Refuse bytes that are not those of this name.

    Raises:
        HashMismatch: they are others.
    """
    found = sha256(data).hexdigest()
    if found != digest:
        raise HashMismatch(f"{what} has hash {found[:12]}, expected {digest[:12]}")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARD_BYTES)]]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def _parse(data: bytes | bytearray | memoryview, info: ShardInfo) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; the tensors are views into `data`, which must not be changed then."""
    where = f"adapter, block {info.block}"
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise InvalidRequest(f"{where}: header of {header_bytes} bytes, limit {_MAX_HEADER_BYTES}")
    try:
        raw = msgspec.json.decode(bytes(data[8 : 8 + header_bytes]), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        if len(raw) > MAX_SHARD_TENSORS:
            raise InvalidRequest(f"{where}: {len(raw)} tensors, limit {MAX_SHARD_TENSORS}")
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{where}: not a safetensors file: {error}") from error
    body = memoryview(data)[8 + header_bytes :]
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != _num_bytes(name, entry, where):
            raise InvalidRequest(f"{where}: {name} lies at {start}:{stop}, expected {end} and its own size")
        end = stop
    if end != len(body):
        raise InvalidRequest(f"{where}: {end} bytes of tensors, the file has {len(body)}")
    tensors = {name: _tensor(name, entry, body, where) for name, entry in entries.items()}
    if sum(tensor.numel() for tensor in tensors.values()) != info.num_elements:
        raise InvalidRequest(f"{where}: not the {info.num_elements} numbers that the manifest declares")
    return tensors, metadata


_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _num_bytes(name: str, entry: _Entry, where: str) -> int:
    dtype = _SAFETENSORS_DTYPES.get(entry.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where}: {name} is {entry.dtype}, expected F32, F16 or BF16")
    if not entry.shape:
        raise InvalidRequest(f"{where}: {name} has shape ()")
    return math.prod(entry.shape) * dtype.itemsize


def _tensor(name: str, entry: _Entry, body: memoryview, where: str) -> Tensor:
    dtype, (start, stop) = _SAFETENSORS_DTYPES[entry.dtype], entry.data_offsets
    piece = body[start:stop]
    is_view = not piece.readonly and _address(piece) % dtype.itemsize == 0
    tensor = torch.frombuffer(piece if is_view else bytearray(piece), dtype=dtype).view(entry.shape)
    if not torch.isfinite(tensor).all():
        raise InvalidRequest(f"{where}: {name} has numbers that are not finite")
    return tensor


def _address(piece: memoryview) -> int:
    return torch.frombuffer(piece, dtype=torch.uint8).data_ptr()


def _linear(
    path: str, named: Mapping[str, Tensor], metadata: Mapping[str, str], shape: BlockShape, where: str
) -> LinearDelta:
    linear = shape.linears.get(path)
    if linear is None:
        raise InvalidRequest(f"{where}: the base model has no linear {path!r} there")
    a, b = named.get("lora_A"), named.get("lora_B")
    if (a is None) != (b is None):
        raise InvalidRequest(f"{where}: {path} has one of lora_A and lora_B without the other")
    rank = 0 if a is None else a.shape[0]
    if rank > MAX_RANK:
        raise InvalidRequest(f"{where}: {path} has rank {rank}, limit {MAX_RANK}")
    inputs, outputs = linear.num_inputs, linear.num_outputs
    expected = {
        "lora_A": (rank, inputs),
        "lora_B": (outputs, rank),
        "input_scale": (inputs,),
        "output_scale": (outputs,),
        "magnitude": (outputs,),
        "bias": (outputs,),
        "base_bias": (outputs,),
    }
    for name, tensor in named.items():
        if tuple(tensor.shape) != expected[name]:
            raise InvalidRequest(f"{where}: {path}.{name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
    if "magnitude" in named and (a is None or "output_scale" in named):
        raise InvalidRequest(f"{where}: {path} has a magnitude, which goes with lora_A and without output_scale")
    tensors = {LINEAR_TENSORS[name]: tensor for name, tensor in named.items()}
    scale = _scale(path, metadata, where) if rank else 1.0
    return LinearDelta(scale=scale, **tensors)


def _scale(path: str, metadata: Mapping[str, str], where: str) -> float:
    try:
        scale = float.fromhex(metadata.get(f"{path}.scale", ""))
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{where}: {path} has no scale") from error
    if not math.isfinite(scale):
        raise InvalidRequest(f"{where}: {path} has scale {scale}")
    return scale


def _check_own(own: Mapping[str, Tensor], shape: BlockShape, num_virtual: int, where: str) -> None:
    if (_PREFIX_K in own) != (_PREFIX_V in own):
        raise InvalidRequest(f"{where}: a prefix needs keys and values")
    if _PREFIX_K in own and shape.kv_shape is None:
        raise InvalidRequest(f"{where}: the block has no attention, so it can have no prefix")
    heads, key_width, value_width = shape.kv_shape or (0, 0, 0)
    expected = {
        _PREFIX_K: (num_virtual, heads, key_width),
        _PREFIX_V: (num_virtual, heads, value_width),
        _PROMPT: (num_virtual, shape.hidden_size),
    }
    for name, tensor in own.items():
        if tuple(tensor.shape) != expected[name]:
            raise InvalidRequest(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")


def _sorted_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with this metadata, in an order that does not depend on anything else."""
    length = int.from_bytes(data[:8], "little")
    header = msgspec.json.decode(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = msgspec.json.encode(header, order="sorted")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
