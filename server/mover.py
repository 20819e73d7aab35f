"""Chooses the blocks of a server that was not told which, and moves it when the swarm gains more by it elsewhere.

    Scout ─holdings─► choose_span ─► blocks to begin with
                 └──► decide_move ─► better_movers first ─► wait, claim ─► look, decide again ─► leave_for, arrive
                       ▲      a gap: ▲ what others claim is taken as done  └ ask the silent again, meanwhile
                       └─────────────┴── others were first: what is left?

What pays is decided in `swarm.placement`, who may go first by `swarm.leases`, and how a server lets go of its blocks
and loads others by `Movable`. A gap is filled after some seconds; gains are looked for every minute, about, and not
while many servers are in doubt. Who would gain most goes first.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from swarm.errors import SwarmError
from swarm.leases import Claim, Lease, LeaseDesk, goals
from swarm.placement import Choice, Holding, Move, Survey, better_movers, choose_span, decide_move, still_fills
from swarm.server.scout import REFRESH_S, Scout
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

LOOK_S = 3.0
"""Time between two looks at the others."""
CHECK_S = 60.0
"""Mean time between two looks whether a move would pay; each one is random, from none to twice as long."""
GAP_DELAY_S = 1.0
"""A server that could fill a gap waits for a random time up to this, so that one comes first ..."""
GAIN_DELAY_S = 20.0
"""... and one that could gain something, up to this."""
MAX_RANK = 4
"""One that could fill a gap lets at most so many others go first that would do it better ..."""
RANK_S = 0.5
"""... for so long each."""
MAX_YIELDS = 8
"""How often one that could gain something leaves it to others that would gain more; they may be none that move."""
MAX_TURNS = 4
"""How often one that could fill a gap looks at once for what is left of it, when others came first."""
MAX_DOUBT = 0.05
"""While more than this part of the others is in doubt, nobody moves for a gain: the picture is about to change."""
DRAIN_S = 30.0
"""How long sessions may take to go elsewhere before a server leaves for a gain ..."""
GAP_DRAIN_S = 3.0
"""... and for a gap, where others stand still meanwhile: enough to hand them over, too little to wait for more."""
SMALL_PART = 0.01
"""When a server that is no more than this part of the swarm has left its blocks, others of the region may move ..."""
LEASE_MARGIN_S = 60.0
"""... else when it has loaded. A lease lasts for the time that loading should take, and so much longer."""
RETRY_S = 600.0
"""A server that could not load other blocks stays where it is for so long."""
SETTLE_S = 2.0
"""A newcomer has told what it takes for so long before it loads, in case that another one came at the same moment."""
MAX_SETTLES = 3
NOBODY: Mapping[str, BlockRange] = {}


class Movable(Protocol):
    """A server, as far as moving it is concerned."""

    @property
    def holding(self) -> Holding:
        """What it holds now."""

    @property
    def num_sessions(self) -> int:
        """Sessions that it carries."""

    async def announce_blocks(self, blocks: BlockRange) -> None:
        """Tell the swarm that it is about to load these."""

    async def leave_for(self, blocks: BlockRange, *, drain_s: float) -> None:
        """Let go of its sessions, after so long at most, and of its blocks; tell the swarm that it is about to load
        these."""

    async def arrive(self) -> bool:
        """Load the blocks that it has left for, and serve them; False if it had to go back."""


class Mover:
    """Moves one server.

    Args:
        server: to be moved.
        scout: knows the others.
        leases: the right to move.
        num_blocks: of the model.
        length: how many blocks the server can hold.
        reload_s: seconds to load blocks [i, i + length), for each i, as far as known.
        generator: for waits.
    """

    def __init__(
        self,
        server: Movable,
        scout: Scout,
        leases: LeaseDesk,
        *,
        num_blocks: int,
        length: int,
        reload_s: Callable[[], Sequence[float]],
        generator: np.random.Generator,
    ):
        self.num_moves = 0
        self._server, self._scout, self._leases = server, scout, leases
        self._num_blocks, self._length, self._reload_s = num_blocks, length, reload_s
        self._generator = generator
        self._num_yields = 0
        self._stays_until = float("-inf")

    async def choose(self, capacity_tps: float) -> Choice:
        """Where to begin: tells the swarm, and looks again whether others had the same idea.

        Raises:
            PeerTimeout: the records of the swarm can't be read.
        """
        own_id = self._server.holding.peer_id
        await self._scout.look_closely(max_age_s=REFRESH_S)
        moves = self._left(await self._claimed() if self._scout.leaving else {})
        survey = Survey(self._scout.holdings_after(moves), self._num_blocks)
        choice = choose_span(survey, self._length, capacity_tps, own_id)
        for _ in range(MAX_SETTLES if self._scout.holdings else 0):
            await self._server.announce_blocks(choice.blocks)
            await asyncio.sleep(SETTLE_S * self._generator.uniform(0.5, 1.5))
            await self._scout.look_closely()
            survey = Survey(self._before(own_id, moves), self._num_blocks)
            again = choose_span(survey, self._length, capacity_tps, own_id)
            if again.blocks == choice.blocks:
                break
            choice = again
        return choice

    def _before(self, own_id: str, moves: Mapping[str, BlockRange]) -> list[Holding]:
        """The holdings of those that serve, move, or load and come before us: of two newcomers one yields."""
        loading, held = self._scout.loading, self._scout.holdings_after(self._left(moves))
        return [it for it in held if it.peer_id not in loading or it.peer_id < own_id or it.peer_id in moves]

    async def run(self) -> None:
        """Look after gaps with every look of the scout, and after gains now and then; until cancelled."""
        loop = asyncio.get_running_loop()
        next_check = loop.time() + self._generator.uniform(0.0, 2 * CHECK_S)
        while True:
            await asyncio.sleep(max(LOOK_S, self._stays_until - loop.time()))
            await self._scout.look()
            is_due = loop.time() >= next_check
            if is_due:
                next_check = loop.time() + self._generator.uniform(0.0, 2 * CHECK_S)
            if is_due or self._survey().num_missing:
                await self._consider(may_gain=is_due and self._scout.share_in_doubt <= MAX_DOUBT)

    async def _consider(self, *, may_gain: bool) -> None:
        """Move if that pays, unless others should."""
        move = self._decide()
        if move is not None and move.fills_gap:
            await self._fill_gap(move)
        elif move is not None and may_gain:
            await self._gain(move)

    async def _fill_gap(self, move: Move) -> None:
        """Fill a gap, or what others leave of it: what they claim is taken as done, and anew if they are first.

        Claims are read before records: whoever has given one back meanwhile has told before what it loads.
        """
        for _ in range(MAX_TURNS):
            try:
                claims = await self._leases.respected(self._server.holding.blocks, move.blocks)
            except SwarmError as error:
                logger.info("can't read who else would fill a gap: %s", error)
                return
            if not await self._scout.confirm():  # in a large swarm, what we have read may be old
                return
            found = self._decide(goals(claims))
            if found is None or not found.fills_gap or not self._fills(found.blocks, {}):
                return
            move = found
            num_better = await self._num_better(move, goals(claims))
            if await self._try(move, delay(move, num_better, self._generator)):
                return

    async def _gain(self, move: Move) -> None:
        """Move for a gain, unless others would gain more."""
        num_better = await self._num_better(move)
        if yields(num_better, self._num_yields):
            self._num_yields += 1
            return
        self._num_yields = 0
        await self._try(move, delay(move, num_better, self._generator))

    async def _num_better(self, move: Move, moves: Mapping[str, BlockRange] = NOBODY) -> int:
        survey, reload_s = self._survey(moves), self._reload_s()[move.blocks.start]
        enough = counted_rivals(move)
        return await asyncio.to_thread(
            better_movers, survey, self._server.holding, move, reload_s=reload_s, enough=enough
        )

    def _survey(self, moves: Mapping[str, BlockRange] = NOBODY) -> Survey:
        """The swarm as it would be if these had moved."""
        return Survey([*self._scout.holdings_after(moves), self._server.holding], self._num_blocks)

    def _fills(self, blocks: BlockRange, moves: Mapping[str, BlockRange]) -> bool:
        """Whether going there leaves fewer blocks missing, if those have moved, and if they never do."""
        own = self._server.holding
        return all(still_fills(self._survey(those), own, blocks) for those in (moves, NOBODY))

    async def _claimed(self) -> dict[str, BlockRange]:
        """Where others have claimed to go; nothing if that can't be read."""
        try:
            return goals(await self._leases.claims())
        except SwarmError as error:
            logger.info("can't read who else is about to move: %s", error)
            return {}

    def _left(self, moves: Mapping[str, BlockRange]) -> dict[str, BlockRange]:
        """Those of them that have begun to move, by what their records say now."""
        return {peer_id: blocks for peer_id, blocks in moves.items() if peer_id in self._scout.leaving}

    def _decide(self, moves: Mapping[str, BlockRange] = NOBODY) -> Move | None:
        return decide_move(
            self._survey(moves),
            self._server.holding,
            reload_s=self._reload_s(),
            num_sessions=self._server.num_sessions,
            length=self._length,
        )

    async def _try(self, move: Move, delay_s: float) -> bool:
        """Move, if nobody else does what this move is for meanwhile; whether it had its turn.

        Raises:
            SwarmError: the server could load neither the new blocks nor its old ones.
        """
        leaves, takes = self._server.holding.blocks, move.blocks
        lease_s = self._reload_s()[takes.start] + DRAIN_S + LEASE_MARGIN_S
        lease = await self._may_move(move, delay_s=delay_s, lease_s=lease_s)
        if lease is None:
            return False
        try:
            if not await self._is_still_right(move, lease):
                return False
            logger.info(
                "moving from blocks %s to %s: the swarm's worth grows by %.3g tokens/s%s",
                leaves,
                takes,
                move.gain_tps,
                ", and a gap is filled" if move.fills_gap else "",
            )
            await self._server.leave_for(takes, drain_s=time_to_drain(move))
            if may_others_follow(move):
                await self._release(leaves, takes)
            if await self._server.arrive():
                self.num_moves += 1
            else:
                self._stays_until = asyncio.get_running_loop().time() + RETRY_S
            return True
        finally:
            await self._release(leaves, takes)

    async def _is_still_right(self, move: Move, lease: Lease) -> bool:
        """Whether it is right by the records of all as they are now; not if they can't be read."""
        try:
            if move.fills_gap:  # who is silent was asked again by now
                moves, _ = await asyncio.gather(self._claimed(), self._scout.read_closely())
                return self._fills(move.blocks, lease.moves | self._left(moves))
            await self._scout.look_closely()
        except SwarmError as error:
            logger.info("not moving, the records of the swarm can't be read: %s", error)
            return False
        again = self._decide()
        return again is not None and again.blocks == move.blocks

    async def _may_move(self, move: Move, *, delay_s: float, lease_s: float) -> Lease | None:
        """Wait, then try to get the lease; who is silent is asked again meanwhile, if that leaves a gap."""
        if not move.fills_gap:
            return await self._acquire(move, delay_s=delay_s, lease_s=lease_s)
        lease, _ = await asyncio.gather(self._acquire(move, delay_s=delay_s, lease_s=lease_s), self._scout.ask_again())
        return lease

    async def _acquire(self, move: Move, *, delay_s: float, lease_s: float) -> Lease | None:
        leaves, takes = self._server.holding.blocks, move.blocks

        def fills_gap(claims: Sequence[Claim]) -> bool:
            return self._fills(takes, goals(claims))

        try:
            return await self._leases.acquire(
                leaves, takes, delay_s=delay_s, lease_s=lease_s, fills_gap=fills_gap if move.fills_gap else None
            )
        except SwarmError as error:
            logger.info("can't ask for the right to move: %s", error)
            return None

    async def _release(self, leaves: BlockRange, takes: BlockRange) -> None:
        try:
            await self._leases.release(leaves, takes)
        except SwarmError as error:
            logger.info("the lease was not given back, it will expire: %s", error)


def delay(move: Move, num_better: int, generator: np.random.Generator) -> float:
    """How long a server waits before it asks for the right to move. Pure.

    Args:
        move: what it would do.
        num_better: others that would do more good.
        generator: so that not all ask at once.
    """
    if not move.fills_gap:
        return generator.uniform(0.0, GAIN_DELAY_S)
    ahead_s = RANK_S * min(num_better, MAX_RANK)
    if move.opens_gap:  # first those that would not, when all have looked
        ahead_s += LOOK_S
    return ahead_s + generator.uniform(0.0, GAP_DELAY_S)


def counted_rivals(move: Move) -> int:
    """Of how many others it matters that they would do more good. Pure."""
    return MAX_RANK if move.fills_gap else 1


def time_to_drain(move: Move) -> float:
    """How long sessions may take to go elsewhere before a server leaves. Pure."""
    return GAP_DRAIN_S if move.fills_gap else DRAIN_S


def may_others_follow(move: Move) -> bool:
    """Whether others of the region may move when this server has left its blocks, before it has loaded. Pure.

    They know by then where it goes. They may have to fill the rest of a gap; and in a large swarm one that loads is no
    loss, while a region that has lost many would take days to recover if its new servers loaded one after the other.
    """
    return move.fills_gap or move.capacity_part <= SMALL_PART


def yields(num_better: int, num_yields: int) -> bool:
    """Whether a server that would gain something leaves it to others, this time. Pure.

    Args:
        num_better: others that would do more good.
        num_yields: how often it has done so since it moved last.
    """
    return num_better > 0 and num_yields < MAX_YIELDS
