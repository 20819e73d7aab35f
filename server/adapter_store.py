"""Adapters in host memory: the shards of this server's blocks, checked, under a budget and with a quota per client.

    pin(digest, client) ─ a session uses it ─► add(manifest) ─► reserve ─► put(shard) ... ─► complete
                                                          └─ no room: the least recently used without sessions go

What a session uses stays until that session ends, whatever others bring. A client's quota counts what is here for its
sake: what was brought for its sessions, as long as nobody else alone uses it. Its own unused adapters go before those
of others. Pure bookkeeping: bytes come from `server.adapter_loader`, and lie on the device as well where
`server.residency` says so.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from swarm.adapters.delta import BlockDelta
from swarm.adapters.format import Manifest, ShardInfo
from swarm.errors import PeerBusy
from swarm.types import BlockRange

ADAPTER_BYTES = 1 << 30
"""Host memory for adapters."""
MAX_CLIENT_SHARE = 0.5
"""Part of it that one client may have."""
RETRY_S = 10.0
"""A client that finds no room is told to come back after so long."""
NEVER_S = 3600.0
"""... and one whose adapter will never have room here, to try again then."""
OWNER = ""
"""Stands for this server itself: what it was started with has no quota."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldShard:
    """What an adapter has for one block."""

    data: bytes | bytearray
    """As others may ask for it."""
    delta: BlockDelta
    """The same, read: views into `data`."""


@dataclass(slots=True, kw_only=True, eq=False)
class HeldAdapter:
    """One adapter; made by `AdapterStore.add`."""

    digest: str
    manifest: Manifest
    manifest_bytes: bytes
    owner: str
    """For whose sake it is here."""
    shards: dict[int, HeldShard] = field(default_factory=dict)
    reserved_bytes: int = 0
    """For shards that are on their way."""

    @property
    def num_bytes(self) -> int:
        """Memory of what is here, and of what is on its way."""
        return len(self.manifest_bytes) + self.reserved_bytes + sum(len(shard.data) for shard in self.shards.values())

    def missing(self, blocks: BlockRange) -> tuple[ShardInfo, ...]:
        """What it has for these blocks and is not here."""
        return tuple(info for info in self.manifest.within(blocks.start, blocks.end) if info.block not in self.shards)

    def max_rank(self, blocks: BlockRange) -> int:
        """Largest rank of a linear in these blocks."""
        return max((info.max_rank for info in self.manifest.within(blocks.start, blocks.end)), default=0)

    def deltas(self, blocks: BlockRange) -> dict[int, BlockDelta]:
        """What it does to these blocks."""
        return {block: shard.delta for block, shard in self.shards.items() if block in blocks}


class AdapterStore:
    """See the module.

    Args:
        limit_bytes: of host memory, for all adapters.
        client_share: part of it that one client may have.
        on_evicted: told the digest of each adapter that had to go.
    """

    def __init__(
        self,
        limit_bytes: int = ADAPTER_BYTES,
        *,
        client_share: float = MAX_CLIENT_SHARE,
        on_evicted: Callable[[str], None] = lambda digest: None,
    ):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.num_evicted = 0
        """Since the start."""
        self._quota_bytes = int(client_share * limit_bytes)
        self._on_evicted = on_evicted
        self._adapters: OrderedDict[str, HeldAdapter] = OrderedDict()
        self._users: dict[str, Counter[str]] = {}
        self._bytes_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[HeldAdapter]:
        """The most recently used first."""
        return reversed(self._adapters.values())

    def __repr__(self) -> str:
        return f"<AdapterStore {len(self)} adapters | {self.used_bytes}/{self.limit_bytes} bytes>"

    def bytes_of(self, client: str) -> int:
        """Memory that counts as this client's."""
        return self._bytes_of[client]

    def find(self, digest: str) -> HeldAdapter | None:
        """An adapter, or what is here of it, as the most recently used."""
        held = self._adapters.get(digest)
        if held is not None:
            self._adapters.move_to_end(digest)
        return held

    # -- who uses it --------------------------------------------------------------------------------------------

    def pin(self, digest: str, client: str) -> None:
        """A session of this client uses the adapter from now on, once it is here."""
        self._users.setdefault(digest, Counter())[client] += 1

    def unpin(self, digest: str, client: str) -> None:
        """The session has ended."""
        users = self._users[digest]
        users[client] -= 1
        if not users[client]:
            del users[client]
        if not users:
            del self._users[digest]
        held = self.find(digest)
        if held is not None and users and held.owner != OWNER and held.owner not in users:
            self._charge(held, next(iter(users)))  # others alone use it now

    def is_pinned(self, held: HeldAdapter) -> bool:
        """Whether it must stay."""
        return held.owner == OWNER or held.reserved_bytes > 0 or held.digest in self._users

    # -- what is here -------------------------------------------------------------------------------------------

    def add(self, manifest: Manifest, manifest_bytes: bytes, *, client: str) -> HeldAdapter:
        """Begin to keep an adapter of which nothing is here.

        Raises:
            PeerBusy: there is no room, see `reserve`.
        """
        digest = manifest.digest
        self._make_room(len(manifest_bytes), client)
        held = HeldAdapter(digest=digest, manifest=manifest, manifest_bytes=manifest_bytes, owner=client)
        self._adapters[digest] = held
        self._count(held, len(manifest_bytes))
        return held

    def reserve(self, held: HeldAdapter, num_bytes: int, *, client: str) -> None:
        """Keep so much memory free for shards that are about to come for the sake of this client.

        Raises:
            PeerBusy: the memory is in use, or the client's part of it; or no client may ever have so much.
        """
        if held.owner not in (OWNER, client) and held.owner not in self._users.get(held.digest, ()):
            self._charge(held, client)
        self._make_room(num_bytes, held.owner, keep=held)
        held.reserved_bytes += num_bytes
        self._count(held, num_bytes)

    def put(self, held: HeldAdapter, block: int, shard: HeldShard) -> None:
        """A shard has come, in memory that was reserved for it.

        Raises:
            PeerBusy: the reservation was given up meanwhile, and there is no room.
        """
        if block in held.shards or self._adapters.get(held.digest) is not held:
            return  # it has come twice, or too late
        if (lacking := len(shard.data) - held.reserved_bytes) > 0:
            self.reserve(held, lacking, client=held.owner)
        held.shards[block] = shard
        held.reserved_bytes -= len(shard.data)

    def give_up(self, held: HeldAdapter) -> None:
        """What is still on its way will not come."""
        self._count(held, -held.reserved_bytes)
        held.reserved_bytes = 0

    # -- room ---------------------------------------------------------------------------------------------------

    def _make_room(self, num_bytes: int, client: str, keep: HeldAdapter | None = None) -> None:
        total = num_bytes + (keep.num_bytes if keep is not None else 0)
        quota = self.limit_bytes if client == OWNER else self._quota_bytes
        if total > quota:
            raise PeerBusy(f"the adapter takes {total} bytes of memory here, limit {quota}", retry_after_s=NEVER_S)
        if client != OWNER and self._bytes_of[client] + num_bytes > quota:
            self._evict(self._bytes_of[client] + num_bytes - quota, keep, owner=client)
            if self._bytes_of[client] + num_bytes > quota:
                raise PeerBusy(
                    f"your sessions have adapters of {self._bytes_of[client]} bytes here, need {num_bytes} more,"
                    f" limit {quota}",
                    retry_after_s=RETRY_S,
                )
        self._evict(self.used_bytes + num_bytes - self.limit_bytes, keep)
        if self.used_bytes + num_bytes > self.limit_bytes:
            free = self.limit_bytes - self.used_bytes
            raise PeerBusy(f"memory for adapters is full: need {num_bytes} bytes, {free} free", retry_after_s=RETRY_S)

    def _evict(self, num_bytes: int, keep: HeldAdapter | None, owner: str | None = None) -> None:
        """Forget the least recently used that nobody uses, of one client or of all, until so much is free."""
        for held in list(self._adapters.values()):
            if num_bytes <= 0:
                return
            if held is keep or self.is_pinned(held) or (owner is not None and held.owner != owner):
                continue
            num_bytes -= held.num_bytes
            self._count(held, -held.num_bytes)
            del self._adapters[held.digest]
            self.num_evicted += 1
            self._on_evicted(held.digest)

    def _charge(self, held: HeldAdapter, client: str) -> None:
        self._bytes_of[held.owner] -= held.num_bytes
        if not self._bytes_of[held.owner]:
            del self._bytes_of[held.owner]
        held.owner = client
        self._bytes_of[client] += held.num_bytes

    def _count(self, held: HeldAdapter, num_bytes: int) -> None:
        self.used_bytes += num_bytes
        self._bytes_of[held.owner] += num_bytes
        if not self._bytes_of[held.owner]:
            del self._bytes_of[held.owner]
