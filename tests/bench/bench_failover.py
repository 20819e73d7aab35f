"""A server is killed or stopped in mid-answer: is the answer what it would have been, and how long does it stall?

    python tests/bench/bench_failover.py [--runs 100] [--seed 0] [--overhead-rounds 20]

Three hops and a spare server for each, all on loopback, one thread each. In every run one server of the session's
route gets SIGKILL or SIGSTOP (every other time together with the processes that it has started, as when a machine
freezes), at a random moment of the answer, the prompt included. In half of the runs the client's records of servers
are stale: older than it likes, as in any session of some length. A new server takes the place of the lost one before
the next run. By default a random small model, whose servers start quickly.

    stall   longest time between two tokens (or to the first), less the median time (to the first token without failure)
    replay  what the new server needs for the tokens that it missed, estimated from the prompts that were measured
    net     stall less replay, which is judged

The price of keeping histories is measured with the embedded model: two swarms of three servers, one with histories and
one with none, are asked in turn, in many short rounds; the ratio is that of the median times between tokens, round by
round, and its median over the rounds comes with a standard error.
"""

import argparse
import math
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from common import judged, percentile, print_report
from forked import ForkedServer, ServerFactory
from swarms import MODEL, Answer, Clock, answer, chat_tokens, connect_here
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from swarm.checkpoint.source import resolve
from swarm.client.peers import REFRESH_S
from swarm.client.processes import start_bootstrap
from swarm.errors import SwarmError

HOPS = 3
NUM_PROMPTS = 8
KNOWN_TIMEOUT_S = 60.0
OVERHEAD_TOKENS = 16
OVERHEAD_SPANS = ("0:10", "10:20", "20:30")
QUESTION = "Explain in a few sentences why the sky looks blue during the day and red in the evening."
TARGETS = {"SIGKILL": 0.5, "SIGSTOP": 3.0, "overhead": 0.03}


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or save_random_model(directory)
        runs = failures(model, args) if args.runs else []
    overheads, alike = overhead(args) if args.overhead_rounds else ([], [])
    report(runs, overheads, alike, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs with a failure (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, victims and moments (default: 0)")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens per answer (default: 40)")
    parser.add_argument("--model", help="a name or directory; a small random model by default")
    parser.add_argument("--star", action="store_true", help="everything through the client, nothing pushed")
    parser.add_argument("--overhead-rounds", type=int, default=20, help="0 leaves the overhead out (default: 20)")
    parser.add_argument("--verbose", action="store_true", help="a line per run")
    return parser.parse_args()


# --- runs with a failure ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What happens to a run."""

    hop: int
    signal: signal.Signals
    whole_tree: bool
    stale_records: bool
    """Whether the client will want to read the records again."""
    token: int
    """How many new tokens there are when the clock starts; -1 is before the prompt."""
    fraction: float
    """Part of a step that passes from then on."""

    @property
    def key(self) -> tuple[signal.Signals, bool, bool]:
        """By which it is reported."""
        return self.signal, self.whole_tree, self.stale_records


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of it."""

    failure: Failure
    error: str
    identical: bool
    stall_s: float
    replay_s: float
    replays: int

    @property
    def net_s(self) -> float:
        """Stall without what the replay computes."""
        return max(0.0, self.stall_s - self.replay_s)


@dataclass(slots=True)
class Usual:
    """What a step takes without failures; medians of the latest."""

    gap_s: deque[float] = field(default_factory=lambda: deque(maxlen=400))
    first_s: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    prompt_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    """Compute of one server per token of a prompt."""

    def learn(self, one: Answer) -> None:
        """Take in an answer without a failure."""
        self.gap_s.extend(one.gaps)
        self.first_s.append(one.first_token_s)
        self.prompt_token_s += [part.compute_s / part.num_tokens for part in one.timings if part.num_tokens > 1]


def plan(seed: int, runs: int, new_tokens: int) -> list[Failure]:
    """Failures of all runs: half of each kind, in random order, at random moments."""
    chance = random.Random(seed)
    kinds = [(signal.SIGKILL, signal.SIGSTOP)[i % 2] for i in range(runs)]
    trees = [i // 2 % 2 == 1 for i in range(runs)]
    stale = [i // 4 % 2 == 1 for i in range(runs)]
    order = list(zip(kinds, trees, stale, strict=True))
    chance.shuffle(order)
    return [
        Failure(
            hop=chance.randrange(HOPS),
            signal=kind,
            whole_tree=tree,
            stale_records=old,
            token=chance.randrange(-1, new_tokens - 3),
            fraction=chance.random(),
        )
        for kind, tree, old in order
    ]


def save_random_model(directory: str) -> str:
    """A random Llama of 12 blocks: hidden size 256, 1024 tokens."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.1,  # livelier than the default: answers don't end in a loop
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def failures(model: str, args: argparse.Namespace) -> list[Run]:
    """All runs."""
    config = resolve(model).config()
    edges = [config.num_hidden_layers * i // HOPS for i in range(HOPS + 1)]
    spans = [f"{edges[i]}:{edges[i + 1]}" for i in range(HOPS)]
    chance = random.Random(args.seed)
    prompts = [[chance.randrange(3, config.vocab_size) for _ in range(length)] for length in lengths(chance)]
    runs: list[Run] = []
    with ExitStack() as stack:
        address = stack.enter_context(start_bootstrap()).address()
        factory = stack.enter_context(ServerFactory())
        fleet = stack.enter_context(Fleet(factory, model, address, spans, push=not args.star))
        usual = Usual()
        right = [undisturbed(fleet, usual, prompt, args.new_tokens) for prompt in prompts]
        for index, failure in enumerate(plan(args.seed, args.runs, args.new_tokens)):
            which = index % len(prompts)
            runs.append(disturbed(fleet, usual, prompts[which], right[which], failure, args.new_tokens))
            if args.verbose:
                print(index, runs[-1], flush=True)
    return runs


def lengths(chance: random.Random) -> list[int]:
    """Prompts of all sizes."""
    return [chance.randrange(4, 200) for _ in range(NUM_PROMPTS)]


class Fleet:
    """Two servers for each span and a client of them."""

    def __init__(self, factory: ServerFactory, model: str, address: str, spans: Sequence[str], *, push: bool):
        self._factory, self._model, self._address, self._spans = factory, model, address, spans
        self._push = push
        self._servers: dict[str, tuple[str, ForkedServer]] = {}

    def __enter__(self) -> "Fleet":
        starting = [(span, self._start(span)) for span in self._spans for _ in range(2)]
        for span, server in starting:
            self._servers[self._online(server)] = span, server
        self.client = connect_here(self._model, self._address, push=self._push)
        self._wait_until_known()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def strike(self, peer_id: str, failure: Failure) -> None:
        """Send the signal to the server of this peer."""
        if failure.stale_records:
            self.client.block_service.peers._directory._refreshed_at -= REFRESH_S
        _, server = self._servers[peer_id]
        server.signal(failure.signal, whole_tree=failure.whole_tree)

    def replace(self, peer_id: str) -> None:
        """Start a new server for the span of one that is gone or stopped; returns when the client knows it."""
        span, server = self._servers.pop(peer_id)
        server.kill()
        new = self._start(span)
        self._servers[self._online(new)] = span, new
        self._wait_until_known()

    def _start(self, span: str) -> ForkedServer:
        return start_server(self._factory, self._model, span, self._address)

    def _online(self, server: ForkedServer) -> str:
        server.wait_for("^ONLINE")
        return server.peer_id

    def _wait_until_known(self) -> None:
        """As the client's own refresh does within 15 s."""
        service, deadline = self.client.block_service, time.monotonic() + KNOWN_TIMEOUT_S
        while time.monotonic() < deadline:
            service._loop.run(service.peers.refresh(max_age_s=0.0))
            if self._servers.keys() <= {record.peer_id for record in service.peers.records}:
                return
        raise TimeoutError(f"the client does not know all servers after {KNOWN_TIMEOUT_S:.0f} s")


class Striker(Clock):
    """Calls an action some time after a number of tokens has come."""

    def __init__(self, failure: Failure, usual: Usual, action: Callable[[], None]):
        super().__init__()
        self._failure, self._usual, self._action = failure, usual, action
        self._timer: threading.Timer | None = None

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) - 1 == self._failure.token:
            usual_s = statistics.median(self._usual.gap_s if self.times else self._usual.first_s)
            self._timer = threading.Timer(self._failure.fraction * usual_s, self._action)
            self._timer.start()

    def wait(self) -> None:
        """Until the action is done."""
        if self._timer is not None:
            self._timer.join()


def undisturbed(fleet: Fleet, usual: Usual, prompt: list[int], new_tokens: int) -> list[int]:
    """The answer that is right; asked twice, so that all is warm."""
    tokens = answer(fleet.client, prompt, new_tokens).tokens
    again = answer(fleet.client, prompt, new_tokens)
    if again.tokens != tokens:
        raise RuntimeError("two answers without a failure differ")
    usual.learn(again)
    return tokens


def disturbed(
    fleet: Fleet, usual: Usual, prompt: list[int], right: list[int], failure: Failure, new_tokens: int
) -> Run:
    """One run with a failure; all servers are there again when this returns."""
    before = answer(fleet.client, prompt, new_tokens)  # connects to what is new, too
    usual.learn(before)
    victims: list[str] = []
    cache = fleet.client.inference_session(max_length=len(prompt) + new_tokens)

    def strike() -> None:
        route = [hop.peer_id for hop in cache.session.route] or before.route
        victims.append(route[failure.hop])
        fleet.strike(victims[0], failure)

    clock = Striker(failure, usual, strike)
    one, error = None, ""
    with cache:
        try:
            one = answer(fleet.client, prompt, new_tokens, clock=clock, cache=cache)
        except SwarmError as caught:
            error = f"{type(caught).__name__}: {caught}"
    clock.wait()
    for victim in victims:
        fleet.replace(victim)
    return Run(
        failure=failure,
        error=error,
        identical=before.tokens == right and one is not None and one.tokens == right,
        stall_s=math.inf if one is None else stall_s(one, usual),
        replay_s=(len(prompt) + max(0, failure.token)) * statistics.median(usual.prompt_token_s),
        replays=0 if one is None else one.replays,
    )


def stall_s(one: Answer, usual: Usual) -> float:
    """The longest wait for a token beyond the usual wait for it."""
    between = max(one.gaps) - statistics.median(usual.gap_s)
    first = one.first_token_s - statistics.median(usual.first_s)
    return max(between, first, 0.0)


# --- the price of histories ---


def overhead(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Time per token with histories over that without, of each round; and of two swarms alike over each other.

    There are two swarms of either kind: where a process lies in memory makes it some per cent faster or slower for all
    its life. The second ratio tells how much.
    """
    memory = {"with": (), "without": ("--history-memory", "0")}
    prompt = chat_tokens(QUESTION)
    ratios, alike = [], []
    with ExitStack() as stack:
        factory = stack.enter_context(ServerFactory())
        kinds = ("with", "without", "without", "with")
        clients = [stack.enter_context(swarm_of(factory, stack, memory[kind])) for kind in kinds]
        for index in range(args.overhead_rounds + 1):
            order = list(range(len(clients)))
            gaps = dict.fromkeys(order, 0.0)
            for number in order if index % 2 else reversed(order):
                gaps[number] = statistics.median(answer(clients[number], prompt, OVERHEAD_TOKENS).gaps)
            if index:
                ratios.append((gaps[0] + gaps[3]) / (gaps[1] + gaps[2]))
                alike.append((gaps[0] + gaps[2]) / (gaps[1] + gaps[3]))
    return ratios, alike


def swarm_of(factory: ServerFactory, stack: ExitStack, options: Sequence[str]) -> Any:
    """A client of three servers of the embedded model with these options."""
    address = stack.enter_context(start_bootstrap()).address()
    servers = [start_server(factory, MODEL, span, address, *options) for span in OVERHEAD_SPANS]
    for server in servers:
        server.wait_for("^ONLINE")
    return connect_here(MODEL, address)


def start_server(factory: ServerFactory, model: str, span: str, address: str, *options: str) -> ForkedServer:
    """A server on loopback."""
    fixed = ("--host", "127.0.0.1", "--quantization", "none", "--threads", "1", "--kv-cache", "4096")
    return factory.start([model, "--blocks", span, "--initial-peers", address, *fixed, *options])


# --- report ---


def report(runs: Sequence[Run], overheads: Sequence[float], alike: Sequence[float], args: argparse.Namespace) -> None:
    """Tables and JSON."""
    targets, rows = {}, []
    details = {"seed": args.seed, "push": not args.star, "model": args.model or "random", "rows": rows}
    print(
        f"{'signal':9}{'to':9}{'records':8}{'runs':>5}{'identical':>11}{'replayed':>10}{'stall s: median':>17}", end=""
    )
    print(f"{'p90':>8}{'max':>8}{'replay s':>10}{'net s':>8}")
    for kind, stale in product((signal.SIGKILL, signal.SIGSTOP), (False, True)):
        both: list[Run] = []
        for tree in (False, True):
            if group := [run for run in runs if run.failure.key == (kind, tree, stale)]:
                rows.append(summary(group))
                print_row(rows[-1])
                both += group
        if both:
            net_s = statistics.median(run.net_s for run in both)
            name = f"{kind.name}_{'stale' if stale else 'fresh'}_records_median_net_stall_s"
            targets[name] = judged(net_s, "<=", TARGETS[kind.name])
    if runs:
        targets["identical"] = judged(sum(run.identical for run in runs) / len(runs), "==", 1.0)
    for run in runs:
        if not run.identical:
            print(f"NOT IDENTICAL: {run}")
    if overheads:
        targets["overhead_of_history"] = judged(statistics.median(overheads) - 1, "<=", TARGETS["overhead"])
        error = median_error(overheads)
        print(f"overhead of history: {statistics.median(overheads) - 1:+.1%} ± {error:.1%} (standard error)")
        print(f"one of each kind over the other of each: {statistics.median(alike) - 1:+.1%}")
        details["alike"] = round(statistics.median(alike), 4)
        details["overhead_standard_error"] = round(error, 4)
    print_report("failover", targets, runs=len(runs), overhead_rounds=args.overhead_rounds, **details)


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median, from the quartiles, for values that are about normal."""
    deviation = (percentile(values, 0.75) - percentile(values, 0.25)) / 1.349
    return float(1.2533 * deviation / math.sqrt(len(values)))


def summary(group: Sequence[Run]) -> dict[str, Any]:
    """What is reported of the runs of one kind."""
    stalls = [run.stall_s for run in group]
    return {
        "signal": group[0].failure.signal.name,
        "to": "tree" if group[0].failure.whole_tree else "process",
        "records": "stale" if group[0].failure.stale_records else "fresh",
        "runs": len(group),
        "identical": sum(run.identical for run in group),
        "replayed": sum(run.replays > 0 for run in group),
        "median_stall_s": round(statistics.median(stalls), 3),
        "p90_stall_s": round(percentile(stalls, 0.9), 3),
        "max_stall_s": round(max(stalls), 3),
        "median_replay_s": round(statistics.median(run.replay_s for run in group), 3),
        "median_net_s": round(statistics.median(run.net_s for run in group), 3),
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['signal']:9}{row['to']:9}{row['records']:8}{row['runs']:5}{row['identical']:11}{row['replayed']:10}",
        end="",
    )
    print(f"{row['median_stall_s']:17}{row['p90_stall_s']:8}{row['max_stall_s']:8}", end="")
    print(f"{row['median_replay_s']:10}{row['median_net_s']:8}")


if __name__ == "__main__":
    main()
