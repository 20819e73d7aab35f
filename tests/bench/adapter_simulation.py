"""A server of many adapters in simulated time: continuous batching of a trace by a policy, on measured step times.

    trace ─► waiting ─► up to MAX_ROWS active ─policy.choose─► a batch ─StepTimes─► time passes, all in it advance

Policies differ in who is in a batch, and whether a merged copy of an adapter runs it. The limit on adapters is the
server's own (`swarm.server.adapter_limit`, with a cost model that learns from the simulated batches). Prompts run in
chunks of PROMPT_CHUNK next to decode rows. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from adapter_traces import Request
from merging import Merging

from swarm.server.adapter_limit import GUARD_S, AdapterLimit
from swarm.server.fairness import W_DECODE, VirtualCounters
from swarm.server.step_cost import NO_ADAPTERS, AdapterLoad, StepCost

MAX_ROWS = 32
PROMPT_CHUNK = 64
TURN_S = 3.0
"""How long an adapter keeps the server to itself while others wait, where they take turns."""


@dataclass(frozen=True)
class StepTimes:
    """What was measured: seconds of a batch."""

    rows: tuple[int, ...]
    base: tuple[float, ...]
    """Of so many decode rows."""
    per_prompt_token: float
    alone: tuple[float, float]
    """What one adapter of all rows adds: at all, per row."""
    mixed: tuple[float, float, float]
    """What other batches with adapters take longer: at all, per row, per adapter of rank 16."""
    build_s: float
    """Making a merged copy of the base."""

    def seconds(self, num_decode: int, num_prompt: int, ranks: Sequence[int], is_alone: bool) -> float:
        """Of a batch whose distinct adapters have these ranks."""
        base = float(np.interp(num_decode, (0, *self.rows), (self.base[0], *self.base)))
        base += self.per_prompt_token * num_prompt
        num_rows = num_decode + num_prompt
        if not ranks:
            return base
        if is_alone:
            return base + self.alone[0] + self.alone[1] * num_rows
        return base + self.mixed[0] + self.mixed[1] * num_rows + self.mixed[2] * sum(ranks) / 16


@dataclass(eq=False)
class Live:
    """A request that is being served; looks like a session to the server's own policies."""

    request: Request
    prompt_left: int
    answer_left: int
    ready_since: float
    gaps: list[float] = field(default_factory=list)
    first_token: float = 0.0
    share = 1.0

    @property
    def adapters(self) -> tuple[str]:
        return (str(self.request.adapter),)

    @property
    def client(self) -> str:
        return str(self.request.adapter)

    @property
    def job(self) -> Any:
        is_decode = not self.prompt_left
        return SimpleNamespace(is_decode=is_decode, num_left=self.prompt_left or 1, ready_since=self.ready_since)


class Policy(Protocol):
    """Who is in the next batch."""

    name: str

    def choose(self, active: list[Live], now: float) -> list[Live]:
        """Of those that are active, in order of arrival."""

    def copy_for(self, alone: int | None, saves_s: float, now: float) -> tuple[bool, float]:
        """Whether a merged copy runs a batch of this adapter alone, and seconds spent on making it first."""

    def ran(self, batch: list[Live], num_decode: int, num_prompt: int, load: AdapterLoad, seconds: float) -> None:
        """A batch took so long."""


class Everybody:
    """All rows, unmerged: S-LoRA's way."""

    name = "unmerged"

    def choose(self, active: list[Live], now: float) -> list[Live]:
        return active

    def copy_for(self, alone: int | None, saves_s: float, now: float) -> tuple[bool, float]:
        return False, 0.0

    def ran(self, batch: list[Live], num_decode: int, num_prompt: int, load: AdapterLoad, seconds: float) -> None:
        pass


class Limited(Everybody):
    """The server's own limit on distinct adapters."""

    name = "unmerged, limited"

    def __init__(self, ranks: Sequence[int], rows_per_rank: int):
        self._costs, self._counters = StepCost(), VirtualCounters()
        self._limit = AdapterLimit(self._costs, lambda it: ranks[int(it)] * rows_per_rank)

    def choose(self, active: list[Live], now: float) -> list[Live]:
        for live in active:
            self._counters.arrive(live.client)
        sessions: list[Any] = list(active)
        chosen: list[Any] = self._limit.choose(sessions, self._counters, W_DECODE * 256, now)
        for live in chosen:
            self._counters.charge(live.client, W_DECODE)
        self._counters.settle({live.client for live in active if live not in chosen})
        return chosen

    def ran(self, batch: list[Live], num_decode: int, num_prompt: int, load: AdapterLoad, seconds: float) -> None:
        self._costs.observe(num_decode, num_prompt, seconds, load)


class OneAtATime(Everybody):
    """One adapter's rows at a time, unmerged, in turns."""

    name = "one adapter at a time"
    merges = False

    def __init__(self, build_s: float):
        self._build_s = build_s
        self._current: int | None = None
        self._copy: int | None = None

    def choose(self, active: list[Live], now: float) -> list[Live]:
        mine = [live for live in active if live.request.adapter == self._current]
        others = [live for live in active if live.request.adapter != self._current]
        if others and (not mine or now - min(live.ready_since for live in others) > TURN_S):
            self._current = min(others, key=lambda live: live.ready_since).request.adapter
            mine = [live for live in active if live.request.adapter == self._current]
        return mine

    def copy_for(self, alone: int | None, saves_s: float, now: float) -> tuple[bool, float]:
        if not self.merges:
            return False, 0.0
        spent = 0.0 if alone == self._copy else self._build_s
        self._copy = alone
        return True, spent


class AlwaysMerged(OneAtATime):
    """One adapter's rows at a time, merged; changing it costs a new copy."""

    name = "always merged"
    merges = True


class Switching(Everybody):
    """All rows; batches of one adapter run on a merged copy if there is one: `merging`."""

    name = "switching"

    def __init__(self, build_s: float):
        self.merging = Merging(build_s)

    def copy_for(self, alone: int | None, saves_s: float, now: float) -> tuple[bool, float]:
        spent = self.merging.build_s if self.merging.step(alone, saves_s, now) else 0.0
        return alone is not None and alone == self.merging.merged, spent


class SwitchingFirst(Switching):
    """The same, but rows of other adapters wait, up to the guard, so that more batches can be merged: dLoRA's way."""

    name = "switching, merged first"

    def choose(self, active: list[Live], now: float) -> list[Live]:
        mine = [live for live in active if live.request.adapter == self.merging.merged]
        late = any(now - live.ready_since >= GUARD_S for live in active)
        return active if late or not mine else mine


def simulate(
    trace: Sequence[Request],
    times: StepTimes,
    policy: Policy,
    ranks: Sequence[int],
    rows_per_rank: int,
    duration: float,
) -> dict[str, Any]:
    """Serve a trace for so many seconds; what users saw."""
    waiting, active = list(reversed(trace)), list[Live]()
    now, tokens, steps, merged_steps, distinct, build_s = 0.0, 0, 0, 0, 0, 0.0
    firsts: list[float] = []
    gaps: list[float] = []
    while now < duration and (waiting or active):
        while waiting and len(active) < MAX_ROWS and waiting[-1].arrives <= now:
            request = waiting.pop()
            active.append(Live(request, request.prompt, request.answer, now))
        if not active:
            now = waiting[-1].arrives
            continue
        batch, counts = _with_prompts(policy.choose(active, now))
        num_prompt = sum(counts)
        num_decode = sum(count == 0 for count in counts)
        adapters = {live.request.adapter for live in batch}
        own = [ranks[adapter] for adapter in adapters]
        alone = next(iter(adapters)) if len(adapters) == 1 else None
        seconds = times.seconds(num_decode, num_prompt, own, alone is not None)
        bare = times.seconds(num_decode, num_prompt, (), False)
        is_merged, spent = policy.copy_for(alone, seconds - bare, now)
        seconds = bare if is_merged else seconds
        load = NO_ADAPTERS.plus(rank * rows_per_rank for rank in own)
        policy.ran(batch, num_decode, num_prompt, load, seconds)
        now += seconds + spent
        build_s, steps, merged_steps, distinct = (
            build_s + spent,
            steps + 1,
            merged_steps + is_merged,
            distinct + len(own),
        )
        for live, count in zip(batch, counts, strict=True):
            tokens += count or 1
            _advance(live, count, now, firsts, gaps)
        active = [live for live in active if live.answer_left > 0]
    return {
        "tokens_per_s": round(tokens / now, 2),
        "ttft_p50_s": _share(firsts, 50),
        "ttft_p99_s": _share(firsts, 99),
        "gap_p50_ms": 1e3 * _share(gaps, 50),
        "gap_p99_ms": 1e3 * _share(gaps, 99),
        "adapters_per_step": round(distinct / steps, 1),
        "merged_steps": round(merged_steps / steps, 3),
        "build_s": round(build_s, 1),
    }


def _with_prompts(chosen: list[Live]) -> tuple[list[Live], list[int]]:
    """The batch, and how many tokens of its prompt each has in it: 0 for a decode row."""
    batch, counts, room = [], [], PROMPT_CHUNK
    for live in chosen:
        count = min(live.prompt_left, room)
        if live.prompt_left and not count:
            continue
        room -= count
        batch.append(live)
        counts.append(count)
    return batch, counts


def _advance(live: Live, num_prompt: int, now: float, firsts: list[float], gaps: list[float]) -> None:
    live.prompt_left -= num_prompt
    if live.prompt_left:
        return
    if num_prompt:
        firsts.append(now - live.request.arrives)
    else:
        gaps.append(now - live.ready_since)
    live.answer_left -= 1
    live.ready_since = now


def _share(values: list[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 4) if values else 0.0
