"""How a swarm was in the last week, in one SQLite file: a row per model and minute, and who was seen in which hour.

    State ──record, once a minute──► samples, seen ──trend(window)──► points for the charts
                                                   ──contributors──► who has given most
    addresses ──remember──► peers ──recall──► where to join after a restart, should the bootstraps be dead

Recording a minute twice changes nothing, so a restart, or a second page on the same file, does no harm. Not to be used
from two threads at once. It knows nothing of the network.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import median

from swarm.errors import ConfigError
from swarm.health.compose import per_block
from swarm.health.state import Model, Server, State

MINUTE_S = 60
HOUR_S = 3600
KEPT_S = 8 * 24 * HOUR_S
"""What is older is deleted."""
MAX_GAIN = 1 << 40
"""Tokens or sessions that a server may claim for one minute; what is beyond can't be, and would overflow sums."""
MAX_PEERS = 64
"""Addresses that are kept for a swarm."""
SCHEMA = 1
_TABLES = """
CREATE TABLE samples (
    minute INTEGER, model TEXT, coverage REAL, servers INTEGER, tokens_per_s REAL, sessions INTEGER,
    opened INTEGER, failed INTEGER, usable INTEGER, canary_ok INTEGER, first_ms REAL, next_ms REAL,
    PRIMARY KEY (minute, model)
) WITHOUT ROWID;
CREATE TABLE seen (
    hour INTEGER, model TEXT, peer TEXT, name TEXT, blocks INTEGER, minutes INTEGER, tokens INTEGER,
    PRIMARY KEY (hour, model, peer)
) WITHOUT ROWID;
CREATE TABLE peers (swarm TEXT, address TEXT, seen_at REAL, PRIMARY KEY (swarm, address)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of time, and how finely it is looked at."""

    name: str
    length_s: int
    step_s: int

    @property
    def num_points(self) -> int:
        return self.length_s // self.step_s


WINDOWS = (
    Window(name="hour", length_s=HOUR_S, step_s=MINUTE_S),
    Window(name="day", length_s=24 * HOUR_S, step_s=15 * MINUTE_S),
    Window(name="week", length_s=7 * 24 * HOUR_S, step_s=2 * HOUR_S),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was, in one step of a window: means, the least coverage, and sums of what is counted."""

    at: float
    coverage: float
    tokens_per_s: float
    sessions: float
    opened: int
    failed: int
    usable: float
    first_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """Somebody who served blocks."""

    name: str
    """Public name, or where there is none, the peer id."""
    num_servers: int
    block_hours: float
    """Blocks times hours, as far as this page saw them served."""
    num_tokens: int
    """Tokens that went through the servers meanwhile, by their own account."""


class History:
    """The file.

    Args:
        path: of the file; made when missing. ":memory:" keeps nothing.

    Raises:
        ConfigError: it can't be opened, or is no history.
    """

    def __init__(self, path: str | Path):
        self._counters: dict[tuple[str, str], tuple[int, int, int]] = {}
        """Of each server: tokens, sessions and failures at the last record."""
        try:
            if str(path) != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"history file {path}: {error}") from error
        try:
            self._set_up()
        except (sqlite3.Error, ConfigError) as error:
            self._file.close()
            raise ConfigError(f"history file {path}: {error}") from error
        self._file.create_function("bit_count", 1, lambda bits: int(bits).bit_count(), deterministic=True)

    def record(self, state: State) -> None:
        """Add the minute of a state."""
        minute = int(state.at) // MINUTE_S
        with self._transaction():
            self._forget_others(state)
            for model in state.models:
                serving = model.serving
                gained = {server.peer_id: self._gained(model, server) for server in serving}
                self._file.execute(
                    "INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    _sample(minute, model, gained, state.at),
                )
                self._file.executemany(
                    "INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                    " minutes = minutes | excluded.minutes, name = excluded.name, blocks = excluded.blocks,"
                    " tokens = tokens + CASE WHEN minutes | excluded.minutes > minutes THEN excluded.tokens ELSE 0 END",
                    [_seen(state.at, model, server, gained[server.peer_id][0]) for server in serving],
                )
            self._file.execute("DELETE FROM samples WHERE minute < ?", ((state.at - KEPT_S) // MINUTE_S,))
            self._file.execute("DELETE FROM seen WHERE hour < ?", ((state.at - KEPT_S) // HOUR_S,))

    def trend(self, model: str, window: Window, now: float) -> tuple[Point | None, ...]:
        """The points of a window that ends now, oldest first; None where this page did not look."""
        steps = window.step_s // MINUTE_S
        last = int(now) // window.step_s
        first = last - window.num_points + 1
        rows = self._file.execute(
            "SELECT minute / ?, min(coverage), avg(tokens_per_s), avg(sessions), sum(opened), sum(failed), avg(usable),"
            " avg(first_ms) FROM samples WHERE model = ? AND minute >= ? AND minute < ? GROUP BY 1",
            (steps, model, first * steps, (last + 1) * steps),
        )
        found = {row[0]: row[1:] for row in rows}
        return tuple(_point(step * window.step_s, found.get(step)) for step in range(first, last + 1))

    def contributors(self, now: float, limit: int = 10) -> tuple[Contributor, ...]:
        """Who has served most in the last week, by what this page saw."""
        rows = self._file.execute(
            "SELECT CASE name WHEN '' THEN peer ELSE name END, count(DISTINCT peer),"
            " sum(bit_count(minutes) * blocks) / 60.0 AS hours, total(tokens) FROM seen WHERE hour >= ?"
            " GROUP BY 1 ORDER BY hours DESC, 1 LIMIT ?",
            (int(now - WINDOWS[-1].length_s) // HOUR_S, limit),
        )
        return tuple(Contributor(name=a, num_servers=b, block_hours=c, num_tokens=int(d)) for a, b, c, d in rows)

    def remember(self, initial_peers: Iterable[str], addresses: Sequence[str], now: float) -> None:
        """Keep addresses of peers of the swarm that these initial peers lead to."""
        swarm = _swarm_key(initial_peers)
        with self._transaction():
            rows = [(swarm, address, now) for address in addresses[:MAX_PEERS]]
            self._file.executemany("INSERT OR REPLACE INTO peers VALUES (?, ?, ?)", rows)
            self._file.execute(
                "DELETE FROM peers WHERE swarm = ? AND address NOT IN"
                " (SELECT address FROM peers WHERE swarm = ? ORDER BY seen_at DESC LIMIT ?)",
                (swarm, swarm, MAX_PEERS),
            )
            self._file.execute("DELETE FROM peers WHERE seen_at < ?", (now - KEPT_S,))

    def recall(self, initial_peers: Iterable[str], limit: int = 16) -> tuple[str, ...]:
        """The addresses that were kept last for these initial peers: only for them, or swarms would be mixed up."""
        rows = self._file.execute(
            "SELECT address FROM peers WHERE swarm = ? ORDER BY seen_at DESC LIMIT ?",
            (_swarm_key(initial_peers), limit),
        )
        return tuple(address for (address,) in rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _set_up(self) -> None:
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        [version] = self._file.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._file.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        elif version != SCHEMA:
            raise ConfigError(f"it has format {version}, known is {SCHEMA}")

    def _transaction(self) -> sqlite3.Connection:
        self._file.execute("BEGIN IMMEDIATE")
        return self._file

    def _gained(self, model: Model, server: Server) -> tuple[int, int, int]:
        """Tokens, sessions and failures of a server since the last record; none at first, all after a restart of it."""
        now = (server.num_tokens or 0, server.num_opened or 0, server.num_failed or 0)
        before = self._counters.get((model.digest, server.peer_id), now)
        self._counters[model.digest, server.peer_id] = now
        if any(a < b for a, b in zip(now, before, strict=True)):
            before = (0, 0, 0)
        tokens, opened, failed = (min(a - b, MAX_GAIN) for a, b in zip(now, before, strict=True))
        return tokens, opened, failed

    def _forget_others(self, state: State) -> None:
        shown = {(model.digest, server.peer_id) for model in state.models for server in model.servers}
        self._counters = {key: counters for key, counters in self._counters.items() if key in shown}


def _sample(minute: int, model: Model, gained: dict[str, tuple[int, int, int]], now: float) -> tuple[object, ...]:
    canary = model.canary if model.canary is not None and now - model.canary.at < 2 * MINUTE_S else None
    opened = per_block(model.serving, model.num_blocks, lambda server: gained[server.peer_id][1])
    return (
        minute,
        model.digest,
        model.num_covered / model.num_blocks,
        len(model.serving),
        model.tokens_per_s,
        model.num_sessions,
        int(median(opened)),
        sum(failed for _, _, failed in gained.values()),
        model.is_usable,
        canary.ok if canary is not None else None,
        canary.first_ms if canary is not None else None,
        canary.next_ms if canary is not None else None,
    )


def _seen(now: float, model: Model, server: Server, tokens: int) -> tuple[object, ...]:
    bit = 1 << (int(now) % HOUR_S // MINUTE_S)
    return int(now) // HOUR_S, model.digest, server.peer_id, server.name, len(server.blocks), bit, tokens


def _point(at: float, row: tuple[float, float, float, int, int, float, float | None] | None) -> Point | None:
    if row is None:
        return None
    coverage, tokens_per_s, sessions, opened, failed, usable, first_ms = row
    return Point(
        at=at,
        coverage=coverage,
        tokens_per_s=tokens_per_s,
        sessions=sessions,
        opened=opened,
        failed=failed,
        usable=usable,
        first_ms=first_ms,
    )


def _swarm_key(initial_peers: Iterable[str]) -> str:
    return blake2b("\n".join(sorted(initial_peers)).encode(), digest_size=16).hexdigest()
