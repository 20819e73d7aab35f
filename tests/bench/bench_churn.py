"""Servers come and go all the time, and people are answered: are the answers right, and dead servers forgotten?

    python tests/bench/bench_churn.py [--minutes 10] [--servers 8] [--mean-life 60] [--clients 4] [--logs DIR]

Real processes on loopback with the embedded model in fp32, one thread each; a server has ten of 30 blocks, so there are
fewer than three of each kind. Deaths are a Poisson process (SIGKILL, or as often SIGTERM), and after each one another
server comes and takes what fewest have. Clients, each in a process of its own, ask all the time, greedily; right are
the tokens that transformers gives on one machine. A request counts unless some block was without a living server,
announced and online, at some moment of it; one that was told to stop lives no more.

A dead server leaves routes when no client gets a new route over it any more, nor moves a session to it; counted from
SIGKILL, or from the end of one that was told to stop, which first hands its sessions to others. Besides those that
ask, strangers come and find one route with what the DHT says, and others stay but look for a route now and then only,
so that nobody has told them who died.
"""

import argparse
import json
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from churn_client import QUESTIONS, told
from common import judged, percentile, print_report
from forked import ForkedServer, ServerFactory
from swarms import MODEL, START_TIMEOUT_S, chat_tokens, endless, python_path
from transformers import AutoModelForCausalLM

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, PeerProcessError, all_stopped, start_bootstrap

SPANS = ("0:10", "10:20", "20:30")
LAST_REQUEST_S = 120.0
"""So long may the requests take that are under way when the time is over."""
RECORD_S = 60.0
"""A record outlives its server so long."""
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
    parser.add_argument("--logs", type=Path, help="directory for the logs of clients and servers; none if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    expected = right_answers(args.new_tokens)
    with ServerFactory() as factory, start_bootstrap() as bootstrap:
        churn = Churn(factory, bootstrap.wait_for(r"--initial-peers (\S+)", START_TIMEOUT_S)[1], args)
        events = run(churn, args)
        report(events, expected, churn.lives, args)


def right_answers(new_tokens: int) -> list[list[int]]:
    """What transformers says to each question, with the whole model in this process."""
    model = endless(AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32))
    answers = []
    for question in QUESTIONS:
        ids = torch.tensor([chat_tokens(question)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        answers.append(output[0].tolist())
    return answers


@dataclass(slots=True, eq=False)
class Life:
    """One server."""

    span: str
    server: ForkedServer
    online_at: float = float("inf")
    died_at: float = float("inf")
    """When it was killed, or told to stop."""
    was_killed: bool = False

    @property
    def peer_id(self) -> str:
        return self.server.peer_id

    @property
    def gone_at(self) -> float:
        """When it was there no more."""
        return self.died_at if self.was_killed else self.server.ended_at


class Churn:
    """Servers that die and are replaced, in a thread of their own.

    Args:
        factory: starts them.
        address: of the bootstrap peer.
        args: of the benchmark.
    """

    def __init__(self, factory: ServerFactory, address: str, args: argparse.Namespace):
        self.lives: list[Life] = []
        self.address = address
        self._factory, self._args = factory, args
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

    def _churn(self) -> None:
        while not self._over.wait(self._dice.expovariate(self._args.servers / self._args.mean_life)):
            living = [life for life in self.lives if life.online_at < float("inf") and life.died_at == float("inf")]
            if not living:
                continue
            victim = self._dice.choice(living)
            victim.was_killed, victim.died_at = self._dice.random() < 0.5, time.monotonic()
            if victim.was_killed:
                victim.server.kill()
            else:
                victim.server.signal(signal.SIGTERM)
            threading.Thread(target=self._wait, args=(self._join(),), daemon=True).start()

    def _join(self) -> Life:
        counts = Counter(life.span for life in self.lives if life.died_at == float("inf"))
        span = min(SPANS, key=lambda it: counts[it])
        options = [MODEL, "--blocks", span, "--initial-peers", self.address, "--host", "127.0.0.1", "--threads", "1"]
        if self._args.logs:
            options += ["--log-level", "info"]
        life = Life(span, self._factory.start([*options, "--kv-cache", "4096"]))
        self.lives.append(life)
        return life

    def _wait(self, life: Life) -> None:
        try:
            life.server.wait_for("^ONLINE", START_TIMEOUT_S)
        except PeerProcessError:
            if not self._over.is_set():  # else it was killed while it loaded its blocks: the benchmark is over
                raise
        else:
            life.online_at = time.monotonic()


def run(churn: Churn, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask while servers die; all that the clients told, and which of them it was."""
    clients = {
        f"client{index}": ["ask", churn.address, "--first-question", str(2 * index)] for index in range(args.clients)
    }
    clients["others"] = ["look", churn.address]
    processes = {
        name: PeerProcess("churn_client", _options(name, options, args), env={"PYTHONPATH": python_path()})
        for name, options in clients.items()
    }
    with all_stopped(list(processes.values())):
        for process in processes.values():
            process.wait_for('"ready"', START_TIMEOUT_S)
        started = time.monotonic()
        churn.start()
        time.sleep(60 * args.minutes)
        for process in processes.values():
            process.signal(signal.SIGTERM)
        for process in processes.values():
            process.process.wait(LAST_REQUEST_S)
        churn.stop()
    if args.logs:
        for index, life in enumerate(churn.lives):
            header = f"{life.peer_id} {life.span} {life.online_at:.3f} {life.died_at:.3f} {life.gone_at:.3f}"
            lines = [f"{at:.3f} {line}" for at, line in zip(life.server.times, life.server.lines, strict=False)]
            (args.logs / f"server{index}.log").write_text("\n".join([header, *lines]))
    events = [{"client": name, **event} for name, it in processes.items() for event in told(it.lines)]
    if args.logs:
        (args.logs / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return [event for event in events if event.get("started", started) >= started]


def _options(name: str, options: list[str], args: argparse.Namespace) -> list[str]:
    log = ["--log", str(args.logs / f"{name}.log")] if args.logs else []
    return [*options, "--new-tokens", str(args.new_tokens), *log]


def had_gap(lives: Sequence[Life], since: float, until: float) -> bool:
    """Whether a block was without a living server at some moment."""
    return any(_is_uncovered([life for life in lives if life.span == span], since, until) for span in SPANS)


def _is_uncovered(lives: Sequence[Life], since: float, until: float) -> bool:
    at = since
    while at <= until:
        ends = [life.died_at for life in lives if life.online_at <= at < life.died_at]
        if not ends:
            return True
        at = max(ends)
    return False


def forgotten_after_s(life: Life, routes: Sequence[dict[str, Any]]) -> float:
    """How long after a server's death the last new route went over it; 0 for none."""
    return max([0.0, *(route["at"] - life.gone_at for route in routes if life.peer_id in route["peers"])])


def report(
    events: Sequence[dict[str, Any]], expected: list[list[int]], lives: Sequence[Life], args: argparse.Namespace
) -> None:
    """Print all."""
    requests = [it for it in events if it["kind"] == "request"]
    routes = [it for it in events if it["kind"] == "route"]
    looks = [it for it in events if it["kind"] == "look"]
    for it in requests:
        it["is_right"] = it["tokens"] == expected[it["question"]]
        it["had_gap"] = had_gap(lives, it["started"], it["ended"])
    counted, others = ([it for it in requests if it["had_gap"] is had] for had in (False, True))
    dead = [life for life in lives if life.died_at < float("inf")]
    crashed = [life for life in lives if life not in dead and life.server.ended_at < float("inf")]
    killed = [life for life in dead if life.was_killed]
    stopped = [life for life in dead if not life.was_killed and life.gone_at < float("inf")]
    forgotten = [forgotten_after_s(life, routes) for life in (*killed, *stopped)] or [0.0]
    in_doubt = sum(any(0 < it["at"] - life.gone_at < RECORD_S for life in dead) for it in routes)
    seconds = [it["ended"] - it["started"] for it in counted]
    num_right = sum(it["is_right"] for it in counted)
    num_replays, num_moves = (sum(it[key] for it in requests) for key in ("replays", "moves"))
    leaving_s = [life.gone_at - life.died_at for life in stopped] or [0.0]
    stalls = [it["stall_s"] for it in counted if it["stall_s"]]
    print(f"{len(lives)} servers, {len(killed)} killed, {len(dead) - len(killed)} told to stop")
    print(f"{num_replays} were replaced in an answer, {num_moves} have moved one")
    for life in crashed:
        print(f"    one of {life.span} ended by itself: {' | '.join(life.server.lines[-4:])}")
    print(f"{len(counted)} requests with all blocks served: {num_right} right")
    print(f"{len(others)} while some block was not: {sum(it['is_right'] for it in others)} right all the same")
    for it in requests:
        if not it["is_right"]:
            what = it["error"] or "other tokens"
            print(f"    {it['client']}, {it['started']:.1f} to {it['ended']:.1f}, gap {it['had_gap']}: {what}")
    print(f"seconds per request: median {statistics.median(seconds):.1f}, p99 {percentile(seconds, 0.99):.1f}")
    print(f"longest pause between two tokens: median {statistics.median(stalls):.1f} s, most {max(stalls):.1f} s")
    print(f"{len(routes)} new routes, {in_doubt} of them within {RECORD_S:g} s of a death; {len(looks)} only looked")
    print(f"told to stop until gone: median {statistics.median(leaving_s):.1f} s, most {max(leaving_s):.1f} s")
    print(f"last route over a dead server: median {statistics.median(forgotten):.1f} s, worst {max(forgotten):.1f} s")
    targets = {
        "right answers": judged(num_right / len(counted), ">=", TARGETS["right"]),
        "dead servers leave routes, s": judged(max(forgotten), "<=", TARGETS["forgotten"]),
    }
    details = {
        "killed": len(killed),
        "told_to_stop": len(dead) - len(killed),
        "crashed": len(crashed),
        "requests": len(counted),
        "without_coverage": len(others),
        "replays": num_replays,
        "moves": num_moves,
        "routes": len(routes),
        "routes_after_a_death": in_doubt,
        "used_after_death_s": sorted((round(it, 2) for it in forgotten if it), reverse=True),
        "median_s": round(statistics.median(seconds), 2),
        "p99_s": round(percentile(seconds, 0.99), 2),
        "worst_stall_s": round(max(stalls), 2),
    }
    print_report("churn", targets, minutes=args.minutes, clients=args.clients, seed=args.seed, **details)


if __name__ == "__main__":
    main()
