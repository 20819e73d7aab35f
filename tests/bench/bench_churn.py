"""Servers come and go all the time, and people are answered: are the answers right, and dead servers forgotten?

    python tests/bench/bench_churn.py [--minutes 10] [--servers 8] [--mean-life 60] [--clients 4]

Real processes on loopback with the embedded model in fp32, one thread each; a server has ten of 30 blocks, so there are
fewer than three of each kind. Deaths are a Poisson process (SIGKILL, or as often SIGTERM), and after each one another
server comes and takes what fewest have. Clients ask all the time, greedily; right are the tokens of an answer that was
given before anybody died. A request counts unless some block was without a living server at some moment of it. A dead
server leaves routes when no new route goes over it any more.
"""

import argparse
import random
import signal
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from common import judged, percentile, print_report
from forked import ForkedServer, ServerFactory
from swarms import MODEL, START_TIMEOUT_S, answer, chat_tokens, connect_here

from swarm.client.peers import Peers
from swarm.client.processes import start_bootstrap
from swarm.errors import SwarmError

SPANS = ("0:10", "10:20", "20:30")
QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Explain photosynthesis in one sentence.",
)
MAX_WAIT_S = 60.0
TARGETS = {"right": 0.995, "forgotten": 15.0}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of churn (default: 10)")
    parser.add_argument("--servers", type=int, default=8, help="at the beginning (default: 8)")
    parser.add_argument("--mean-life", type=float, default=60.0, help="seconds that a server lives (default: 60)")
    parser.add_argument("--clients", type=int, default=4, help="who ask at once (default: 4)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of lives and victims (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bootstrap = start_bootstrap()
    try:
        with ServerFactory() as factory:
            address = bootstrap.wait_for(r"--initial-peers (\S+)", START_TIMEOUT_S)[1]
            churn = Churn(factory, address, args)
            model = connect_here(MODEL, address, max_wait_s=MAX_WAIT_S)
            requests, routes = run(model, churn, args)
            model.close()
    finally:
        bootstrap.stop()
    report(requests, routes, churn, args)


@dataclass(slots=True, eq=False)
class Life:
    """One server."""

    span: str
    server: ForkedServer
    online_at: float = float("inf")
    died_at: float = float("inf")


class Churn:
    """Servers that die and are replaced, in a thread of their own.

    Args:
        factory: starts them.
        address: of the bootstrap peer.
        args: of the benchmark.
    """

    def __init__(self, factory: ServerFactory, address: str, args: argparse.Namespace):
        self.lives: list[Life] = []
        self._factory, self._address, self._args = factory, address, args
        self._dice = random.Random(args.seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._churn, daemon=True)
        for _ in range(args.servers):
            self._join()
        for life in self.lives:
            self._wait(life)

    def start(self) -> None:
        """Let them die."""
        self._thread.start()

    def stop(self) -> None:
        """No more deaths."""
        self._over.set()
        self._thread.join()

    def had_gap(self, since: float, until: float) -> bool:
        """Whether a block was without a living server at some moment."""
        return any(self._is_uncovered(span, since, until) for span in SPANS)

    def _is_uncovered(self, span: str, since: float, until: float) -> bool:
        at = since
        while at < until:
            ends = [life.died_at for life in self.lives if life.span == span and life.online_at <= at < life.died_at]
            if not ends:
                return True
            at = max(ends)
        return False

    def _churn(self) -> None:
        while not self._over.wait(self._dice.expovariate(self._args.servers / self._args.mean_life)):
            living = [life for life in self.lives if life.online_at < float("inf") and life.died_at == float("inf")]
            if not living:
                continue
            victim = self._dice.choice(living)
            victim.died_at = time.monotonic()
            if self._dice.random() < 0.5:
                victim.server.signal(signal.SIGTERM)
            else:
                victim.server.kill()
            threading.Thread(target=self._wait, args=(self._join(),), daemon=True).start()

    def _join(self) -> Life:
        counts = Counter(life.span for life in self.lives if life.died_at == float("inf"))
        span = min(SPANS, key=lambda it: counts[it])
        options = [MODEL, "--blocks", span, "--initial-peers", self._address, "--host", "127.0.0.1", "--threads", "1"]
        life = Life(span, self._factory.start([*options, "--kv-cache", "4096"]))
        self.lives.append(life)
        return life

    def _wait(self, life: Life) -> None:
        life.server.wait_for("^ONLINE", START_TIMEOUT_S)
        life.online_at = time.monotonic()


@dataclass(slots=True, kw_only=True)
class Request:
    """One answer, or why there is none."""

    started: float
    ended: float
    is_right: bool
    error: str = ""
    replays: int = 0


@dataclass(slots=True, eq=False)
class Routes:
    """When routes were made, and over whom."""

    made: list[tuple[float, tuple[str, ...]]] = field(default_factory=list)

    def watch(self) -> None:
        """Note all routes of this process from now on."""
        find = Peers.route

        async def noted(peers: Peers, *args: Any, **kwargs: Any) -> Any:
            hops = await find(peers, *args, **kwargs)
            self.made.append((time.monotonic(), tuple(hop.peer_id for hop in hops)))
            return hops

        Peers.route = noted  # type: ignore[method-assign]

    def forgotten_after_s(self, churn: Churn) -> list[float]:
        """For each dead server: how long after its death the last new route went over it; 0 for none."""
        ages = []
        for life in churn.lives:
            if life.died_at < float("inf"):
                later = [at - life.died_at for at, hops in self.made if life.server.peer_id in hops]
                ages.append(max([0.0, *later]))
        return ages


def run(model: Any, churn: Churn, args: argparse.Namespace) -> tuple[list[Request], Routes]:
    """Ask while servers die."""
    prompts = [chat_tokens(question) for question in QUESTIONS]
    expected = [answer(model, tokens, args.new_tokens).tokens for tokens in prompts]
    requests: list[Request] = []
    routes = Routes()
    routes.watch()
    until = time.monotonic() + 60 * args.minutes
    churn.start()

    def ask(client: int) -> None:
        turn = client
        while (started := time.monotonic()) < until:
            index, error, found = turn % len(prompts), "", None
            try:
                found = answer(model, prompts[index], args.new_tokens)
            except SwarmError as failure:
                error = f"{type(failure).__name__}: {failure}"
            requests.append(
                Request(
                    started=started,
                    ended=time.monotonic(),
                    is_right=found is not None and found.tokens == expected[index],
                    error=error,
                    replays=found.replays if found is not None else 0,
                )
            )
            turn += 1

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(args.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    churn.stop()
    return requests, routes


def report(requests: list[Request], routes: Routes, churn: Churn, args: argparse.Namespace) -> None:
    """Print all."""
    counted = [it for it in requests if not churn.had_gap(it.started, it.ended)]
    right = sum(it.is_right for it in counted)
    others = [it for it in requests if churn.had_gap(it.started, it.ended)]
    forgotten = routes.forgotten_after_s(churn)
    seconds = [it.ended - it.started for it in counted]
    num_replaced = sum(it.replays for it in requests)
    print(f"{len(forgotten)} servers of {len(churn.lives)} died, {num_replaced} were replaced in an answer")
    print(f"{len(counted)} requests with all blocks served: {right} right")
    print(f"{len(others)} while some block was not: {sum(it.is_right for it in others)} right all the same")
    for error in sorted({it.error for it in requests if it.error}):
        print(f"    {error}")
    print(f"seconds per request: median {statistics.median(seconds):.1f}, p99 {percentile(seconds, 0.99):.1f}")
    print(f"last route over a dead server: median {statistics.median(forgotten):.1f} s, worst {max(forgotten):.1f} s")
    targets = {
        "right answers": judged(right / len(counted), ">=", TARGETS["right"]),
        "dead servers leave routes, s": judged(max(forgotten), "<=", TARGETS["forgotten"]),
    }
    details = {"died": len(forgotten), "requests": len(counted), "without_coverage": len(others)}
    print_report("churn", targets, minutes=args.minutes, clients=args.clients, **details)


if __name__ == "__main__":
    main()
