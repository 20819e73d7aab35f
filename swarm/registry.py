"""Who serves which blocks of which model: one small signed record per server, in the DHT.

Records of a model are spread over 16 keys by the server's id, so that no key grows with the swarm. The DHT layer
signs what a peer stores under its own id and drops what is not (swarm.network.records); here records are packed, and
read with suspicion: what a peer says of itself is checked field by field, and a record that breaks a rule does not
exist.

    server --announce--> DHT key "swarm/servers/v1/MODEL/SHARD", subkey PEER_ID --lookup--> client, other servers
"""

import logging
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from swarm.adapters.notes import AdapterNote, pack_notes, unpack_notes
from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.network import Node
from swarm.types import BlockRange, ServerState

log = logging.getLogger(__name__)

NUM_SHARDS = 16
MAX_RECORD_BYTES = 512
"""Packed record, without its signature."""
MAX_TTL_S = 3600.0
CLOCK_SKEW_S = 60.0
"""How far in the future of MAX_TTL_S a record may expire, by our clock."""
MAX_NAME_BYTES = 32
"""Longest public name, dtype, quantization or version, in UTF-8."""
MAX_DECODE_TPS = 1e9
MAX_KV_TOKENS = (1 << 48) - 1

_FORMAT = 2
_head = struct.Struct("!BBHHffQd")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """What a server says of itself.

    Attributes:
        peer_id: its identity.
        model: content digest of the checkpoint (64 hex digits).
        blocks: the blocks that it holds.
        state: JOINING, ONLINE, DRAINING or OFFLINE.
        decode_tps: tokens per second through one block at batch size 1.
        load: share of its capacity in use, 0 to 1.
        kv_free_tokens: tokens of KV cache that are free.
        quantization: "none", "int8", "nf4".
        dtype: of its weights and outputs.
        public_name: chosen by its owner, at most 32 bytes of UTF-8.
        version: of its software.
        expires_at: unix time after which the record is void.
        adapters: those that it has, the most recently used ones.

    Raises:
        InvalidRequest: for a field out of range.
    """

    peer_id: str
    model: str
    blocks: BlockRange
    state: ServerState
    decode_tps: float
    load: float
    kv_free_tokens: int
    quantization: str
    dtype: str
    public_name: str
    version: str
    expires_at: float
    adapters: tuple[AdapterNote, ...] = ()

    def __post_init__(self) -> None:
        _require(0.0 <= self.decode_tps <= MAX_DECODE_TPS, f"decode_tps {self.decode_tps}, range 0..{MAX_DECODE_TPS:g}")
        _require(0.0 <= self.load <= 1.0, f"load {self.load}, range 0..1")
        _require(0 <= self.kv_free_tokens <= MAX_KV_TOKENS, f"{self.kv_free_tokens} free tokens, limit {MAX_KV_TOKENS}")
        _require(math.isfinite(self.expires_at) and self.expires_at >= 0, f"expires_at {self.expires_at}")
        for text in (self.quantization, self.dtype, self.public_name, self.version):
            size = len(text.encode(errors="surrogatepass"))
            is_fine = size <= MAX_NAME_BYTES and text.isprintable()
            _require(is_fine, f"text {text!r} of {size} bytes, limit {MAX_NAME_BYTES} printable ones")

    def encode(self) -> bytes:
        """The record without its peer id and model, which are the DHT's subkey and key: 40 bytes and the texts."""
        parts = [
            _head.pack(
                _FORMAT,
                self.state,
                self.blocks.start,
                self.blocks.end,
                self.decode_tps,
                self.load,
                self.kv_free_tokens,
                self.expires_at,
            )
        ]
        for text in (self.quantization, self.dtype, self.public_name, self.version):
            data = text.encode()
            parts += (bytes([len(data)]), data)
        return b"".join((*parts, pack_notes(self.adapters)))

    @classmethod
    def decode(cls, data: bytes, *, peer_id: str, model: str) -> "ServerRecord":
        """Read a record that `peer_id` signed for `model`.

        Raises:
            PeerMisbehaved: when it is malformed, or a field is out of range.
        """
        try:
            if len(data) > MAX_RECORD_BYTES:
                raise InvalidRequest(f"{len(data)} bytes, limit {MAX_RECORD_BYTES}")
            form, state, start, end, decode_tps, load, kv_free_tokens, expires_at = _head.unpack_from(data)
            if form != _FORMAT:
                raise InvalidRequest(f"format {form}, known is {_FORMAT}")
            (quantization, dtype, public_name, version), rest = _texts(data[_head.size :])
            return cls(
                peer_id=peer_id,
                model=model,
                blocks=BlockRange(start, end),
                state=ServerState(state),
                decode_tps=decode_tps,
                load=load,
                kv_free_tokens=kv_free_tokens,
                quantization=quantization,
                dtype=dtype,
                public_name=public_name,
                version=version,
                expires_at=expires_at,
                adapters=unpack_notes(rest),
            )
        except (InvalidRequest, ValueError, struct.error) as error:
            raise PeerMisbehaved(f"bad record of {peer_id}: {error}", peer_id=peer_id) from error


class Registry:
    """Announces our record and looks up everybody's.

    Args:
        node: signs what we announce, and finds what others did.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    async def announce(self, record: ServerRecord, ttl_s: float) -> bool:
        """Publish our own record for `ttl_s` seconds, replacing the last one. False when no node took it.

        Raises:
            InvalidRequest: when the record is another peer's, or lives too long.
        """
        _require(record.peer_id == self._node.peer_id, f"record of {record.peer_id}, we are {self._node.peer_id}")
        _require(0 < ttl_s <= MAX_TTL_S, f"ttl of {ttl_s} s, range 0..{MAX_TTL_S:g}")
        key = shard_key(record.model, shard_of(record.peer_id))
        return await self._node.dht_store(key, record.peer_id, record.encode(), record.expires_at)

    async def lookup(self, model: str) -> list[ServerRecord]:
        """The valid records of a model, one per server, without those that are OFFLINE or have expired.

        Raises:
            PeerTimeout: when the search does not end in time.
        """
        keys = [shard_key(model, shard) for shard in range(NUM_SHARDS)]
        found = await self._node.dht_get_many(keys)
        now = time.time()
        return [
            record
            for shard, key in enumerate(keys)
            for record in read_shard(found[key], model=model, shard=shard)
            if record.state is not ServerState.OFFLINE and now < record.expires_at <= now + MAX_TTL_S + CLOCK_SKEW_S
        ]


def read_shard(values: dict[str, bytes], *, model: str, shard: int) -> Iterator[ServerRecord]:
    """The records among the values under one key; bad ones, and those in the wrong shard, are left out."""
    for peer_id, value in values.items():
        try:
            if shard_of(peer_id) != shard:
                raise PeerMisbehaved(f"record of {peer_id} in shard {shard}", peer_id=peer_id)
            yield ServerRecord.decode(value, peer_id=peer_id, model=model)
        except PeerMisbehaved as error:
            log.debug("ignored: %s", error)


def shard_of(peer_id: str) -> int:
    """The shard that holds a peer's record."""
    return blake2b(peer_id.encode(errors="replace"), digest_size=1).digest()[0] % NUM_SHARDS


def shard_key(model: str, shard: int) -> str:
    """The DHT key of a shard."""
    return f"swarm/servers/v1/{model}/{shard}"


def _texts(data: bytes) -> tuple[list[str], bytes]:
    """Four strings, each behind a byte that holds its length, and what comes after them."""
    texts, position = [], 0
    for _ in range(4):
        if position >= len(data) or position + 1 + data[position] > len(data):
            raise InvalidRequest("cut short")
        texts.append(data[position + 1 : position + 1 + data[position]].decode())
        position += 1 + data[position]
    return texts, data[position:]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)
