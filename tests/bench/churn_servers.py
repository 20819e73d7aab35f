"""Servers that come and go for the churn benchmark, and what each of them did with its life, by what it printed.

    Churn: joins at random times ─► ForkedServer ─ONLINE─► lives for a random time ─► SIGKILL or SIGTERM
                                        └─ lines and times ─► spells_of, moves_of ─► gaps

Every server's fate is drawn from the seed and its number, whatever happens to the others.
"""

import argparse
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from forked import ForkedServer, ServerFactory
from gaps import Spell
from swarms import MODEL, START_TIMEOUT_S

from swarm.client.processes import PeerProcessError
from swarm.types import BlockRange

GIVEN = ("0:10", "10:20", "20:30")
"""What servers take that are told."""
MOST = 2
"""Nobody comes while so many times more servers are there than in the mean: this machine could not carry them."""
PEER_ID = re.compile(r"^\s*/\S+/p2p/(\w+)$")
LISTENS = re.compile(r"^listening on")
ONLINE = re.compile(r"^ONLINE: blocks (\d+:\d+)")
MOVING = re.compile(r"moving from blocks (\d+:\d+) to (\d+:\d+): .*?(a gap is filled)?$")


@dataclass(slots=True, eq=False)
class Life:
    """One server."""

    server: ForkedServer
    given: str = ""
    """The blocks that it was told to take; empty if it has chosen them."""
    started_at: float = 0.0
    died_at: float = float("inf")
    """When it was killed, or told to stop."""
    was_killed: bool = False
    is_online: threading.Event = field(default_factory=threading.Event)

    @property
    def peer_id(self) -> str:
        """Its identity; empty if it never got so far."""
        return next((match[1] for _, line in self.said if (match := PEER_ID.search(line))), "")

    @property
    def start_s(self) -> float | None:
        """How long it took from its start until it served; None if it never did."""
        return next((at - self.started_at for at, line in self.said if ONLINE.search(line)), None)

    @property
    def gone_at(self) -> float:
        """When it was there no more."""
        return self.died_at if self.was_killed else self.server.ended_at

    @property
    def is_there(self) -> bool:
        """Whether it serves, or will."""
        return self.died_at == self.server.ended_at == float("inf")

    @property
    def said(self) -> list[tuple[float, str]]:
        """What it has printed, and when."""
        return list(zip(self.server.times, self.server.lines, strict=False))

    @property
    def spells(self) -> list[Spell]:
        """When it served what; one that was told to stop serves no more."""
        return spells_of(self.said, min(self.died_at, self.server.ended_at))


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A server left blocks for others."""

    at: float
    leaves: BlockRange
    takes: BlockRange
    fills_gap: bool
    """Whether it said so."""


def spells_of(said: Iterable[tuple[float, str]], end: float) -> list[Spell]:
    """What one server served when, by its lines; from `end` on nothing. Pure."""
    found: list[Spell] = []
    loading_since, is_moved = float("-inf"), False
    open_spell: tuple[BlockRange, float] | None = None

    def close(until: float) -> None:
        if open_spell is not None and open_spell[1] < until:
            blocks, since = open_spell
            found.append(Spell(blocks=blocks, loading_since=loading_since, since=since, until=until, is_moved=is_moved))

    for at, line in said:
        if LISTENS.search(line):
            loading_since = at
        elif MOVING.search(line):
            close(min(at, end))
            loading_since, is_moved, open_spell = at, True, None
        elif match := ONLINE.search(line):
            open_spell = BlockRange.parse(match[1]), at
    close(end)
    return found


def moves_of(said: Iterable[tuple[float, str]]) -> list[Move]:
    """The moves of one server, by its lines. Pure."""
    return [
        Move(
            at=at,
            leaves=BlockRange.parse(match[1]),
            takes=BlockRange.parse(match[2]),
            fills_gap=match[3] is not None,
        )
        for at, line in said
        if (match := MOVING.search(line))
    ]


class Churn:
    """Servers that come and die, each in a thread of its own.

    Args:
        factory: starts them.
        address: of the bootstrap peer.
        args: of the benchmark.
    """

    def __init__(self, factory: ServerFactory, address: str, args: argparse.Namespace):
        self.lives: list[Life] = []
        self.num_refused = 0
        """How often somebody did not come, since MOST were there."""
        self.address = address
        self._factory, self._args = factory, args
        self._begun, self._over = threading.Event(), threading.Event()
        self._joining = threading.Lock()
        for index in range(args.servers):
            life = self._join()
            if index == 0:  # from now on it is known how fast this machine is
                life.is_online.wait(START_TIMEOUT_S)
        for life in self.lives:
            life.is_online.wait(START_TIMEOUT_S)

    def start(self) -> None:
        """Let them die, and others come."""
        self._begun.set()
        if not self._args.given:
            threading.Thread(target=self._let_come, daemon=True).start()

    def stop(self) -> None:
        """No more deaths."""
        self._over.set()

    def _let_come(self) -> None:
        """Volunteers know nothing of who has died: they come when they come."""
        dice = random.Random(f"joins {self._args.seed}")
        while not self._over.wait(dice.expovariate(self._args.servers / self._args.mean_life)):
            if sum(life.is_there for life in self.lives) < MOST * self._args.servers:
                self._join()
            else:
                self.num_refused += 1

    def _join(self) -> Life:
        with self._joining:
            options = ["--initial-peers", self.address, "--host", "127.0.0.1", "--threads", "1", "--kv-cache", "4096"]
            given = self._neediest() if self._args.given else ""
            options += ["--blocks", given] if given else ["--num-blocks", str(self._args.num_blocks)]
            started_at = time.monotonic()
            life = Life(self._factory.start([MODEL, *options, "--log-level", "info"]), given, started_at)
            dice = random.Random(f"life {self._args.seed} {len(self.lives)}")
            self.lives.append(life)
        threading.Thread(target=self._live, args=(life, dice), daemon=True).start()
        return life

    def _neediest(self) -> str:
        """Where fewest are, for one that is told."""
        counts = Counter(life.given for life in self.lives if life.died_at == float("inf"))
        return min(GIVEN, key=lambda it: counts[it])

    def _live(self, life: Life, dice: random.Random) -> None:
        """From when it serves, for a random time; then it dies."""
        try:
            life.server.wait_for(ONLINE.pattern, START_TIMEOUT_S)
        except PeerProcessError:  # it ended by itself, which is reported, or the benchmark is over
            return
        finally:
            life.is_online.set()
        self._begun.wait()
        if self._over.wait(dice.expovariate(1 / self._args.mean_life)):
            return
        life.was_killed, life.died_at = dice.random() < 0.5, time.monotonic()
        if life.was_killed:
            life.server.kill()
        else:
            life.server.signal(signal.SIGTERM)
        if self._args.given and not self._over.is_set():
            self._join()
