"""A swarm whose servers join, die and move, as discrete events: what placement rules are judged by.

    Machines ─join─► World: heap of events ─► records, as others see them ─► Rule: where to begin, whether to move
                                  ▲                                              │
                                  └── announced, drained, loaded ◄───────────────┘

The decisions are the real ones: `swarm.placement`, `swarm.leases`, the neighbours and doubts of `server.scout`, with
the waits of `server.mover`: a server decides when it has looked, after it has waited for those that are silent, asks
them again beside the wait for the right to move into a gap, or after it, and reads all records once more. Who would
fill a gap goes by records as they were when it began its turn until then. Simulated are the clock, the network (each
question to the DHT takes its time, and more where it meets dead nodes first; the dead are silent, and their records
stay until they expire), draining, which takes all the time that it may, unloading, and loading, whose files are fetched
from the moment on that a server moves. Every server sees all records.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.coordinates import Place
from swarm.leases import (
    FORGET_S,
    GAP_FORGET_S,
    GAP_PATIENCE_S,
    GAP_SETTLE_S,
    PATIENCE_S,
    SETTLE_S,
    Claim,
    Patience,
    claims_before,
    goals,
    touch_nothing,
)
from swarm.network.search import SLOW_S
from swarm.placement import Holding, Move, Survey, better_movers, choose_span, decide_move, still_fills
from swarm.registry import TTL_PERIODS, ServerRecord
from swarm.server.mover import (
    CHECK_S,
    DRAIN_S,
    LEASE_MARGIN_S,
    LOOK_S,
    MAX_DOUBT,
    MAX_TURNS,
    NOBODY,
    counted_rivals,
    delay,
    may_others_follow,
    time_to_drain,
    yields,
)
from swarm.types import BlockRange, ServerState
from tests.bench import petals_rule
from tests.bench.simulated_look import Look

PERIOD_S = 20.0
"""Of announcements."""
DHT_S = (0.05, 1.0)
"""How long it takes to read from the DHT, or to store there: uniform."""
UNLOAD_S = 1.0
"""How long it takes to let go of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one server can do."""

    name: str
    length: int
    """Blocks that fit."""
    capacity_tps: float
    load_s: float
    """Seconds to load other blocks."""
    fetch_s: float = 0.0
    """Of these, what it takes to fetch their files: that begins before it lets go of what it holds."""
    place: Place = field(default_factory=Place)


class Host:
    """One server.

    Args:
        machine: what it can do.
        blocks: where it begins.
        phase_s: when it announces, within each period.
    """

    def __init__(self, machine: Machine, blocks: BlockRange, phase_s: float):
        self.machine, self.phase_s = machine, phase_s
        self.state = ServerState.JOINING
        self.died_at = float("inf")
        self.is_busy = False
        """Whether it looks at the others, is about to move, or moves: one thing at a time."""
        self.num_yields = 0
        self.record: ServerRecord | None = None
        self.suspects: dict[str, float] = {}
        self.read_at: dict[str, float] = {}
        """When it read what of the DHT last."""
        self.patience = {True: Patience(GAP_PATIENCE_S, GAP_FORGET_S), False: Patience(PATIENCE_S, FORGET_S)}
        self.found: tuple[tuple[Holding, ...], Move | None] | None = None
        """What it decided last, and the swarm that this was for: most looks see the same one again."""
        self.take(blocks)

    def take(self, blocks: BlockRange) -> None:
        """From now on it holds these, or is about to."""
        self.blocks = blocks
        self.holding = Holding(peer_id=self.machine.name, blocks=blocks, capacity_tps=self.machine.capacity_tps)

    def expires_at(self, now: float) -> float:
        """When the record expires that it announced last."""
        last = min(now, self.died_at)
        return last - (last - self.phase_s) % PERIOD_S + TTL_PERIODS * PERIOD_S


class Seen(NamedTuple):
    """One server's record, as it was read."""

    host: Host
    state: ServerState
    holding: Holding

    def after(self, moves: Mapping[str, BlockRange]) -> Holding:
        """What it holds if these have moved, by name."""
        blocks = moves.get(self.holding.peer_id)
        return self.holding if blocks is None else replace(self.holding, blocks=blocks)


class Rule(Protocol):
    """How servers find their place."""

    def choose(self, world: "World", machine: Machine) -> BlockRange:
        """Where a newcomer begins."""

    def start(self, world: "World", host: Host) -> None:
        """A server serves: from now on it looks whether to move."""

    def on_death(self, world: "World", now: float) -> None:
        """Somebody has died; nobody has noticed yet."""


class World:
    """All servers and events.

    Args:
        num_blocks: of the model.
        rule: of all servers.
        generator: the only source of randomness.
    """

    def __init__(self, num_blocks: int, rule: Rule, generator: np.random.Generator):
        self.num_blocks, self.rule, self.generator = num_blocks, rule, generator
        self.now = 0.0
        self.num_moves = 0
        self.num_gap_moves = 0
        """Those of them that filled a gap."""
        self.hosts: dict[str, Host] = {}
        self.claims: dict[str, tuple[Claim, float]] = {}
        self.covered_since: float | None = None
        self.lost_at = float("-inf")
        """When servers have died last."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._holders: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._survey: tuple[int, Survey] | None = None
        self._version = 0

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    def join(self, *machines: Machine, load_s: float | None = None) -> None:
        """New servers, which see nothing of each other: they choose, load and serve."""
        chosen = [(machine, self.rule.choose(self, machine)) for machine in machines]
        for machine, blocks in chosen:
            host = Host(machine, blocks, phase_s=self.generator.uniform(0.0, PERIOD_S))
            self.hosts[machine.name] = host
            wait_s = machine.load_s if load_s is None else load_s
            self.at(wait_s, lambda host=host: self._arrives(host))  # type: ignore[misc]
        self._changed()

    def kill(self, names: Sequence[str]) -> None:
        """These servers die at once, without a word."""
        self.lost_at = self.now
        for name in names:
            host = self.hosts[name]
            if host.state is ServerState.ONLINE:
                self._count(host.blocks, -1)
            host.died_at, host.state = self.now, ServerState.OFFLINE
            self.at(host.expires_at(self.now) - self.now, lambda host=host: self._forget(host))  # type: ignore[misc]
        self.rule.on_death(self, self.now)

    def move(
        self,
        host: Host,
        blocks: BlockRange,
        *,
        drain_s: float,
        fills_gap: bool = False,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        """A server drains, lets go of its blocks, leaves for others, loads and serves them."""
        host.is_busy = True
        self.num_moves += 1
        self.num_gap_moves += fills_gap
        if host.state is ServerState.ONLINE:
            self._count(host.blocks, -1)
        host.state = ServerState.DRAINING
        self._changed()

        def leave() -> None:
            if host.died_at > self.now:
                host.take(blocks)
                host.state = ServerState.JOINING
                self._changed()
                on_left()
                machine = host.machine
                fetching_s = max(0.0, machine.fetch_s - drain_s - UNLOAD_S)
                self.at(fetching_s + machine.load_s - machine.fetch_s, lambda: self._serves(host))

        self.at(drain_s + UNLOAD_S, leave)

    def dht_s(self, host: Host, key: str) -> float:
        """How long it takes to read; what a server reads for the first time after a loss meets dead nodes."""
        is_first = host.read_at.get(key, float("-inf")) <= self.lost_at
        host.read_at[key] = self.now
        return self.generator.uniform(*DHT_S) + (SLOW_S if is_first and self.lost_at > float("-inf") else 0.0)

    @property
    def living(self) -> list[Host]:
        """Servers that are there."""
        return [host for host in self.hosts.values() if host.died_at > self.now]

    @property
    def truth(self) -> Survey:
        """The swarm as it is: who serves now."""
        return Survey([it.holding for it in self.living if it.state is ServerState.ONLINE], self.num_blocks)

    @property
    def num_missing(self) -> int:
        """Blocks that nobody serves now."""
        return int((self._holders == 0).sum())

    def seen(self) -> Survey:
        """The swarm by its records: all that serve or load, and the dead until their records expire."""
        if self._survey is None or self._survey[0] != self._version:
            self._survey = self._version, Survey([it.holding for it in self._announced()], self.num_blocks)
        return self._survey[1]

    def read(self) -> list[Seen]:
        """All records, as they are now."""
        return [Seen(it, it.state, it.holding) for it in self.hosts.values()]

    def seen_by(
        self, host: Host, moves: Mapping[str, BlockRange] = NOBODY, records: Sequence[Seen] | None = None
    ) -> Survey:
        """The same without those that it takes for dead, as if some had moved, and as it was when it was read."""
        if records is None and not host.suspects and not moves:
            return self.seen()
        seen = self.read() if records is None else records
        there = [it for it in seen if it.state is not ServerState.DRAINING or it.holding.peer_id in moves]
        others = [it.after(moves) for it in there if it.host is not host and not self.suspects(host, it.host)]
        return Survey([*others, host.holding], self.num_blocks)

    def suspects(self, host: Host, other: Host) -> bool:
        """Whether one server takes another for dead."""
        return other.expires_at(self.now) <= host.suspects.get(other.machine.name, float("-inf"))

    def share_in_doubt(self, host: Host) -> float:
        """The part of all others of whom it is not sure whether they are there."""
        others = [it for it in self.hosts.values() if it is not host and it.state is not ServerState.DRAINING]
        late = [it for it in others if self.suspects(host, it) or _record(it, self.now).is_late(self.now)]
        return len(late) / max(1, len(others))

    def records(self, host: Host) -> list[ServerRecord]:
        """The others' records, as one server sees them."""
        return [_record(it, self.now) for it in self._announced() if it is not host and not self.suspects(host, it)]

    def silent_to(self, host: Host) -> list[ServerRecord]:
        """Those that one server takes for dead, by what they said last."""
        gone = [it for it in self.hosts.values() if it.state is ServerState.OFFLINE and self.suspects(host, it)]
        return [_record(it, self.now) for it in gone]

    def claims_seen(self) -> list[Claim]:
        """All claims that others can see by now."""
        return [claim for claim, seen_at in self.claims.values() if seen_at <= self.now]

    def _announced(self) -> list[Host]:
        """Whose records say that they serve or load; what the dead said last."""
        return [it for it in self.hosts.values() if it.state is not ServerState.DRAINING]

    def _arrives(self, host: Host) -> None:
        self._serves(host)
        if host.died_at > self.now:
            self.rule.start(self, host)

    def _serves(self, host: Host) -> None:
        if host.died_at <= self.now:
            return
        host.state, host.is_busy = ServerState.ONLINE, False
        self._count(host.blocks, 1)
        self._changed()

    def _forget(self, host: Host) -> None:
        self.hosts.pop(host.machine.name, None)
        self._changed()

    def _changed(self) -> None:
        self._version += 1

    def _count(self, blocks: BlockRange, change: int) -> None:
        self._holders[blocks.start : blocks.end] += change
        if self.num_missing:
            self.covered_since = None
        elif self.covered_since is None:
            self.covered_since = self.now


class SwarmRule:
    """Ours. See `swarm.server.mover`, whose waits and order this follows.

    Args:
        watches: whether servers ask each other; else they learn of deaths as records expire.
    """

    def __init__(self, *, watches: bool = True):
        self._watches = watches

    def choose(self, world: World, machine: Machine) -> BlockRange:
        return choose_span(world.seen(), machine.length, machine.capacity_tps, machine.name).blocks

    def start(self, world: World, host: Host) -> None:
        self._check_later(world, host)

    def on_death(self, world: World, now: float) -> None:
        """Everybody looks every LOOK_S; without a death in the last minute that finds nothing, and is left out."""
        if self._watches:
            for host in world.living:
                world.at(world.generator.uniform(0.0, LOOK_S), lambda host=host: self._look(world, host, now + 80.0))

    def _look(self, world: World, host: Host, until: float) -> None:
        if host.died_at <= world.now or world.now > until:
            return

        def looked() -> None:
            host.is_busy = False
            if world.seen_by(host).num_missing:
                self._decide(world, host, gaps_only=True)
            world.at(LOOK_S, lambda: self._look(world, host, until))

        if host.state is ServerState.ONLINE and not host.is_busy:
            self._ask_around(world, host, looked)
        else:
            world.at(LOOK_S, lambda: self._look(world, host, until))

    def _ask_around(self, world: World, host: Host, then: Callable[[], None], *, again: bool = False) -> None:
        """As `Scout.look`, which reads records meanwhile; with `again` as `Scout.ask_again`, which reads nothing."""
        host.is_busy = True
        if again:
            Look(world, host, then).begin(again=True)
            return
        read_at = world.now + world.dht_s(host, "records")
        Look(world, host, lambda: world.at(max(0.0, read_at - world.now), then)).begin()

    def _check_later(self, world: World, host: Host) -> None:
        def check() -> None:
            if host.died_at <= world.now:
                return
            if host.state is ServerState.ONLINE and not host.is_busy:
                if self._watches:
                    self._ask_around(world, host, decide)
                else:
                    decide()
            self._check_later(world, host)

        def decide() -> None:
            host.is_busy = False
            self._decide(world, host, gaps_only=False)

        world.at(world.generator.uniform(0.0, 2 * CHECK_S), check)

    def _find(
        self,
        world: World,
        host: Host,
        moves: Mapping[str, BlockRange] = NOBODY,
        records: Sequence[Seen] | None = None,
    ) -> Move | None:
        survey = world.seen_by(host, moves, records)
        if host.found is None or host.found[0] != survey.holdings:
            reload_s = [host.machine.load_s] * world.num_blocks
            host.found = survey.holdings, decide_move(survey, host.holding, reload_s=reload_s, num_sessions=8)
        return host.found[1]

    def _decide(self, world: World, host: Host, *, gaps_only: bool) -> None:
        move = self._find(world, host)
        if move is not None and move.fills_gap:
            host.is_busy = True
            self._fill_gap(world, host, move, MAX_TURNS)
        elif move is not None and not gaps_only and world.share_in_doubt(host) <= MAX_DOUBT:
            num_better = self._num_better(world, host, move)
            if yields(num_better, host.num_yields):
                host.num_yields += 1
                return
            host.num_yields = 0
            host.is_busy = True
            self._wait(world, host, Turn(move, host.patience[False]), num_better)

    def _fill_gap(self, world: World, host: Host, move: Move, num_turns: int) -> None:
        """As `Mover._fill_gap`, so many times: reads claims, then records."""
        if host.died_at <= world.now or not num_turns:
            host.is_busy = False
            return
        own = _claim(world, host, move.blocks)

        def read_claims() -> None:
            moves = goals(host.patience[True].respected(own, world.claims_seen(), world.now))
            moves.pop(host.machine.name, None)
            world.at(world.dht_s(host, "records"), lambda: decide(moves))

        def decide(moves: dict[str, BlockRange]) -> None:
            records = world.read()
            found = self._find(world, host, moves, records)
            if found is None or not found.fills_gap or not self._fills(world, host, found.blocks, {}, records):
                host.is_busy = False
                return
            turn = Turn(found, host.patience[True], num_turns - 1, records)
            self._ask_around(world, host, turn.has_asked, again=True)
            self._wait(world, host, turn, self._num_better(world, host, found, moves, records))

        world.at(world.dht_s(host, "claims"), read_claims)

    def _num_better(
        self,
        world: World,
        host: Host,
        move: Move,
        moves: Mapping[str, BlockRange] = NOBODY,
        records: Sequence[Seen] | None = None,
    ) -> int:
        survey, enough = world.seen_by(host, moves, records), counted_rivals(move)
        return better_movers(survey, host.holding, move, reload_s=host.machine.load_s, enough=enough)

    def _wait(self, world: World, host: Host, turn: "Turn", num_better: int) -> None:
        """Then it reads who else would move."""
        wait_s = delay(turn.move, num_better, world.generator) + world.generator.uniform(*DHT_S)
        world.at(wait_s, lambda: self._claim(world, host, turn))

    def _claim(self, world: World, host: Host, turn: "Turn") -> None:
        """It has waited and read who else would move: as `LeaseDesk.acquire` from there."""
        own = _claim(world, host, turn.move.blocks)
        claims = turn.patience.respected(own, world.claims_seen(), world.now)
        if not self._fits(world, host, turn, own, claims_before(own, claims, world.now, is_settled=False)):
            self._stay(world, host, turn)
            return
        turn.known = {claim.lot for claim in claims}
        store_s, read_s = world.generator.uniform(*DHT_S, size=2)
        world.claims[own.peer_id] = own, world.now + store_s
        settle_s = GAP_SETTLE_S if turn.move.fills_gap else SETTLE_S
        world.at(store_s + settle_s + read_s, lambda: self._settle(world, host, turn, own))

    def _settle(self, world: World, host: Host, turn: "Turn", own: Claim) -> None:
        """It may move, or not; if so it reads all once more. The claim of one that has died stays till its end."""
        if host.died_at <= world.now:
            return
        claims = turn.patience.respected(own, world.claims_seen(), world.now)
        before = claims_before(own, claims, world.now, is_settled=True, known=turn.known)
        if not self._fits(world, host, turn, own, before):
            world.claims.pop(own.peer_id)
            self._stay(world, host, turn)
            return
        turn.moves = goals(before)
        lease_s, read_s = world.generator.uniform(*DHT_S, size=2)  # the lease is stored, and all records read

        def read() -> None:
            if turn.move.fills_gap:
                self._move(world, host, turn)
            else:
                self._ask_around(world, host, lambda: self._move(world, host, turn), again=True)

        world.at(lease_s, lambda: turn.when_asked(lambda: world.at(read_s, read)))

    def _fits(self, world: World, host: Host, turn: "Turn", own: Claim, before: Sequence[Claim]) -> bool:
        if turn.move.fills_gap:
            return self._fills(world, host, turn.move.blocks, goals(before), turn.records)
        return touch_nothing(own, before)

    def _fills(
        self,
        world: World,
        host: Host,
        blocks: BlockRange,
        moves: Mapping[str, BlockRange],
        records: Sequence[Seen] | None,
    ) -> bool:
        surveys = (world.seen_by(host, those, records) for those in (moves, NOBODY))
        return all(still_fills(survey, host.holding, blocks) for survey in surveys)

    def _stay(self, world: World, host: Host, turn: "Turn") -> None:
        def stay() -> None:
            if turn.move.fills_gap:
                self._fill_gap(world, host, turn.move, turn.num_left)
            else:
                host.is_busy = False

        turn.when_asked(stay)

    def _move(self, world: World, host: Host, turn: "Turn") -> None:
        """It knows what there is to know: it moves if that is still right, as `Mover` sees it."""
        if host.died_at <= world.now:
            return
        move, again = turn.move, None if turn.move.fills_gap else self._find(world, host)
        is_right = again is not None and again.blocks == move.blocks
        if move.fills_gap:
            records = world.read()
            leaving = {it.holding.peer_id for it in records if it.state is ServerState.DRAINING}
            left = {name: blocks for name, blocks in goals(world.claims_seen()).items() if name in leaving}
            is_right = self._fills(world, host, move.blocks, turn.moves | left, records)
        if not is_right:
            world.claims.pop(host.machine.name)
            self._stay(world, host, turn)
            return

        def release() -> None:
            world.claims.pop(host.machine.name, None)

        drain_s = time_to_drain(move)
        if may_others_follow(move):
            world.move(host, move.blocks, drain_s=drain_s, fills_gap=move.fills_gap, on_left=release)
        else:
            world.move(host, move.blocks, drain_s=drain_s)
            world.at(drain_s + UNLOAD_S + host.machine.load_s, release)


class Turn:
    """One server's try to move.

    Args:
        move: what it would do.
        patience: how long it waits for others.
        num_left: how often it may look at once for what is left.
        records: the others', as they were when it decided.
    """

    def __init__(self, move: Move, patience: Patience, num_left: int = 0, records: Sequence[Seen] | None = None):
        self.move, self.patience, self.num_left, self.records = move, patience, num_left, records
        self.known: set[bytes] = set()
        """Lots of the claims that were there before its own."""
        self.moves: dict[str, BlockRange] = {}
        """What those do that come before it."""
        self._is_asking = move.fills_gap
        """Whether the silent are being asked once more."""
        self._then: Callable[[], None] = lambda: None

    def has_asked(self) -> None:
        """They were asked."""
        self._is_asking = False
        self._then()

    def when_asked(self, action: Callable[[], None]) -> None:
        """Do something when they have been asked, which may be now."""
        if self._is_asking:
            self._then = action
        else:
            action()


def _claim(world: World, host: Host, takes: BlockRange) -> Claim:
    expires_at = world.now + host.machine.load_s + DRAIN_S + LEASE_MARGIN_S
    return Claim(peer_id=host.machine.name, leaves=host.blocks, takes=takes, expires_at=expires_at)


class PetalsRule:
    """The peer's: see `petals_rule`; a check every 60 s on average, up to 10 s of delay, no drain."""

    def choose(self, world: World, machine: Machine) -> BlockRange:
        return petals_rule.choose(world.seen().holdings, machine.length, world.num_blocks)

    def start(self, world: World, host: Host) -> None:
        self._check_later(world, host)

    def on_death(self, world: World, now: float) -> None:
        """Nobody asks."""

    def _check_later(self, world: World, host: Host) -> None:
        def check() -> None:
            if host.died_at <= world.now:
                return
            holdings = world.seen().holdings
            is_due = host.state is ServerState.ONLINE and not host.is_busy
            if is_due and petals_rule.should_move(holdings, host.machine.name, world.num_blocks, world.generator):
                host.is_busy = True
                world.at(world.generator.uniform(0.0, 10.0), lambda: self._move(world, host))
            self._check_later(world, host)

        world.at(world.generator.uniform(0.0, 120.0), check)

    def _move(self, world: World, host: Host) -> None:
        if host.died_at > world.now:
            others = [it for it in world.seen().holdings if it.peer_id != host.machine.name]
            world.move(host, petals_rule.choose(others, host.machine.length, world.num_blocks), drain_s=0.0)


def _record(host: Host, now: float) -> ServerRecord:
    """The record that a server announced last."""
    known, expires_at = host.record, host.expires_at(now)
    if known is None or (known.expires_at, known.blocks, known.state) != (expires_at, host.blocks, host.state):
        host.record = _make_record(host, expires_at)
    assert host.record is not None
    return host.record


def _make_record(host: Host, expires_at: float) -> ServerRecord:
    return ServerRecord(
        peer_id=host.machine.name,
        model="0" * 64,
        blocks=host.blocks,
        state=host.state,
        decode_tps=host.machine.capacity_tps,
        batch_tps=host.machine.capacity_tps,
        load=0.0,
        kv_free_tokens=0,
        place=host.machine.place,
        quantization="",
        dtype="",
        public_name="",
        version="",
        period_s=PERIOD_S,
        expires_at=expires_at,
    )
