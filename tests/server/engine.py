"""The device thread's work without a thread or a device: a scheduler, a fake span, and a clock of our own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.server.executor import to_host
from swarm.server.fairness import VirtualCounters
from swarm.server.host_pages import HOST_BYTES, HostBudget, carry_out
from swarm.server.memory import KvMemory
from swarm.server.pages import PageAllocator, PageTable
from swarm.server.prefix_cache import PrefixCache
from swarm.server.scheduler import Batch, Failed, Scheduler, Waits
from swarm.server.sequences import CachedSequence, CachedSession
from swarm.server.work import Produced, Work
from swarm.types import BlockRange
from tests.server.fake_span import BLOCKS, FakeDelta, FakeSpan, expected, inputs


@dataclass
class Told:
    """What a session was told."""

    produced: list[Produced] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    waits: list[Waits] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(it.num_tokens for it in self.produced)

    def outputs(self) -> dict[tuple[int, int, int], torch.Tensor]:
        """(step, row, position) -> output; each must have come once."""
        found: dict[tuple[int, int, int], torch.Tensor] = {}
        for it in self.produced:
            for row in it.rows:
                for offset, output in enumerate(row.hidden_states):
                    key = (it.step_id, row.row, row.position + offset)
                    assert key not in found, f"{key} was produced twice"
                    found[key] = output
        return found


class Engine:
    """Runs batches one by one.

    Args:
        num_pages: of the cache.
        span: a real one in place of the fake.
        token_budget: tokens in one batch.
        host_bytes: memory for swapped sessions.
        min_turn_tokens: shortest turn.
        stateful: whether sequences have a state.
        weights: of clients.
        own_bytes: memory for adapters beside the pages.
        seconds: how long a batch takes, from its numbers of decode rows and prompt tokens.
        ranks: rank rows of each adapter.
        adapter_seconds: how much longer it takes for its adapters.
        attach_s: how long bringing an adapter to the device takes.
    """

    def __init__(
        self,
        num_pages: int = 256,
        *,
        span: Any = None,
        token_budget: int = 64,
        host_bytes: int = HOST_BYTES,
        min_turn_tokens: int = 8,
        stateful: bool = False,
        weights: dict[str, float] | None = None,
        own_bytes: int = 0,
        seconds=lambda num_decode, num_prompt: 0.01 + 0.0005 * num_decode + 0.0005 * num_prompt,
        ranks: Mapping[str, int] | None = None,
        adapter_seconds=lambda load: 0.0,
        attach_s: float = 0.0,
    ):
        self.span = FakeSpan(num_pages, stateful=stateful) if span is None else span
        self.allocator = PageAllocator(self.span.num_pages)
        self.prefixes = PrefixCache(self.allocator) if self.span.shares_prefixes else None
        self.host = HostBudget(host_bytes)
        self.memory = KvMemory(
            self.allocator,
            page_bytes=self.span.page_bytes,
            host=self.host,
            prefixes=self.prefixes,
            min_turn_tokens=min_turn_tokens,
            meter=self.span,
            own_bytes=own_bytes,
        )
        self.scheduler = Scheduler(
            self.memory,
            token_budget=token_budget,
            counters=VirtualCounters(weights),
            num_ranks=ranks.__getitem__ if ranks else None,
        )
        self.now = 100.0
        self.told: dict[CachedSession, Told] = {}
        self.num_swaps = 0
        self.left_out: set[str] = set()
        """Clients of whose ready work the last batch left something out."""
        self._seconds, self._adapter_seconds, self._ranks = seconds, adapter_seconds, ranks or {}
        self._attach_s = attach_s

    def open(
        self,
        client: str = "a",
        rows: int = 1,
        blocks: BlockRange = BLOCKS,
        adapters: Sequence[str | None] = (),
    ) -> CachedSession:
        """A session; adapters of `ranks` are on the device by now."""
        if known := self._ranks.keys() & set(adapters):
            for name in known:
                self.memory.adapters.add(name, {0: FakeDelta(0.0, 1)})
            self.memory.adapters.prefetch(len(known))
        session = CachedSession(
            blocks=blocks,
            client=client,
            listener=None,  # type: ignore[arg-type]
            rows=[self._row(blocks, adapters[row] if adapters else None) for row in range(rows)],
            adapters=tuple(adapters),
            share=len(blocks) / len(self.span.blocks),
        )
        self.told[session] = Told()
        return session

    def submit(self, session: CachedSession, work: Work) -> None:
        """Queue work."""
        refusal = self.scheduler.submit(session, work, self.now)
        self._tell([refusal] if refusal is not None else [])

    def prompt(self, session: CachedSession, num_tokens: int, *, first: float = 0.0, step: int = 0) -> None:
        """Queue tokens for a session of one row, of which no outputs are wanted but the last."""
        length = session.rows[0].table.length
        tokens = torch.arange(num_tokens) + first
        self.submit(session, make_work([tokens], step=step, outputs_from=[length + num_tokens - 1]))

    def decode(self, session: CachedSession, *, step: int = 0) -> None:
        """Queue one token for each row."""
        self.submit(session, make_work([torch.ones(1)] * len(session.rows), step=step))

    def close(self, session: CachedSession) -> None:
        """Close a session."""
        self.scheduler.close(session, self.now)

    def turn(self) -> Batch:
        """One round of the device thread."""
        batch = self.scheduler.schedule(self.now)
        self.left_out = {session.client for session in self.scheduler._ready if session.job.num_left}
        self._tell(batch.notices)
        if failures := carry_out(batch.moves, self.span):
            self._tell(self.scheduler.drop_adapters(batch, failures))
        self.now += self._attach_s * len(batch.brought)
        self.scheduler.moved(batch, self._attach_s * len(batch.brought), self.now)
        self.num_swaps += sum(hasattr(move, "swapped") for move in batch.moves)
        if batch.rows:
            outputs = to_host(batch.rows, self.span.run(batch.chunks))
            seconds = self._seconds(batch.num_decode, batch.num_tokens - batch.num_decode)
            seconds += self._adapter_seconds(batch.adapters)
            self.now += seconds
            self._tell(self.scheduler.finish(batch, outputs, seconds, self.now))
        return batch

    def run(self, max_turns: int = 10_000) -> None:
        """Run until no session has work, letting time pass where nothing can run."""
        for _ in range(max_turns):
            if not self.scheduler.num_ready:
                return
            if not self.turn().rows and not self.scheduler.can_progress:
                self.now = max(self.now, self.scheduler.next_deadline())
        raise AssertionError("work that never ends")

    def check(self) -> None:
        """Pages and host memory are owned as counted."""
        sessions = list(self.told)
        owners = [0] * self.allocator.num_pages
        for page in (page for session in sessions for row in session.rows for page in row.table.pages):
            owners[page] += 1
        for adapter in self.memory.adapters._seated.values():
            for page in adapter.pages:
                owners[page] += adapter.num_holders > 0
        assert owners == [self.allocator.references(page) for page in range(len(owners))]
        assert self.allocator.num_used == sum(count > 0 for count in owners)
        assert self.host.used == sum(it.swapped.num_bytes for it in sessions if it.swapped is not None)
        assert self.host.used <= self.host.capacity

    def _row(self, blocks: BlockRange, adapter: str | None) -> CachedSequence:
        keys = None if self.prefixes is None else self.prefixes.keys(blocks.start, blocks.end, adapter or "")
        return CachedSequence(table=PageTable(self.allocator), state=self.span.new_state(), keys=keys)

    def _tell(self, notices) -> None:
        for session, notice in notices:
            told = self.told[session]
            kind = {Produced: told.produced, Failed: told.failed, Waits: told.waits}[type(notice)]
            kind.append(notice)


def make_work(
    rows: Sequence[torch.Tensor],
    *,
    step: int = 0,
    order: Sequence[int] | None = None,
    base: Sequence[int] | None = None,
    outputs_from: Sequence[int] | None = None,
) -> Work:
    """Work with these tokens for each row."""
    return Work(
        step_id=step,
        order=None if order is None else tuple(order),
        base=None if base is None else tuple(base),
        num_tokens=tuple(len(row) for row in rows),
        outputs_from=tuple(outputs_from or [0] * len(rows)),
        hidden_states=inputs(torch.cat([row.float() for row in rows])),
    )


class User:
    """A client that knows what it should get: it keeps the tokens of its session and what it asked for."""

    def __init__(
        self,
        engine: Engine,
        client: str,
        rows: int,
        blocks: BlockRange = BLOCKS,
        adapters: Sequence[tuple[str, float] | None] = (),
    ):
        self.engine, self.blocks = engine, blocks
        self.values = [0.0 if it is None else it[1] for it in adapters] or [0.0] * rows
        self.session = engine.open(client, rows, blocks, [None if it is None else it[0] for it in adapters])
        self.rows: list[list[float]] = [[] for _ in range(rows)]
        self.step = 0
        self.kept: list[int] = []
        """Tokens that the rows kept from before the last step."""
        self.wanted: dict[tuple[int, int, int], torch.Tensor] = {}

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))

    def send(
        self,
        pieces: Sequence[Sequence[float]],
        *,
        order: Sequence[int] | None = None,
        base: Sequence[int] | None = None,
        num_wanted: int | None = None,
        num_works: int = 1,
    ) -> None:
        """One step, in one or several works: reorder, roll back, add these tokens to the rows."""
        self.step += 1
        if order is not None:
            self.rows = [list(self.rows[old]) for old in order]
        if base is not None:
            self.rows = [row[:length] for row, length in zip(self.rows, base, strict=True)]
        self.kept = starts = [len(row) for row in self.rows]
        self.rows = [row + list(piece) for row, piece in zip(self.rows, pieces, strict=True)]
        wanted = [
            start if num_wanted is None else max(start, len(row) - num_wanted)
            for start, row in zip(starts, self.rows, strict=True)
        ]
        for index, (row, first) in enumerate(zip(self.rows, wanted, strict=True)):
            outputs = expected(torch.tensor(row), self.blocks, self.values[index])
            self.wanted |= {(self.step, index, at): outputs[at] for at in range(first, len(row))}
        cuts = [[len(piece) * part // num_works for part in range(num_works + 1)] for piece in pieces]
        kept = base if base is not None else starts
        for part in range(num_works):
            tokens = [
                torch.tensor(list(piece[cut[part] : cut[part + 1]])) for piece, cut in zip(pieces, cuts, strict=True)
            ]
            if not any(map(len, tokens)):
                continue
            first_of_step = kept is not None
            work = make_work(
                tokens,
                step=self.step,
                order=order if first_of_step else None,
                base=kept if first_of_step else None,
                outputs_from=wanted,
            )
            kept = None
            self.engine.submit(self.session, work)

    def abandon(self) -> list[int] | None:
        """Give up the last step; returns what the rows keep, None where more than this step may be queued."""
        queued = {job.work.step_id for job in self.session.jobs}
        if queued != {self.step} or any(job.work.order is not None for job in self.session.jobs):
            return None
        self.engine.scheduler.drop_queued(self.session)
        came = self.engine.told[self.session].outputs().keys()
        self.wanted = {key: output for key, output in self.wanted.items() if key[0] != self.step or key in came}
        return list(self.kept)

    def check(self) -> None:
        """Everything that was asked for came, and is right."""
        outputs = self.engine.told[self.session].outputs()
        missing = self.wanted.keys() - outputs.keys()
        assert not missing, f"never produced: {sorted(missing)[:3]}"
        for key, output in self.wanted.items():
            assert torch.equal(outputs[key], output), f"{key}: {outputs[key]}, expected {output}"
        assert outputs.keys() == self.wanted.keys()

    def close(self) -> None:
        """Leave."""
        self.engine.close(self.session)
