"""A server with live sessions is told to stop, or is killed: how long does each session stand still, and what moves?

    python tests/bench/bench_migration.py [--rounds 3] [--sessions 8] [--seed 0]

Three hops of the embedded model on loopback, one thread each; all sessions generate at the same time, with contexts of
some hundreds of tokens. When each has a few new tokens, a second server for the middle blocks is started and made
known; then the first gets SIGTERM (it hands its sessions over, and leaves) or, in every other round, SIGKILL (its
sessions are replayed from the histories of the server before it). In half of the rounds the sessions go on meanwhile;
in the others they wait for their users, and their next token is asked for when the server has gone.

    stall     longest wait for a token after the signal, less the median wait of the same session before it
    transfer  from when the old server takes no more steps of a session until the new one has it, by its log
    bytes     keys, values and history of a session, by its log

Lengths of prompts differ by more than what is generated, so that a session of the log is known by its tokens, and each
one's stall is compared with its own transfer.
"""

import argparse
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from common import judged, percentile, print_report
from forked import ForkedServer, ServerFactory
from swarms import MODEL, Answer, Clock, answer, connect_here

from swarm.checkpoint.source import resolve
from swarm.client.processes import start_bootstrap

SPANS = ("0:10", "10:20", "20:30")
MIDDLE = SPANS[1]
KNOWN_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 60.0
TOKENS_BEFORE = 6
TOKENS_AFTER = 24
SHORTEST, APART = 200, 37
"""Tokens of the shortest prompt, and by how many the others are longer than each other."""
STRIKE_AFTER_S = 0.5
TARGET_S = 1.0
GAVE = re.compile(r"gave a session of (\d+) tokens, (\d+) bytes, to \S+ in ([\d.]+) s")


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    vocabulary = resolve(MODEL).config().get_text_config().vocab_size
    lengths = [SHORTEST + APART * index for index in range(args.sessions)]
    chance.shuffle(lengths)
    prompts = [[chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    report(measure(prompts, args), prompts, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of each kind (default: 2)")
    parser.add_argument("--sessions", type=int, default=8, help="at the server (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts (default: 0)")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A session that was handed over, by the log of the server that had it."""

    num_tokens: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What became of all sessions in one round."""

    signal: signal.Signals
    is_idle: bool
    identical: int
    stalls: list[float]
    replays: int
    moves: list[Move]
    beyond: list[float]
    """Of each session that was handed over, its stall less its own transfer."""
    leaving_s: float
    """From the signal until the process had gone."""


class Pause(Clock):
    """Stops its session after some tokens, until all may go on; notes when the time of the second part began."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.is_here, self.go = threading.Event(), threading.Event()
        self.went = 0.0
        self._num_tokens = num_tokens

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) == self._num_tokens:
            self.is_here.set()
            self.go.wait()
            self.went = time.perf_counter()

    def stall_s(self) -> float:
        """The longest wait in the second part, less what this session usually waited in the first."""
        before, after = self.times[: self._num_tokens], [self.went, *self.times[self._num_tokens :]]
        return max(b - a for a, b in pairwise(after)) - statistics.median(b - a for a, b in pairwise(before))


def measure(prompts: Sequence[list[int]], args: argparse.Namespace) -> list[Round]:
    """All rounds."""
    with ExitStack() as stack:
        address = stack.enter_context(start_bootstrap()).address()
        factory = stack.enter_context(ServerFactory())
        servers = {span: start(factory, span, address) for span in SPANS}
        for server in servers.values():
            server.wait_for("^ONLINE")
        client = connect_here(MODEL, address)
        stack.callback(client.close)
        right = [one.tokens for one in together(client, prompts)]
        rounds = []
        for number in range(4 * args.rounds):
            kind, is_idle = (signal.SIGTERM, signal.SIGKILL)[number % 2], number // 2 % 2 == 1
            spare, found = disturbed(client, prompts, right, factory, address, servers[MIDDLE], kind, is_idle)
            servers[MIDDLE] = spare
            rounds.append(found)
        return rounds


def together(client: Any, prompts: Sequence[list[int]], clocks: Sequence[Clock] | None = None) -> list[Answer]:
    """The answers to all prompts at the same time."""
    answers: dict[int, Answer] = {}

    def ask(number: int) -> None:
        clock = clocks[number] if clocks is not None else None
        answers[number] = answer(client, prompts[number], TOKENS_BEFORE + TOKENS_AFTER, clock=clock)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(prompts))]


def disturbed(
    client: Any,
    prompts: Sequence[list[int]],
    right: Sequence[list[int]],
    factory: ServerFactory,
    address: str,
    victim: ForkedServer,
    kind: signal.Signals,
    is_idle: bool,
) -> tuple[ForkedServer, Round]:
    """One round; the server that took over, and what was seen."""
    clocks = [Pause(TOKENS_BEFORE) for _ in prompts]
    found: list[Answer] = []
    asking = threading.Thread(target=lambda: found.extend(together(client, prompts, clocks)))
    asking.start()
    for clock in clocks:
        clock.is_here.wait()
    spare = start(factory, MIDDLE, address)
    spare.wait_for("^ONLINE")
    wait_until_known(client, spare.peer_id)
    if not is_idle:
        for clock in clocks:
            clock.go.set()
        time.sleep(STRIKE_AFTER_S)
    struck = time.perf_counter()
    victim.signal(kind, whole_tree=kind is signal.SIGKILL)
    victim._reader.join(EXIT_TIMEOUT_S)
    leaving_s = time.perf_counter() - struck
    for clock in clocks:
        clock.go.set()
    asking.join()
    victim.kill()
    stalls = [clock.stall_s() for clock in clocks]
    moves = [
        Move(num_tokens=int(match[1]), num_bytes=int(match[2]), seconds=float(match[3]))
        for line in victim.lines
        if (match := GAVE.search(line))
    ]
    return spare, Round(
        signal=kind,
        is_idle=is_idle,
        identical=sum(one.tokens == tokens for one, tokens in zip(found, right, strict=True)),
        stalls=stalls,
        replays=sum(one.replays for one in found),
        moves=moves,
        beyond=[stalls[whose(move, prompts)] - move.seconds for move in moves],
        leaving_s=leaving_s,
    )


def whose(move: Move, prompts: Sequence[list[int]]) -> int:
    """Which session was handed over: the only one with a prompt that is shorter by less than what is generated."""
    (index,) = (i for i, it in enumerate(prompts) if 0 <= move.num_tokens - len(it) <= TOKENS_BEFORE + TOKENS_AFTER)
    return index


def start(factory: ServerFactory, span: str, address: str) -> ForkedServer:
    """A server on loopback that logs what it hands over."""
    fixed = ("--host", "127.0.0.1", "--quantization", "none", "--threads", "1", "--kv-cache", "8192")
    return factory.start([MODEL, "--blocks", span, "--initial-peers", address, *fixed, "--log-level", "info"])


def wait_until_known(client: Any, peer_id: str) -> None:
    """As the client's own refresh does within 15 s."""
    service, deadline = client.block_service, time.monotonic() + KNOWN_TIMEOUT_S
    while time.monotonic() < deadline:
        service._loop.run(service.peers.refresh(max_age_s=0.0))
        if peer_id in {record.peer_id for record in service.peers.records}:
            return
    raise TimeoutError(f"the client does not know {peer_id} after {KNOWN_TIMEOUT_S:.0f} s")


# --- report ---


def report(rounds: Sequence[Round], prompts: Sequence[list[int]], args: argparse.Namespace) -> None:
    """Tables and JSON."""
    rows = []
    print(f"{'signal':9}{'sessions':9}{'alike':>7}{'replays':>9}{'moves':>7}{'stall s: median':>17}{'max':>8}", end="")
    print(f"{'transfer s: median':>20}{'max':>8}{'most beyond it':>16}{'MB each':>9}{'gone s':>8}")
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for is_idle in (False, True):
            rows.append(summary([it for it in rounds if it.signal is kind and it.is_idle == is_idle]))
            print_row(rows[-1])
    drains = [it for it in rounds if it.signal is signal.SIGTERM]
    count = len(prompts)
    beyond = [seconds for it in drains for seconds in it.beyond]
    medians = {it["signal"]: it["median_stall_s"] for it in rows if it["sessions"] == "busy"}
    targets = {
        "sessions_with_lost_or_changed_tokens": judged(sum(count - it.identical for it in rounds), "==", 0),
        "sessions_that_moved": judged(sum(len(it.moves) for it in drains) / (count * len(drains)), "==", 1.0),
        "replays_after_a_drain": judged(sum(it.replays for it in drains), "==", 0),
        "longest_stall_less_its_transfer_s": judged(max(beyond, default=float("inf")), "<=", TARGET_S),
        "median_stall_of_a_drain_over_a_kill": judged(medians["SIGTERM"] / medians["SIGKILL"], "<=", 1.0),
    }
    details = {"seed": args.seed, "sessions": count, "prompt_tokens": [len(it) for it in prompts], "rows": rows}
    print_report("migration", targets, rounds=len(rounds), **details)


def summary(group: Sequence[Round]) -> dict[str, Any]:
    """What is reported of the rounds of one kind."""
    stalls = [stall for it in group for stall in it.stalls]
    moves = [move for it in group for move in it.moves]
    return {
        "signal": group[0].signal.name,
        "sessions": "idle" if group[0].is_idle else "busy",
        "identical": sum(it.identical for it in group),
        "replays": sum(it.replays for it in group),
        "moves": len(moves),
        "median_stall_s": round(statistics.median(stalls), 3),
        "p90_stall_s": round(percentile(stalls, 0.9), 3),
        "max_stall_s": round(max(stalls), 3),
        "median_transfer_s": round(statistics.median([move.seconds for move in moves] or [0.0]), 3),
        "max_transfer_s": round(max([move.seconds for move in moves], default=0.0), 3),
        "max_stall_less_transfer_s": round(max([one for it in group for one in it.beyond], default=0.0), 3),
        "mean_bytes": round(statistics.mean([move.num_bytes for move in moves] or [0])),
        "mean_tokens": round(statistics.mean([move.num_tokens for move in moves] or [0])),
        "max_leaving_s": round(max(it.leaving_s for it in group), 3),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(f"{row['signal']:9}{row['sessions']:9}{row['identical']:7}{row['replays']:9}{row['moves']:7}", end="")
    print(f"{row['median_stall_s']:17}{row['max_stall_s']:8}{row['median_transfer_s']:20}", end="")
    print(f"{row['max_transfer_s']:8}{row['max_stall_less_transfer_s']:16}", end="")
    print(f"{row['mean_bytes'] / 1e6:9.1f}{row['max_leaving_s']:8}")


if __name__ == "__main__":
    main()
