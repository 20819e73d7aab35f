"""Swarms that nobody runs: records, answers, states and a monitor for them."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from types import SimpleNamespace
from typing import Any

from swarm.catalog import ModelEntry
from swarm.health.compose import Answer, compose_model
from swarm.health.history import WINDOWS, Contributor, Point
from swarm.health.monitor import Settings, Trends
from swarm.health.state import Canary, CanaryHop, Model, Reach, State
from swarm.identity import Identity
from swarm.protocol import Info, Ping
from swarm.registry import ServerRecord
from swarm.types import BlockRange, ServerState

NOW = 1_795_000_000.0
DIGEST = "3fa9" * 16


def peer_ids(count: int) -> list[str]:
    """Identities, made once."""
    while len(_peers) < count:
        _peers.append(Identity.generate().peer_id)
    return _peers[:count]


_peers: list[str] = []


def make_entry(num_blocks: int = 30, *, digest: str = DIGEST, name: str = "smollm2-135m-instruct") -> ModelEntry:
    """A model."""
    return ModelEntry(digest=digest, name=name, num_blocks=num_blocks)


def make_record(peer_id: str, blocks: str, **fields: Any) -> ServerRecord:
    """What a server announces."""
    given = {
        "model": DIGEST,
        "state": ServerState.ONLINE,
        "decode_tps": 3000.0,
        "load": 0.25,
        "kv_free_tokens": 8192,
        "quantization": "none",
        "dtype": "float32",
        "public_name": "",
        "version": "0.1.0",
        "expires_at": NOW + 60,
    }
    return ServerRecord(peer_id=peer_id, blocks=BlockRange.parse(blocks), **{**given, **fields})


def make_info(record: ServerRecord, **fields: Any) -> Info:
    """What a server answers."""
    given = {
        "model": record.model,
        "model_name": "smollm2-135m-instruct",
        "start": record.blocks.start,
        "end": record.blocks.end,
        "state": int(record.state),
        "version": record.version,
        "dtype": record.dtype,
        "quantization": record.quantization,
        "num_sessions": 2,
        "kv_free_tokens": record.kv_free_tokens,
        "kv_total_tokens": 16384,
        "hidden_size": 64,
        "load": record.load,
        "tokens_per_s": 20.0,
        "queue_us": 800,
        "step_us": 9000,
        "uptime_s": 7200.0,
        "num_tokens": 100_000,
        "num_opened": 50,
    }
    return Info(**{**given, **fields})


def make_answer(record: ServerRecord, *, rtt_s: float = 0.012, reach: Reach = Reach.DIRECT, **fields: Any) -> Answer:
    """How asking it went."""
    return Answer(asked_at=0.0, reach=reach, info=make_info(record, **fields), rtt_s=rtt_s)


def random_model(
    num_servers: int, *, num_blocks: int = 30, seed: int = 0, now: float = NOW, digest: str = DIGEST, **entry: Any
) -> Model:
    """A swarm of many servers in all states, with links between them."""
    random, peers = Random(seed), peer_ids(num_servers)
    records, answers = [], {}
    for number, peer_id in enumerate(peers):
        length = random.randint(max(1, num_blocks // 6), max(2, num_blocks // 2))
        start = min(num_blocks - 1, number * num_blocks // num_servers)
        record = make_record(
            peer_id,
            f"{start}:{min(num_blocks, start + length)}",
            state=random.choices((ServerState.ONLINE, ServerState.JOINING, ServerState.DRAINING), (20, 1, 1))[0],
            load=random.random() ** 2,
            decode_tps=random.uniform(500, 9000),
            kv_free_tokens=random.randrange(16384),
            quantization=random.choice(("none", "int8", "nf4")),
            public_name=random.choice(("", f"gpu-{number}", f"lab-{number}", f"volunteer-{number}")),
            model=digest,
        )
        records.append(record)
        if record.state is ServerState.JOINING:
            continue  # nobody asks it
        if number % 17 == 16:
            answers[peer_id] = Answer(asked_at=0.0, reach=Reach.NONE, trouble="no answer within 4 s")
            continue
        pings = [
            Ping(peer_id=other, rtt_us=random.randrange(500, 250_000))
            for other in random.sample(peers, min(3, num_servers))
        ]
        answers[peer_id] = make_answer(
            record,
            rtt_s=10 ** random.uniform(-3.2, -0.6),
            reach=random.choices((Reach.DIRECT, Reach.P2P), (6, 1))[0],
            tokens_per_s=random.uniform(0, 90),
            queue_us=random.randrange(20_000),
            step_us=random.randrange(4_000, 60_000),
            uptime_s=random.uniform(60, 900_000),
            num_sessions=random.randrange(9),
            pings=tuple(pings),
        )
    entry_ = make_entry(num_blocks, digest=digest, **entry)
    return compose_model(entry_, records, answers, canary=make_canary(records, now), before=None, now=now)


def make_canary(records: list[ServerRecord], now: float, *, ok: bool = True) -> Canary:
    """A token that came back, or not."""
    route, end = list[CanaryHop](), 0
    for it in sorted(records, key=lambda record: record.blocks.start):
        if it.state is ServerState.ONLINE and it.blocks.start <= end < it.blocks.end:
            name = it.public_name or f"…{it.peer_id[-8:]}"
            route.append(CanaryHop(peer_id=it.peer_id, name=name, start=end, end=it.blocks.end))
            end = it.blocks.end
    if not ok:
        return Canary(at=now - 24, ok=False, has_text=True, error="no server holds blocks 3:6")
    return Canary(at=now - 24, ok=True, has_text=True, first_ms=182.0, next_ms=41.0, text=" Paris.", route=tuple(route))


def make_state(*models: Model, now: float = NOW, **fields: Any) -> State:
    """The state of a swarm."""
    given = {"version": "0.1.0", "peer_id": peer_ids(1)[0], "dht_peers": 12, "refresh_ms": 85.0, "stale_s": 0.0}
    return State(at=now, models=models, **{**given, **fields})


def make_trends(*models: Model, now: float = NOW, seed: int = 0) -> Trends:
    """A past with a gap in it."""
    random, points = Random(seed), {}
    for model in models:
        for window in WINDOWS:
            level, series = 20.0, list[Point | None]()
            for step in range(window.num_points):
                level = max(0.0, level + random.uniform(-4, 4.3))
                is_known = not window.num_points // 3 < step < window.num_points // 3 + 4
                point = Point(
                    at=now - (window.num_points - step) * window.step_s,
                    coverage=1.0 if random.random() < 0.97 else 0.8,
                    tokens_per_s=level,
                    sessions=level / 10,
                    opened=random.randrange(20),
                    failed=int(random.random() < 0.05),
                    usable=1.0,
                    first_ms=random.uniform(120, 260),
                )
                series.append(point if is_known else None)
            points[model.digest, window.name] = tuple(series)
    names = ("lab", "volunteer-3", "gpu-7", "quiet corner")
    who = [
        Contributor(name=name, num_servers=4 - n, block_hours=900.0 / (n + 1), num_tokens=4_000_000 // (n + 1))
        for n, name in enumerate(names)
    ]
    return Trends(points=points, contributors=tuple(who))


class FakeMonitor:
    """Holds a state and tells of it; nobody looks at any swarm."""

    def __init__(self, state: State, trends: Trends | None = None):
        self.state, self.trends = state, trends or Trends()
        self.revision, self.num_refreshes, self.num_failures, self.num_watchers = 7, 3, 0, 0
        self.settings = Settings(initial_peers=("/ip4/127.0.0.1/tcp/1/p2p/x",))
        self.transport: Any = None
        self.canaries = SimpleNamespace(num_sent=Counter(), num_lost=Counter())

    async def watch(self) -> AsyncIterator[int]:
        """The present revision, and no other."""
        yield self.revision


def fresh_monitor(num_servers: int = 8, **fields: Any) -> FakeMonitor:
    """A monitor of a random swarm, now."""
    now = time.time()
    model = random_model(num_servers, now=now, **fields)
    return FakeMonitor(make_state(model, now=now), make_trends(model, now=now))
