"""From what the DHT and the servers say to a State: who counts as serving, which blocks are covered, what follows.

    records ─┐
    answers ─┼─► compose_model ─► Model        known servers that vanished ─► gone, for a while
    canary ──┘

Pure: the time comes in as `now`. Everything that comes in is a stranger's claim and was checked for form; here it
is made to fit together, so that no claim can break the page or grow it without bound.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import TypeVar

from msgspec.structs import replace

from swarm.catalog import ModelEntry
from swarm.health.state import Adapter, Canary, Link, Model, Reach, Server, Status, Verdict
from swarm.protocol import Info, printable
from swarm.registry import ServerRecord
from swarm.types import ServerState, name_ranges

GONE_S = 600.0
"""For how long a server that announces itself no more is shown."""
CANARY_VALID_S = 300.0
"""A canary older than this says nothing."""
MAX_SERVERS = 4096
"""Servers of one model that are listed."""
MAX_TEXT = 200
"""Characters of a stranger's text that are shown."""

N = TypeVar("N", int, float)

_STATUS = {
    ServerState.ONLINE: Status.ONLINE,
    ServerState.JOINING: Status.JOINING,
    ServerState.DRAINING: Status.DRAINING,
    ServerState.OFFLINE: Status.GONE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking a server for its Info."""

    asked_at: float
    reach: Reach
    info: Info | None = None
    rtt_s: float | None = None
    trouble: str | None = None


def compose_model(
    entry: ModelEntry,
    records: Iterable[ServerRecord],
    answers: Mapping[str, Answer],
    *,
    canary: Canary | None,
    before: Model | None,
    now: float,
) -> Model:
    """One model as it stands now.

    Args:
        entry: its name and size.
        records: what servers announce.
        answers: what they said when they were asked, by peer.
        canary: the last token sent through.
        before: this model as it stood at the last look, for servers that have vanished since.
        now: unix time.
    """
    valid = [record for record in records if record.blocks.end <= entry.num_blocks]
    listed = sorted(valid, key=lambda record: (record.blocks.start, record.blocks.end, record.peer_id))[:MAX_SERVERS]
    servers = [_server(record, answers.get(record.peer_id), now) for record in listed]
    servers += _vanished(before, {record.peer_id for record in valid}, now)[: MAX_SERVERS - len(servers)]
    replicas = count_replicas(servers, entry.num_blocks)
    verdict, reason = judge(replicas, canary, now)
    return Model(
        digest=entry.digest,
        name=clean(entry.name),
        num_blocks=entry.num_blocks,
        verdict=verdict,
        reason=reason,
        replicas=replicas,
        missing=name_ranges([block for block, count in enumerate(replicas) if not count]),
        room_tokens=min(per_block(servers, entry.num_blocks, lambda it: it.kv_free_tokens)),
        tokens_per_s=median(per_block(servers, entry.num_blocks, lambda it: it.tokens_per_s or 0.0)),
        num_sessions=int(median(per_block(servers, entry.num_blocks, lambda it: it.num_sessions or 0))),
        num_waiting=sum(server.num_waiting or 0 for server in servers if server.is_serving),
        servers=tuple(servers),
        num_unlisted=len(valid) - len(listed),
        canary=canary,
    )


def count_replicas(servers: Iterable[Server], num_blocks: int) -> tuple[int, ...]:
    """For each block, how many servers serve it now."""
    return tuple(int(count) for count in per_block(servers, num_blocks, lambda _: 1))


def per_block(servers: Iterable[Server], num_blocks: int, amount: Callable[[Server], N]) -> list[N]:
    """For each block, the sum over the servers that serve it now; by differences, so that long spans cost nothing."""
    changes: list[N] = [0] * (num_blocks + 1)
    for server in servers:
        if server.is_serving:
            changes[server.start] += amount(server)
            changes[server.end] -= amount(server)
    return list(accumulate(changes[:-1]))


def judge(replicas: Sequence[int], canary: Canary | None, now: float) -> tuple[Verdict, str]:
    """Whether a model can be used, and why."""
    missing = [block for block, count in enumerate(replicas) if not count]
    if missing:
        return Verdict.INCOMPLETE, f"nobody serves {_blocks(missing)}"
    if canary is not None and not canary.ok and now - canary.at < CANARY_VALID_S:
        return Verdict.FAILING, f"a token did not come back: {canary.error}"
    single = [block for block, count in enumerate(replicas) if count == 1]
    if single:
        return Verdict.AT_RISK, f"one server only for {_blocks(single)}"
    return Verdict.USABLE, f"every block is served {min(replicas)} times or more"


def clean(text: str) -> str:
    """A stranger's text as it may be shown anywhere, terminals included."""
    return printable(text[:MAX_TEXT])


def _server(record: ServerRecord, answer: Answer | None, now: float) -> Server:
    info = answer.info if answer is not None else None
    reach = answer.reach if answer is not None else Reach.UNKNOWN
    status = Status.UNREACHABLE if reach is Reach.NONE else _STATUS[record.state]
    base = Server(
        peer_id=record.peer_id,
        name=record.public_name,
        start=record.blocks.start,
        end=record.blocks.end,
        status=status,
        reach=reach,
        quantization=record.quantization,
        dtype=record.dtype,
        version=record.version,
        decode_tps=record.decode_tps,
        load=record.load,
        kv_free_tokens=record.kv_free_tokens,
        seen_at=now,
        rtt_ms=_ms(answer.rtt_s) if answer is not None else None,
        trouble=clean(answer.trouble) if answer is not None and answer.trouble else None,
        adapters=tuple(
            Adapter(short=note.short.hex(), max_rank=note.max_rank, on_device=note.on_device)
            for note in record.adapters
        ),
    )
    return base if info is None or info.model != record.model else _with_info(base, info)


def _with_info(server: Server, info: Info) -> Server:
    """The server with what it said itself, which is newer than its record."""
    return replace(
        server,
        load=info.load,
        kv_free_tokens=info.kv_free_tokens,
        kv_total_tokens=info.kv_total_tokens,
        tokens_per_s=info.tokens_per_s,
        queue_ms=info.queue_us / 1e3,
        step_ms=info.step_us / 1e3,
        num_sessions=info.num_sessions,
        num_waiting=info.num_waiting,
        num_tokens=info.num_tokens,
        num_opened=info.num_opened,
        num_failed=info.num_failed,
        uptime_s=info.uptime_s,
        links=tuple(Link(peer_id=ping.peer_id, rtt_ms=ping.rtt_us / 1e3) for ping in info.pings),
    )


def _vanished(before: Model | None, present: set[str], now: float) -> list[Server]:
    """Servers of the last look that announce themselves no more, for as long as they are shown."""
    if before is None:
        return []
    return [
        _gone(server) for server in before.servers if server.peer_id not in present and now - server.seen_at < GONE_S
    ]


def _gone(server: Server) -> Server:
    """What is left of a server: who it was."""
    return Server(
        peer_id=server.peer_id,
        name=server.name,
        start=server.start,
        end=server.end,
        status=Status.GONE,
        reach=Reach.NONE,
        quantization=server.quantization,
        dtype=server.dtype,
        version=server.version,
        decode_tps=server.decode_tps,
        load=0.0,
        kv_free_tokens=0,
        seen_at=server.seen_at,
    )


def _blocks(indices: Sequence[int]) -> str:
    return f"block{'s' if len(indices) > 1 else ''} {name_ranges(indices)}"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
