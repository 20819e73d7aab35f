"""Who may move now: claims in the DHT, so that servers that see the same need don't all answer it.

    wait at random ─► read claims ─► no rival ─► claim ─► settle ─► read again ─► nobody before us ─► Lease
                           └─ rival: not now            └─ a rival with the lower lot: withdraw, not now

A claim names the blocks that a server leaves and those that it goes to. Two claims are rivals when these touch, so that
at any time one server moves per region, and many in different regions of a large swarm. Every server writes its own
claim under one key per model, signed as all that the DHT holds; a claim ends by itself. What to do is decided again
after the lease was got, with fresh records.

Lots decide between claims that see each other. A value is taken to be seen by all SETTLE_S / 4 after its store ended.
Who needed no more than SETTLE_S / 2 from its first look to the end of its store is seen, then, by whoever it did not
see at first, before that one looks again. Who needed longer may not be: it withdraws for any rival, unless it would
fill a gap: where all are slow, two that come are better than none, and who is second sees the first one's record.

One key has room for 2,048 peers. A claim is good for CLAIM_S until it has won, so that those that withdrew are soon
gone from it. Still, somebody with so many identities can fill it: then nobody moves for a gain, and gaps are filled
without a lease, after the same waits.

Whoever claims and claims again keeps nobody from moving for ever: each peer is waited for with *patience* that ends.
"""

import asyncio
import logging
import math
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.types import MAX_BLOCKS, BlockRange

logger = logging.getLogger(__name__)

SETTLE_S = 2.0
"""How long a claim is left for others to see, from the end of its store, before it is looked who is first."""
CLAIM_S = 90.0
"""So long a claim is good before it has won: for five reads and stores of 15 s at most, and SETTLE_S."""
MAX_LEASE_S = 1800.0
PATIENCE_S = MAX_LEASE_S
"""So long after a peer's claims have first kept us from a gain, further ones don't; no move takes longer ..."""
GAP_PATIENCE_S = 10.0
"""... or, for a gap, so long: by then records tell what a mover leaves and takes, whether it has loaded or not ..."""
FORGET_S = 3600.0
"""... until it has kept us from nothing for so long."""
_FORMAT = 1
_claim = struct.Struct("!BHHHHd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A server's word that it is about to move.

    Attributes:
        peer_id: who.
        leaves: the blocks that it holds.
        takes: those that it goes to.
        expires_at: unix time after which the claim is void.
    """

    peer_id: str
    leaves: BlockRange
    takes: BlockRange
    expires_at: float

    def rivals(self, other: "Claim") -> bool:
        """Whether both claims touch the same blocks."""
        mine, theirs = (self.leaves, self.takes), (other.leaves, other.takes)
        return any(one.start < two.end and two.start < one.end for one in mine for two in theirs)

    @property
    def lot(self) -> bytes:
        """Of rivals that claim at the same moment the one with the lowest lot may move; who that is varies."""
        return blake2b(f"{self.peer_id} {self.leaves} {self.takes}".encode(), digest_size=8).digest()

    def encode(self) -> bytes:
        """17 bytes."""
        leaves, takes = self.leaves, self.takes
        return _claim.pack(_FORMAT, leaves.start, leaves.end, takes.start, takes.end, self.expires_at)

    @classmethod
    def decode(cls, data: bytes, *, peer_id: str, num_blocks: int = MAX_BLOCKS) -> "Claim":
        """Read a claim that `peer_id` signed for a model of so many blocks.

        Raises:
            PeerMisbehaved: when it is malformed.
        """
        try:
            form, *edges, expires_at = _claim.unpack(data)
            if form != _FORMAT or not math.isfinite(expires_at):
                raise InvalidRequest(f"format {form}, expires at {expires_at}")
            leaves, takes = BlockRange(*edges[:2]), BlockRange(*edges[2:])
            if max(edges) > num_blocks:
                raise InvalidRequest(f"blocks {leaves} and {takes}, the model has 0:{num_blocks}")
        except (InvalidRequest, struct.error) as error:
            raise PeerMisbehaved(f"bad claim of {peer_id}: {error}", peer_id=peer_id) from error
        return cls(peer_id=peer_id, leaves=leaves, takes=takes, expires_at=expires_at)


def wins(own: Claim, claims: Iterable[Claim], now: float, *, is_settled: bool) -> bool:
    """Whether a server may move by what others claim. Pure.

    Args:
        own: what it claims, or would.
        claims: of all servers; its own may be among them.
        now: unix time.
        is_settled: whether all rivals have seen its claim; before, any of them comes first.
    """
    rivals = [it for it in claims if it.peer_id != own.peer_id and it.rivals(own) and _is_valid(it, now)]
    return all(is_settled and own.lot < rival.lot for rival in rivals)


def _is_valid(claim: Claim, now: float) -> bool:
    return now < claim.expires_at <= now + MAX_LEASE_S + 60.0


class Patience:
    """How long one server waits for each of the others; `now` is unix time. Pure.

    Args:
        limit_s: how long after its claims came in our way first.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._met: dict[str, tuple[float, float]] = {}
        """When each peer's claims were in our way first, and last."""

    def respected(self, own: Claim, claims: Iterable[Claim], now: float) -> list[Claim]:
        """The claims that are still waited for; rivals among them are in our way from now on, or still."""
        self._met = {peer_id: met for peer_id, met in self._met.items() if now - met[1] < FORGET_S}
        found = [claim for claim in claims if now - self._met.get(claim.peer_id, (now, now))[0] <= self._limit_s]
        for claim in found:
            if claim.peer_id != own.peer_id and claim.rivals(own) and _is_valid(claim, now):
                self._met[claim.peer_id] = self._met.get(claim.peer_id, (now, now))[0], now
        return found


class Table(Protocol):
    """What of a Node is used here."""

    @property
    def peer_id(self) -> str: ...
    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool: ...
    async def dht_get(self, key: str) -> dict[str, bytes]: ...


class LeaseDesk:
    """Gets and gives back the right to move.

    Args:
        node: signs our claims and finds those of others.
        model: content digest of the checkpoint.
        num_blocks: of the model; claims that go beyond are refused.
        settle_s: how long a claim is left for others to see.
        now: a monotonic clock in seconds.
    """

    def __init__(
        self,
        node: Table,
        model: str,
        *,
        num_blocks: int = MAX_BLOCKS,
        settle_s: float = SETTLE_S,
        now: Callable[[], float] = time.monotonic,
    ):
        self._node, self._key, self._settle_s, self._now = node, f"swarm/moves/v1/{model}", settle_s, now
        self._num_blocks = num_blocks
        self._last_expiry = 0.0
        self._patience = {True: Patience(GAP_PATIENCE_S), False: Patience(PATIENCE_S)}
        """For moves that fill a gap, and others."""

    async def claims(self) -> list[Claim]:
        """The valid claims of others.

        Raises:
            PeerTimeout: when the search does not end in time.
        """
        found, now, claims = await self._node.dht_get(self._key), time.time(), []
        for peer_id, value in found.items():
            try:
                claim = Claim.decode(value, peer_id=peer_id, num_blocks=self._num_blocks)
            except PeerMisbehaved as error:
                logger.debug("ignored: %s", error)
                continue
            if _is_valid(claim, now) and peer_id != self._node.peer_id:
                claims.append(claim)
        return claims

    async def acquire(
        self, leaves: BlockRange, takes: BlockRange, *, delay_s: float, lease_s: float, fills_gap: bool = False
    ) -> bool:
        """Try to get the right to move; False when somebody else has it.

        Args:
            leaves: the blocks that we hold.
            takes: those that we go to.
            delay_s: how long to wait first, which is random.
            lease_s: how long the move may take; the claim ends then at the latest.
            fills_gap: whether nobody serves some of those that we go to; then we go, too, when the DHT takes no claim.

        Raises:
            PeerTimeout: when the DHT does not answer.
        """
        await asyncio.sleep(delay_s)
        own = Claim(peer_id=self._node.peer_id, leaves=leaves, takes=takes, expires_at=time.time() + CLAIM_S)
        patience, began = self._patience[fills_gap], self._now()
        if not await self._wins(own, patience, is_settled=False):
            return False
        has_it = False
        try:
            is_stored = await self._store(own)
            if is_stored or fills_gap:
                is_settled = is_stored and (fills_gap or self._now() - began <= self._settle_s / 2)
                await asyncio.sleep(self._settle_s)
                if await self._wins(own, patience, is_settled=is_settled):
                    lease = replace(own, expires_at=time.time() + min(lease_s, MAX_LEASE_S))
                    has_it = await self._store(lease) or fills_gap
        finally:
            if not has_it:  # also when we are cancelled: others would wait for the claim's end
                await asyncio.shield(self.release(leaves, takes))
        return has_it

    async def release(self, leaves: BlockRange, takes: BlockRange) -> None:
        """Give the right back: the claim is replaced by one that is void a moment later."""
        ended = Claim(peer_id=self._node.peer_id, leaves=leaves, takes=takes, expires_at=0.0)
        await self._store(ended)

    async def _wins(self, own: Claim, patience: Patience, *, is_settled: bool) -> bool:
        """Whether we may move by what others claim now."""
        claims, now = await self.claims(), time.time()
        return wins(own, patience.respected(own, claims, now), now, is_settled=is_settled)

    async def _store(self, claim: Claim) -> bool:
        """Store our claim, if the DHT takes it; that keeps the value with the latest expiry, so it grows each time."""
        expires_at = self._last_expiry = max(claim.expires_at, self._last_expiry + 1.0, time.time() + 1.0)
        is_stored = await self._node.dht_store(self._key, self._node.peer_id, claim.encode(), expires_at)
        if not is_stored:
            logger.warning("the DHT did not take our claim to blocks %s; its table of claims may be full", claim.takes)
        return is_stored
