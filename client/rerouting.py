"""Looks now and then whether a live session would be much quicker with another server, and has it moved there.

    steps ─measured─► Rerouting ─every LOOK_S─► Peers.outlook ─► Betterment.look ─► Moves.better ~~► servers

A step costs a few additions here; looks are made on a timer, beside the steps, and by nobody while a session is idle.
One hop moves at a time, to a server that has all its blocks. Chains that are cut at other blocks would need a replay,
since sessions move hop by hop: they are left alone. Knows no numbers: how much better is enough is
`swarm.client.betterment`'s.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

import numpy as np

from swarm.client.adapter_needs import AdapterNeeds
from swarm.client.betterment import Betterment, Decoding
from swarm.client.config import SessionConfig
from swarm.client.hops import Hops
from swarm.client.moves import Moves
from swarm.client.peers import Peers
from swarm.client.prospects import Outlook, Prospect
from swarm.client.timings import HopTiming
from swarm.session import Session
from swarm.types import Hop

logger = logging.getLogger(__name__)

LOOK_S = 15.0
"""How often a session that goes on is looked at: about as often as there are new records."""
SMOOTHING = 0.1
"""Weight of the newest step."""


class Rerouting:
    """The moves of one session for the sake of speed.

    Args:
        machine: the session.
        hops: its streams, whose tasks end with it.
        moves: carries them out.
        peers: what is known of servers.
        config: whether that is wanted.
        adapters: of the rows, where any has one.
        generator: for waiting at random.
    """

    def __init__(
        self,
        machine: Session,
        hops: Hops,
        moves: Moves,
        peers: Peers,
        config: SessionConfig,
        adapters: AdapterNeeds | None = None,
        *,
        generator: np.random.Generator | None = None,
    ):
        self._machine, self._hops, self._moves, self._peers, self._adapters = machine, hops, moves, peers, adapters
        self._betterment = Betterment(generator if generator is not None else np.random.default_rng())
        self._hop_s: dict[Hop, float] = {}
        self._is_wanted, self._num_steps, self._num_moves = config.reroute, 0, 0
        self._timer: asyncio.Task[None] | None = None

    def measured(self, timings: Sequence[HopTiming]) -> None:
        """A step of one token per row, without trouble, took so long on its hops."""
        self._num_steps += 1
        for timing in timings:
            hop = Hop(peer_id=timing.peer_id, blocks=timing.blocks)
            known = self._hop_s.get(hop, timing.round_trip_s)
            self._hop_s[hop] = (1 - SMOOTHING) * known + SMOOTHING * timing.round_trip_s
        if self._is_wanted and (self._timer is None or self._timer.done()):
            self._timer = self._hops.spawn(self._look_while_it_goes_on(), name="look for quicker servers")

    async def _look_while_it_goes_on(self) -> None:
        num_steps = -1
        while num_steps != self._num_steps:
            num_steps = self._num_steps
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        chain = self._machine.route
        self._hop_s = {hop: self._hop_s[hop] for hop in chain if hop in self._hop_s}
        if len(self._hop_s) < len(chain) or sum(len(hop.blocks) for hop in chain) != len(self._machine.blocks):
            return  # somebody is new, or lost
        if self._moves.num_moves != self._num_moves:
            self._num_moves = self._moves.num_moves
            self._betterment.moved(time.monotonic())
        lengths = self._machine.lengths
        outlook = await self._peers.outlook(chain, num_tokens=sum(lengths), adapters=self._adapters)
        if outlook is None:
            return
        decoding = Decoding(
            hop_s=self._hop_s,
            num_steps=self._num_steps,
            num_left=self._machine.max_length - max(lengths),
            num_tokens=sum(lengths),
            costs=self._peers.move_costs,
        )
        if (choice := self._betterment.look(time.monotonic(), outlook, decoding)) is not None:
            await self._move(choice, outlook)

    async def _move(self, choice: Prospect, outlook: Outlook) -> None:
        """Have a hop moved; whatever fails, the session goes on where it is."""
        old, new = (self._peers.name_of(hop.peer_id) for hop in (choice.hop, choice.target))
        expected = f"{1e3 * outlook.predicted_s:.0f} ms per token would be {1e3 * choice.predicted_s:.0f}"
        logger.info("blocks %s move from server %s to %s: %s", choice.hop.blocks, old, new, expected)
        has_moved = await self._moves.better(choice.hop, choice.target)
        if has_moved:
            self._num_moves = self._moves.num_moves
            self._betterment.moved(time.monotonic(), left=choice.hop.peer_id)
        elif has_moved is not None:
            self._peers.move_costs.failed()
            self._betterment.failed(time.monotonic(), choice.target.peer_id)
