"""One pool of pages for adapters and KV cache against a fixed split of the same bytes, on a trace whose mix drifts.

    python tests/bench/bench_paging.py [--pages 1024] [--seconds 600]

The trace begins with long prompts for few adapters, drifts to short prompts for many, and back, twice; arrivals are
Poisson. Scheduler, admission, pages, residency and moves to host memory are the server's own; only the blocks are
missing, whose time is made up. An adapter takes as many pages as one of rank 16 on all linears of the embedded model.

A fixed split gives adapters a pool of their own (what engines with adapter slots do); several are tried. Served:
answered in full; in time: with the first token within 6 s (S-LoRA's bound). A split that refuses many is in time for
more of the rest, so both are printed. Every run ends with no page in use.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from common import judged, print_report

from swarm.server.host_pages import HostBudget
from swarm.server.memory import KvMemory
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.server.residency import Residency
from swarm.server.scheduler import Batch, Failed, Scheduler
from swarm.server.sequences import CachedSequence, CachedSession
from swarm.server.work import Produced, Work
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 1)
ADAPTER_PAGES = 30
MAX_FIRST_TOKEN_S = 6.0
ATTACH_S = 0.01
SPLITS = (0.25, 0.5, 0.75)
"""Part of the pages that is for adapters alone."""


@dataclass(frozen=True)
class Request:
    """One user."""

    at: float
    adapter: str
    prompt: int
    answer: int


def make_trace(seconds: float, rate: float, seed: int) -> list[Request]:
    """Requests whose mix goes from long and few to short and many and back, twice."""
    dice, now, found = random.Random(seed), 0.0, []
    while (now := now + dice.expovariate(rate)) < seconds:
        many = 0.5 - 0.5 * math.cos(4 * math.pi * now / seconds)
        adapters = round(4 * (60 / 4) ** many)
        prompt = dice.expovariate(1 / (900 * (40 / 900) ** many))
        found.append(
            Request(
                now,
                f"{dice.randrange(adapters):064x}",
                min(2000, 16 + round(prompt)),
                min(200, 8 + round(dice.expovariate(1 / 40))),
            )
        )
    return found


class Meter:
    """Says what an adapter takes."""

    def adapter_pages(self, deltas: Any, pages: Any = ()) -> int:
        return max(0, ADAPTER_PAGES - len(pages))

    def adapter_bytes(self, deltas: Any, *, paged: bool) -> int:
        return 0 if paged else 1 << 60


class Slots(Residency):
    """Adapters in a pool of their own: they neither take pages of the KV cache nor give any."""

    def pages_wanted(self, sessions: Iterable[Any]) -> int:
        return 0

    def pages_released(self, session: Any, gone: Counter[str], wanted: Any) -> int:
        return 0


class Server:
    """The scheduler of a server whose blocks are a formula.

    Args:
        num_pages: in all.
        split: part of them for adapters alone; None for one pool.
    """

    def __init__(self, num_pages: int, split: float | None):
        own = 0 if split is None else int(split * num_pages)
        self.allocator = PageAllocator(num_pages - own)
        self.memory = KvMemory(
            self.allocator, page_bytes=1 << 16, host=HostBudget(1 << 30), prefixes=None, meter=Meter(), own_bytes=0
        )
        if own:
            moves = lambda move: self.memory.moves.append(move)  # noqa: E731
            self.memory.adapters = Slots(PageAllocator(own), moves, Meter(), own_bytes=0)
        self.scheduler = Scheduler(self.memory)
        self.now = 0.0
        self.left: dict[CachedSession, tuple[Request, int]] = {}
        self.first_at: dict[CachedSession, float] = {}
        self.served = self.late = self.refused = self.num_users = 0

    def run(self, trace: list[Request]) -> dict[str, Any]:
        """All requests; those that are not done when the trace ends are let finish."""
        waiting = trace[::-1]
        while waiting or self.left:
            while waiting and waiting[-1].at <= self.now:
                self.come(waiting.pop())
            batch = self.turn()
            if not batch.rows and not batch.moves and not self.scheduler.can_progress:
                coming = waiting[-1].at if waiting else math.inf
                self.now = max(self.now + 1e-3, min(coming, self.scheduler.next_deadline()))
            self.advance()
        assert self.allocator.num_used == 0, "pages are in use after the run"
        return {
            "served": self.served,
            "late": self.late,
            "refused": self.refused,
            "attached": self.memory.adapters.num_attached,
            "seconds": round(self.now, 1),
        }

    def come(self, request: Request) -> None:
        self.num_users += 1
        self.memory.adapters.add(request.adapter, {})
        session = CachedSession(
            blocks=BLOCKS,
            client=str(self.num_users),
            listener=None,  # type: ignore[arg-type]
            rows=[CachedSequence(table=PageTable(self.allocator))],
            adapters=(request.adapter,),
        )
        self.left[session] = request, request.answer
        self.submit(session, request.prompt)

    def submit(self, session: CachedSession, count: int) -> None:
        length = session.rows[0].table.length
        work = Work(
            step_id=length,
            order=None,
            base=None,
            num_tokens=(count,),
            outputs_from=(length + count,),
            hidden_states=torch.zeros(count, 1),
        )
        self.scheduler.submit(session, work, self.now)

    def turn(self) -> Batch:
        attached = self.memory.adapters.num_attached
        batch = self.scheduler.schedule(self.now)
        notices = list(batch.notices)
        self.now += ATTACH_S * (self.memory.adapters.num_attached - attached)
        if batch.rows:
            seconds = 0.02 + 0.0004 * batch.num_tokens
            self.now += seconds
            notices += self.scheduler.finish(batch, [None] * len(batch.rows), seconds, self.now)
        for session, notice in notices:
            if isinstance(notice, Failed) and session in self.left:
                self.refused += 1
                del self.left[session]
                self.scheduler.close(session, self.now)
            elif isinstance(notice, Produced) and not session.jobs:
                self.first_at.setdefault(session, self.now)
        return batch

    def advance(self) -> None:
        """Those who have their token ask for the next, or leave."""
        for session in [session for session in self.left if not session.jobs]:
            request, left = self.left[session]
            if left > 1:
                self.left[session] = request, left - 1
                self.submit(session, 1)
                continue
            is_late = self.first_at[session] - request.at > MAX_FIRST_TOKEN_S
            self.late, self.served = self.late + is_late, self.served + (not is_late)
            del self.left[session]
            self.scheduler.close(session, self.now)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1024, help=f"of {PAGE_SIZE} tokens, in all (default: 1024)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the trace (default: 600)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    print(f"{'rate':>6} {'pages':>12} {'requests':>9} {'in time':>7} {'late':>6} {'refused':>8} {'attached':>9}")
    for rate in args.rates:
        trace = make_trace(args.seconds, rate, args.seed)
        for split in (None, *SPLITS):
            found = Server(args.pages, split).run(trace)
            name = "one pool" if split is None else f"{split:.0%} apart"
            rows.append({"rate": rate, "pages": name, "requests": len(trace), **found})
            print(f"{rate:6} {name:>12} {len(trace):9} {found['served']:7} {found['late']:6} {found['refused']:8}"
                  f" {found['attached']:9}")  # fmt: skip
    targets, in_time = {}, {}
    for rate in args.rates:
        mine = {row["pages"]: row for row in rows if row["rate"] == rate}
        one = mine.pop("one pool")
        best = max(row["served"] + row["late"] for row in mine.values())
        targets[f"served_over_best_split_at_{rate:g}"] = judged((one["served"] + one["late"]) / best, ">=", 1.0)
        in_time[rate] = round(one["served"] / max(row["served"] for row in mine.values()), 3)
    print(f"with the first token within {MAX_FIRST_TOKEN_S:g} s, one pool over the best split: {in_time}")
    print_report("paging", targets, rows=rows, in_time=in_time, pages=args.pages, adapter_pages=ADAPTER_PAGES)


if __name__ == "__main__":
    main()
