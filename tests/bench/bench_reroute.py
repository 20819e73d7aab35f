"""A quick server joins while sessions go on over a slow one: when do they move there, what does it cost and bring?

    python tests/bench/bench_reroute.py [--sessions 2] [--tokens 600] [--slow 0.15] [--doubling 5] [--seed 0]

Three hops of the embedded model on loopback, one thread each; each batch of the middle server takes --slow seconds
longer. All sessions generate at the same time. When each has some tokens, a second server for the middle blocks joins,
which is as quick as the others. Nobody is told: clients look, wait and move by themselves, with everybody's limits, but
that the wait at random, up to two minutes, is cut to 20 s (--doubling 30 leaves it as it is).

    moved after   from the quick server's ONLINE to the first token that came through it
    stall         the longest wait for a token at the move, less the median wait before it
    tokens/s      by the median wait for a token, before and after the move
"""

import argparse
import os
import random
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from common import ROOT, judged, print_report
from swarms import MODEL, Clock, answer, connect_here

from swarm.checkpoint.source import resolve
from swarm.client import betterment
from swarm.client.betterment import NUM_DOUBLINGS, NUM_LOOKS
from swarm.client.processes import PeerProcess, start_bootstrap
from swarm.client.rerouting import LOOK_S

SPANS = ("0:10", "10:20", "20:30")
TOKENS_BEFORE = 20
AROUND = 3
"""Tokens before and after a move among which its stall is looked for."""
TARGET_STALL_S = 1.0
TARGET_GAIN = 2.0
LATEST_S = NUM_LOOKS * LOOK_S + 2 * LOOK_S + 20.0
"""When sessions have moved at the latest, but for the wait: some looks, one more at each end, and a record's way."""


class Watch(Clock):
    """Notes after which token its session had moved."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Any = None
        self.moved_at: int | None = None
        self.has_begun = threading.Event()

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) >= TOKENS_BEFORE:
            self.has_begun.set()
        if self.moved_at is None and self.session.num_moves:
            self.moved_at = len(self.times) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What became of one session."""

    tokens: list[int]
    num_moves: int
    num_replays: int
    moved_after_s: float
    stall_s: float
    before_tps: float
    after_tps: float


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    betterment.DOUBLING_S = args.doubling
    chance = random.Random(args.seed)
    vocabulary = resolve(MODEL).config().get_text_config().vocab_size
    prompts = [
        [chance.randrange(3, vocabulary) for _ in range(chance.randrange(200, 500))] for _ in range(args.sessions)
    ]
    courses, right = measure(prompts, args)
    report(courses, right, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=2, help="at the same time (default: 2)")
    parser.add_argument("--tokens", type=int, default=600, help="that each generates (default: 600)")
    parser.add_argument("--slow", type=float, default=0.15, help="seconds more per batch (default: 0.15)")
    parser.add_argument("--doubling", type=float, default=5.0, help="seconds until twice as many move (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts (default: 0)")
    return parser.parse_args()


def measure(prompts: Sequence[list[int]], args: argparse.Namespace) -> tuple[list[Course], list[list[int]]]:
    """All sessions while they move, and the same answers in sessions that don't."""
    with ExitStack() as stack:
        address = stack.enter_context(start_bootstrap()).address()
        slow = {"SWARM_BENCH_SLOW_S": str(args.slow)}
        for span, env in zip(SPANS, ({}, slow, {}), strict=True):
            start(stack, span, address, env)
        client = connect_here(MODEL, address)
        stack.callback(client.close)
        watches = [Watch() for _ in prompts]
        courses: dict[int, Course] = {}
        joined_at = [0.0]
        asking = threading.Thread(
            target=lambda: courses.update(together(client, prompts, args.tokens, watches, joined_at))
        )
        asking.start()
        for watch in watches:
            watch.has_begun.wait()
        start(stack, SPANS[1], address, {})
        joined_at[0] = time.perf_counter()
        asking.join()
        still = connect_here(MODEL, address, reroute=False)
        stack.callback(still.close)
        right = together(still, prompts, args.tokens, [Watch() for _ in prompts], joined_at)
        return [courses[index] for index in range(len(prompts))], [right[i].tokens for i in range(len(prompts))]


def start(stack: ExitStack, span: str, address: str, env: dict[str, str]) -> None:
    """A server on loopback, online when this returns."""
    options = [MODEL, "--blocks", span, "--initial-peers", address, "--host", "127.0.0.1", "--quantization", "none"]
    options += ["--threads", "1", "--kv-cache", "16384"]
    path = os.pathsep.join(filter(None, (str(ROOT / "tests" / "bench"), os.environ.get("PYTHONPATH"))))
    server = PeerProcess("altered_server", options, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env})
    stack.enter_context(server)
    server.wait_for("^ONLINE", 240.0)


def together(
    client: Any, prompts: Sequence[list[int]], num_tokens: int, watches: Sequence[Watch], joined_at: list[float]
) -> dict[int, Course]:
    """The answers to all prompts at the same time."""
    courses: dict[int, Course] = {}

    def ask(number: int) -> None:
        prompt, watch = prompts[number], watches[number]
        with client.inference_session(max_length=len(prompt) + num_tokens) as cache:
            watch.session = cache.session
            found = answer(client, prompt, num_tokens, clock=watch, cache=cache)
            courses[number] = course(found.tokens, watch, joined_at[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return courses


def course(tokens: list[int], watch: Watch, joined_at: float) -> Course:
    """What one session's clock tells."""
    gaps = [b - a for a, b in pairwise(watch.times)]
    at = watch.moved_at if watch.moved_at is not None else len(gaps)
    before, after = gaps[:at], gaps[at + AROUND :]
    usual_s = statistics.median(before)
    return Course(
        tokens=tokens,
        num_moves=watch.session.num_moves,
        num_replays=watch.session.num_replays,
        moved_after_s=watch.times[at] - joined_at if at < len(gaps) else float("inf"),
        stall_s=max(gaps[max(0, at - AROUND) : at + AROUND]) - usual_s,
        before_tps=1.0 / usual_s,
        after_tps=1.0 / statistics.median(after) if after else 0.0,
    )


def report(courses: Sequence[Course], right: Sequence[list[int]], args: argparse.Namespace) -> None:
    """Table and JSON."""
    print(f"{'session':8}{'moves':>6}{'replays':>8}{'moved after s':>15}{'stall s':>9}{'tokens/s':>10}{'then':>7}")
    for number, it in enumerate(courses):
        print(f"{number:<8}{it.num_moves:6}{it.num_replays:8}{it.moved_after_s:15.1f}{it.stall_s:9.3f}", end="")
        print(f"{it.before_tps:10.1f}{it.after_tps:7.1f}")
    changed = sum(it.tokens != tokens for it, tokens in zip(courses, right, strict=True))
    latest_s = LATEST_S + NUM_DOUBLINGS * args.doubling
    targets = {
        "sessions_with_lost_or_changed_tokens": judged(changed, "==", 0),
        "sessions_that_moved_once": judged(sum(it.num_moves == 1 for it in courses) / len(courses), "==", 1.0),
        "replays": judged(sum(it.num_replays for it in courses), "==", 0),
        "longest_stall_s": judged(max(it.stall_s for it in courses), "<=", TARGET_STALL_S),
        "least_gain_of_speed": judged(min(it.after_tps / it.before_tps for it in courses), ">=", TARGET_GAIN),
        "last_moved_after_s": judged(max(it.moved_after_s for it in courses), "<=", latest_s),
    }
    rows = [
        {
            name: round(getattr(it, name), 3)
            for name in ("num_moves", "num_replays", "moved_after_s", "stall_s", "before_tps", "after_tps")
        }
        for it in courses
    ]
    print_report(
        "reroute", targets, seed=args.seed, tokens=args.tokens, slow_s=args.slow, doubling_s=args.doubling, rows=rows
    )


if __name__ == "__main__":
    main()
