"""Who may move now: claims in the DHT, so that servers that see the same need don't all answer it.

    wait at random ─► read claims ─► it fits ─► claim ─► settle ─► read again ─► it still fits ─► Lease
                           └─ it does not: not now         └─ not with those that come before us: withdraw

A claim names the blocks that a server leaves and those that it goes to. Every server writes its own claim under one key
per model, signed as all that the DHT holds; a claim ends by itself. What to do is decided again after the lease was
got, with fresh records.

A move for a gain *fits* when the claims that come before it are no rivals of it, which touch the same blocks: so that
at any time one server moves per region, and many in different regions of a large swarm. Who would fill a gap takes
those claims as done, and goes if there is a gap to fill still: so several go at once where it takes several, and one
where one will do.

What was claimed when a server looked first comes before it. Lots decide between claims that came later. A value is
taken to be seen by all SETTLE_S / 4 after its store ended. Who needed no more than SETTLE_S / 2 from its first look to
the end of its store is seen, then, by whoever it did not see at first, before that one looks again. Who needed longer
may not be: all come before it, unless it would fill a gap: where all are slow, two that come are better than none. Who
has the lease looks a last time at the claims of those that drain, which are on their way whatever the lots say.

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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Protocol

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.types import MAX_BLOCKS, BlockRange

logger = logging.getLogger(__name__)

SETTLE_S = 2.0
"""How long a claim is left for others to see, from the end of its store, before it is looked who is first."""
GAP_SETTLE_S = 1.0
"""The same for a claim to fill a gap: if two come at times, that is better than a longer wait each time."""
CLAIM_S = 90.0
"""So long a claim is good before it has won: for five reads and stores of 15 s at most, and SETTLE_S."""
MAX_LEASE_S = 1800.0
PATIENCE_S = MAX_LEASE_S
"""When a peer's claims have kept us from a gain for so long, further ones don't; no move takes longer ..."""
GAP_PATIENCE_S = 10.0
"""... or, for a gap, so long: by then records tell what a mover leaves and takes, whether it has loaded or not ..."""
FORGET_S = 3600.0
"""... until it has kept us from nothing for so long ..."""
GAP_FORGET_S = 60.0
"""... or, for a gap, for so long: the next gap is another matter, where honest servers claim again."""
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
        """Of claims that are made at the same moment the one with the lowest lot comes first; who that is varies."""
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


def claims_before(
    own: Claim, claims: Iterable[Claim], now: float, *, is_settled: bool, known: Collection[bytes] = ()
) -> list[Claim]:
    """The claims of others that come before one server's. Pure.

    Args:
        own: what it claims, or would.
        claims: of all servers; its own may be among them.
        now: unix time.
        is_settled: whether all others have seen its claim; before, any of theirs comes first.
        known: lots of those that were there before it claimed.
    """
    others = [it for it in claims if it.peer_id != own.peer_id and _is_valid(it, now)]
    return [it for it in others if not is_settled or it.lot in known or it.lot < own.lot]


def touch_nothing(own: Claim, others: Iterable[Claim]) -> bool:
    """Whether none of these is a rival of a claim."""
    return not any(own.rivals(other) for other in others)


def _is_valid(claim: Claim, now: float) -> bool:
    return now < claim.expires_at <= now + MAX_LEASE_S + 60.0


class Patience:
    """How long one server waits for each of the others; `now` is unix time. Pure.

    Args:
        limit_s: how long a peer's claims may be in our way, in all ...
        forget_s: ... until they were not for so long.
    """

    def __init__(self, limit_s: float, forget_s: float):
        self._limit_s, self._forget_s = limit_s, forget_s
        self._met: dict[str, tuple[float, float]] = {}
        """For how long each peer's claims were in our way, and when last."""

    def respected(self, own: Claim, claims: Iterable[Claim], now: float) -> list[Claim]:
        """The claims that are still waited for; rivals among them are in our way from now on, or still."""
        self._met = {peer_id: met for peer_id, met in self._met.items() if now - met[1] < self._forget_s}
        found = [claim for claim in claims if self._waited_s(claim.peer_id, now) <= self._limit_s]
        for claim in found:
            if claim.peer_id != own.peer_id and claim.rivals(own) and _is_valid(claim, now):
                self._met[claim.peer_id] = self._waited_s(claim.peer_id, now), now
        return found

    def _waited_s(self, peer_id: str, now: float) -> float:
        """If its claims are in our way again; after a long while we can't tell for how much of it they were."""
        waited_s, last = self._met.get(peer_id, (0.0, now))
        return waited_s + min(now - last, self._limit_s / 2)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to move.

    Attributes:
        after: claims of others that came first; who fills a gap takes them as done.
    """

    after: tuple[Claim, ...] = ()

    @property
    def moves(self) -> dict[str, BlockRange]:
        """Where those go, by peer."""
        return goals(self.after)


def goals(claims: Iterable[Claim]) -> dict[str, BlockRange]:
    """The blocks that each peer goes to."""
    return {claim.peer_id: claim.takes for claim in claims}


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
        self._patience = {True: Patience(GAP_PATIENCE_S, GAP_FORGET_S), False: Patience(PATIENCE_S, FORGET_S)}
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

    async def respected(self, leaves: BlockRange, takes: BlockRange) -> list[Claim]:
        """The claims of others that one who would fill a gap takes as done; those that it waits for no more are not.

        Args:
            leaves: the blocks that we hold.
            takes: where we would go.

        Raises:
            PeerTimeout: when the DHT does not answer.
        """
        return await self._respected(self._claim(leaves, takes), self._patience[True])

    async def acquire(
        self,
        leaves: BlockRange,
        takes: BlockRange,
        *,
        delay_s: float,
        lease_s: float,
        fills_gap: Callable[[Sequence[Claim]], bool] | None = None,
    ) -> Lease | None:
        """Try to get the right to move; None when somebody else has it.

        Args:
            leaves: the blocks that we hold.
            takes: those that we go to.
            delay_s: how long to wait first, which is random.
            lease_s: how long the move may take; the claim ends then at the latest.
            fills_gap: whether the move fills a gap when these claims of others have come true; then we go, whoever
                else moves, and also when the DHT takes no claim.

        Raises:
            PeerTimeout: when the DHT does not answer.
        """
        await asyncio.sleep(delay_s)
        own, patience = self._claim(leaves, takes), self._patience[fills_gap is not None]
        fits = fills_gap or partial(touch_nothing, own)
        began, first = self._now(), await self._respected(own, patience)
        if not fits(claims_before(own, first, time.time(), is_settled=False)):
            return None
        lease, known = None, {claim.lot for claim in first}
        try:
            is_stored = await self._store(own)
            if is_stored or fills_gap is not None:
                is_settled = is_stored and (fills_gap is not None or self._now() - began <= self._settle_s / 2)
                await asyncio.sleep(self._settle_s if fills_gap is None else min(self._settle_s, GAP_SETTLE_S))
                claims = await self._respected(own, patience)
                before = claims_before(own, claims, time.time(), is_settled=is_settled, known=known)
                longer = replace(own, expires_at=time.time() + min(lease_s, MAX_LEASE_S))
                if fits(before) and (await self._store(longer) or fills_gap is not None):
                    lease = Lease(tuple(before))
        finally:
            if lease is None:  # also when we are cancelled: others would wait for the claim's end
                await asyncio.shield(self.release(leaves, takes))
        return lease

    async def release(self, leaves: BlockRange, takes: BlockRange) -> None:
        """Give the right back: the claim is replaced by one that is void a moment later."""
        ended = Claim(peer_id=self._node.peer_id, leaves=leaves, takes=takes, expires_at=0.0)
        await self._store(ended)

    def _claim(self, leaves: BlockRange, takes: BlockRange) -> Claim:
        return Claim(peer_id=self._node.peer_id, leaves=leaves, takes=takes, expires_at=time.time() + CLAIM_S)

    async def _respected(self, own: Claim, patience: Patience) -> list[Claim]:
        return patience.respected(own, await self.claims(), time.time())

    async def _store(self, claim: Claim) -> bool:
        """Store our claim, if the DHT takes it; that keeps the value with the latest expiry, so it grows each time."""
        expires_at = self._last_expiry = max(claim.expires_at, self._last_expiry + 1.0, time.time() + 1.0)
        is_stored = await self._node.dht_store(self._key, self._node.peer_id, claim.encode(), expires_at)
        if not is_stored:
            logger.warning("the DHT did not take our claim to blocks %s; its table of claims may be full", claim.takes)
        return is_stored
