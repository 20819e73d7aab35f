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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from swarm.adapters.notes import AdapterNote, pack_notes, unpack_notes
from swarm.coordinates import Place
from swarm.errors import InvalidRequest, PeerMisbehaved, PeerTimeout
from swarm.identity import KEY_BYTES, is_peer_id, key_of, peer_id_of
from swarm.network import Node
from swarm.types import MAX_BLOCKS, BlockRange, ServerState

log = logging.getLogger(__name__)

NUM_SHARDS = 16
MAX_RECORD_BYTES = 512
"""Packed record, without its signature."""
MAX_TTL_S = 3600.0
TTL_PERIODS = 3
"""A record outlives so many of its periods without being renewed."""
LATE_S = 3.0
"""A record that was not renewed so long after its period is doubtful."""
CLOCK_SKEW_S = 10.0
"""How much longer than its TTL_PERIODS a record may live, by our clock."""
MAX_NAME_BYTES = 32
"""Longest public name, dtype, quantization or version, in UTF-8."""
MAX_TPS = 1e9
MAX_KV_TOKENS = (1 << 32) - 1
MAX_PINGS = 8
MAX_RELAYS = 3
MAX_PERIOD_S = 1200.0
MAX_TIME_S = 6.5535
"""Longest queue or round trip that a record can name."""

_FORMAT = 4
_head = struct.Struct("!BBHHBfffBHIHd")
_place = struct.Struct("!hhhHB")
_ping = struct.Struct("!IH")
_RELAYED, _PLACED = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """A round trip that a server has measured to another one.

    Attributes:
        tag: the other one's `peer_tag`.
        rtt_s: round trip in seconds.
    """

    tag: int
    rtt_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """What a server says of itself.

    Attributes:
        peer_id: its identity.
        model: content digest of the checkpoint (64 hex digits).
        blocks: the blocks that it holds.
        state: JOINING, ONLINE, DRAINING or OFFLINE.
        decode_tps: tokens per second through one block that one session gets now.
        batch_tps: tokens per second through one block that all sessions get together from full batches.
        prefill_tps: tokens per second through one block in large batches of prompts.
        load: share of its capacity in use, 0 to 1.
        queue_s: how long a step waits there now, besides its own computation.
        kv_free_tokens: tokens of KV cache that are free.
        is_relayed: whether others reach it through relays only: nobody can connect to it.
        relays: peers that carry connections to it now, where it is relayed; the nearest first.
        place: where it is in the network, if it knows.
        pings: round trips to servers that may follow it in a chain.
        quantization: "none", "int8", "nf4".
        dtype: of its weights and outputs.
        public_name: chosen by its owner, at most 32 bytes of UTF-8.
        version: of its software.
        period_s: how often it renews this record.
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
    batch_tps: float = 0.0
    prefill_tps: float = 0.0
    load: float
    queue_s: float = 0.0
    kv_free_tokens: int
    is_relayed: bool = False
    relays: tuple[str, ...] = ()
    place: Place | None = None
    pings: tuple[Ping, ...] = ()
    quantization: str
    dtype: str
    public_name: str
    version: str
    period_s: float = 20.0
    expires_at: float
    adapters: tuple[AdapterNote, ...] = ()

    def __post_init__(self) -> None:
        for name in ("decode_tps", "batch_tps", "prefill_tps"):
            value = getattr(self, name)
            _require(0.0 <= value <= MAX_TPS, f"{name} {value}, range 0..{MAX_TPS:g}")
        _require(0.0 <= self.load <= 1.0, f"load {self.load}, range 0..1")
        _require(0.0 <= self.queue_s <= MAX_TIME_S, f"queue_s {self.queue_s}, range 0..{MAX_TIME_S}")
        _require(0 <= self.kv_free_tokens <= MAX_KV_TOKENS, f"{self.kv_free_tokens} free tokens, limit {MAX_KV_TOKENS}")
        _require(len(self.pings) <= MAX_PINGS, f"{len(self.pings)} pings, limit {MAX_PINGS}")
        _require(len(self.relays) <= MAX_RELAYS * self.is_relayed, f"{len(self.relays)} relays, limit {MAX_RELAYS}")
        _require(all(map(is_peer_id, self.relays)), f"relays {self.relays}")
        _require(all(0.0 <= ping.rtt_s <= MAX_TIME_S for ping in self.pings), f"pings {self.pings}")
        _require(0.1 <= self.period_s <= MAX_PERIOD_S, f"period_s {self.period_s}, range 0.1..{MAX_PERIOD_S:g}")
        _require(math.isfinite(self.expires_at) and self.expires_at >= 0, f"expires_at {self.expires_at}")
        for text in (self.quantization, self.dtype, self.public_name, self.version):
            size = len(text.encode(errors="surrogatepass"))
            is_fine = size <= MAX_NAME_BYTES and text.isprintable()
            _require(is_fine, f"text {text!r} of {size} bytes, limit {MAX_NAME_BYTES} printable ones")

    def is_valid(self, now: float) -> bool:
        """Whether it may be believed at this unix time: not expired, nor good for longer than it may be."""
        return now < self.expires_at <= now + TTL_PERIODS * self.period_s + CLOCK_SKEW_S

    def is_late(self, now: float) -> bool:
        """Whether the server should have renewed it by this unix time: perhaps it is gone."""
        return now > self.expires_at - (TTL_PERIODS - 1) * self.period_s + LATE_S

    def encode(self) -> bytes:
        """The record without its peer id and model, which are the DHT's subkey and key: 50 bytes and what varies."""
        parts = [
            _head.pack(
                _FORMAT,
                self.state,
                self.blocks.start,
                self.blocks.end,
                _RELAYED * self.is_relayed + _PLACED * (self.place is not None),
                self.decode_tps,
                self.batch_tps,
                self.prefill_tps,
                round(self.load * 255),
                _ticks(self.queue_s),
                self.kv_free_tokens,
                round(self.period_s * 10),
                self.expires_at,
            )
        ]
        if self.place is not None:
            ticks = (_ticks(value) for value in (*self.place.position, self.place.height_s))
            parts.append(_place.pack(*ticks, round(self.place.error * 255)))
        if self.is_relayed:
            parts += (bytes([len(self.relays)]), *map(key_of, self.relays))
        parts.append(bytes([len(self.pings)]))
        parts += (_ping.pack(ping.tag, _ticks(ping.rtt_s)) for ping in self.pings)
        for text in (self.quantization, self.dtype, self.public_name, self.version):
            data = text.encode()
            parts += (bytes([len(data)]), data)
        return b"".join((*parts, pack_notes(self.adapters)))

    @classmethod
    def decode(cls, data: bytes, *, peer_id: str, model: str, num_blocks: int = MAX_BLOCKS) -> "ServerRecord":
        """Read a record that `peer_id` signed for `model`, which has `num_blocks` blocks.

        Raises:
            PeerMisbehaved: when it is malformed, or a field is out of range.
        """
        try:
            if len(data) > MAX_RECORD_BYTES:
                raise InvalidRequest(f"{len(data)} bytes, limit {MAX_RECORD_BYTES}")
            (form, state, start, end, flags, decode_tps, batch_tps, prefill_tps, load, queue, kv_free_tokens, period,
             expires_at) = _head.unpack_from(data)  # fmt: skip
            if form != _FORMAT:
                raise InvalidRequest(f"format {form}, known is {_FORMAT}")
            if end > num_blocks:
                raise InvalidRequest(f"blocks {start}:{end}, the model has 0:{num_blocks}")
            place, position = _read_place(data, _head.size) if flags & _PLACED else (None, _head.size)
            relays, position = _read_relays(data, position) if flags & _RELAYED else ((), position)
            pings, position = _read_pings(data, position)
            (quantization, dtype, public_name, version), rest = _read_texts(data[position:])
            return cls(
                peer_id=peer_id,
                model=model,
                blocks=BlockRange(start, end),
                state=ServerState(state),
                decode_tps=decode_tps,
                batch_tps=batch_tps,
                prefill_tps=prefill_tps,
                load=load / 255,
                queue_s=_seconds(queue),
                kv_free_tokens=kv_free_tokens,
                is_relayed=bool(flags & _RELAYED),
                relays=relays,
                place=place,
                pings=pings,
                quantization=quantization,
                dtype=dtype,
                public_name=public_name,
                version=version,
                period_s=period / 10,
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

    async def lookup(self, model: str, *, num_blocks: int = MAX_BLOCKS) -> list[ServerRecord]:
        """The valid records of a model, one per server, without those that are OFFLINE or have expired.

        Args:
            model: content digest of the checkpoint.
            num_blocks: of the model; records that go beyond are refused.

        Raises:
            PeerTimeout: when some could not be read.
        """
        shards = await self.lookup_shards(model, range(NUM_SHARDS), num_blocks=num_blocks)
        found = [records for records in shards if records is not None]
        if len(found) < NUM_SHARDS:
            raise PeerTimeout(f"{len(found)} of {NUM_SHARDS} shards of the records could be read")
        return [record for records in found for record in records]

    async def lookup_shards(
        self, model: str, shards: Collection[int], *, num_blocks: int = MAX_BLOCKS
    ) -> Sequence[list[ServerRecord] | None]:
        """As `lookup`, of some shards, in the order asked for; None for one that could not be read.

        Raises:
            PeerTimeout: when none could be read.
        """
        keys = [shard_key(model, shard) for shard in shards]
        found = await self._node.dht_get_many(keys)
        now = time.time()
        records = [
            [
                record
                for record in read_shard(found[key], model=model, shard=shard, num_blocks=num_blocks)
                if record.state is not ServerState.OFFLINE and record.is_valid(now)
            ]
            if key in found
            else None
            for shard, key in zip(shards, keys, strict=True)
        ]
        for record in (it for shard in records for it in shard or ()):
            self._node.relays.learn(record.peer_id, record.relays)
        return records


def read_shard(
    values: dict[str, bytes], *, model: str, shard: int, num_blocks: int = MAX_BLOCKS
) -> Iterator[ServerRecord]:
    """The records among the values under one key; bad ones, and those in the wrong shard, are left out."""
    for peer_id, value in values.items():
        try:
            if shard_of(peer_id) != shard:
                raise PeerMisbehaved(f"record of {peer_id} in shard {shard}", peer_id=peer_id)
            yield ServerRecord.decode(value, peer_id=peer_id, model=model, num_blocks=num_blocks)
        except PeerMisbehaved as error:
            log.debug("ignored: %s", error)


def peer_tag(peer_id: str) -> int:
    """Four bytes that stand for a peer in `pings`."""
    return int.from_bytes(blake2b(peer_id.encode(errors="replace"), digest_size=4).digest())


def shard_of(peer_id: str) -> int:
    """The shard that holds a peer's record."""
    return blake2b(peer_id.encode(errors="replace"), digest_size=1).digest()[0] % NUM_SHARDS


def shard_key(model: str, shard: int) -> str:
    """The DHT key of a shard."""
    return f"swarm/servers/v1/{model}/{shard}"


def _ticks(seconds: float) -> int:
    """Seconds as a number of 0.1 ms."""
    return round(seconds * 10_000)


def _seconds(ticks: int) -> float:
    return ticks / 10_000


def _read_place(data: bytes, position: int) -> tuple[Place, int]:
    x, y, z, height, error = _place.unpack_from(data, position)
    place = Place(position=(_seconds(x), _seconds(y), _seconds(z)), height_s=_seconds(height), error=error / 255)
    return place, position + _place.size


def _read_relays(data: bytes, position: int) -> tuple[tuple[str, ...], int]:
    if position >= len(data) or data[position] > MAX_RELAYS:
        raise InvalidRequest(f"cut short, or more than {MAX_RELAYS} relays")
    starts = range(position + 1, position + 1 + data[position] * KEY_BYTES, KEY_BYTES)
    keys = [data[start : start + KEY_BYTES] for start in starts]
    if any(len(key) != KEY_BYTES for key in keys):
        raise InvalidRequest("cut short")
    return tuple(map(peer_id_of, keys)), position + 1 + len(keys) * KEY_BYTES


def _read_pings(data: bytes, position: int) -> tuple[tuple[Ping, ...], int]:
    if position >= len(data) or data[position] > MAX_PINGS:
        raise InvalidRequest(f"cut short, or more than {MAX_PINGS} pings")
    starts = range(position + 1, position + 1 + data[position] * _ping.size, _ping.size)
    pairs = [_ping.unpack_from(data, start) for start in starts]
    pings = tuple(Ping(tag=tag, rtt_s=_seconds(ticks)) for tag, ticks in pairs)
    return pings, position + 1 + len(pings) * _ping.size


def _read_texts(data: bytes) -> tuple[list[str], bytes]:
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
