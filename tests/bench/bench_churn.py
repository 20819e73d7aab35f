"""Servers come and go all the time, and the swarm arranges itself: are people answered, and dead servers forgotten?

    python tests/bench/bench_churn.py [--minutes 10] [--servers 8] [--mean-life 60] [--clients 4] [--logs DIR]
    python tests/bench/bench_churn.py --given ...

Real processes on loopback with the embedded model in fp32, one thread each; a server has ten of 30 blocks, or as many
as --num-blocks says. Servers are started as volunteers start them: none is told which blocks to take, so each chooses,
and moves where blocks are missing. They live for random times (exponential, from when they serve; SIGKILL, or as often
SIGTERM), and others come at random times (Poisson), as many as die in the mean, whoever has died: at times there are
twelve, at times four. With --given, each is told what fewest have, and another comes as soon as one dies.

Clients, each in a process of its own, ask all the time, greedily; right are the tokens that transformers gives on one
machine. A request counts unless some block was without a living server, announced and online, at some moment of it; one
that was told to stop, or has said that it moves, serves no more.

A dead server leaves routes when no client gets a new route over it any more, nor moves a session to it; counted from
SIGKILL, or from the end of one that was told to stop, which first hands its sessions to others. Likewise for blocks
that a server has left for others, from when it says that it moves. Besides those that ask, strangers come and find one
route with what the DHT says, and others stay but look for a route now and then only, so that nobody has told them.
"""

import argparse
import json
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from churn_client import QUESTIONS, told
from churn_servers import Churn, Life, moves_of
from common import judged, percentile, print_report
from forked import ServerFactory
from gaps import Gap, covered_part, gaps_between, had_gap
from swarms import MODEL, START_TIMEOUT_S, chat_tokens, endless, python_path
from transformers import AutoModelForCausalLM

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap
from swarm.types import BlockRange, name_ranges

NUM_BLOCKS = 30
LAST_REQUEST_S = 120.0
"""So long may the requests take that are under way when the time is over."""
RECORD_S = 60.0
"""A record outlives its server so long."""
TARGETS = {"right": 0.995, "forgotten": 15.0}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of churn (default: 10)")
    parser.add_argument("--servers", type=int, default=8, help="in the mean (default: 8)")
    parser.add_argument("--num-blocks", type=int, default=10, help="of each server (default: 10)")
    parser.add_argument("--given", action="store_true", help="tell servers what to take, and replace the dead at once")
    parser.add_argument("--mean-life", type=float, default=60.0, help="seconds that a server serves (default: 60)")
    parser.add_argument("--clients", type=int, default=4, help="who ask at once (default: 4)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of lives and joins (default: 0)")
    parser.add_argument("--logs", type=Path, help="directory for the logs of clients and servers; none if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    expected = right_answers(args.new_tokens)
    with ServerFactory() as factory, start_bootstrap() as bootstrap:
        churn = Churn(factory, bootstrap.wait_for(r"--initial-peers (\S+)", START_TIMEOUT_S)[1], args)
        print(f"{args.servers} servers serve", flush=True)
        events, since, until = run(churn, args)
        report(events, expected, churn, since, until, args)


def right_answers(new_tokens: int) -> list[list[int]]:
    """What transformers says to each question, with the whole model in this process."""
    model = endless(AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32))
    answers = []
    for question in QUESTIONS:
        ids = torch.tensor([chat_tokens(question)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        answers.append(output[0].tolist())
    return answers


def run(churn: Churn, args: argparse.Namespace) -> tuple[list[dict[str, Any]], float, float]:
    """Ask while servers come and go; all that the clients told, and which of them it was; since when, until when."""
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
        print(f"{args.clients} clients ask; churn begins", flush=True)
        started = time.monotonic()
        churn.start()
        try:
            time.sleep(60 * args.minutes)
            for process in processes.values():
                process.signal(signal.SIGTERM)
            for process in processes.values():
                process.process.wait(LAST_REQUEST_S)
        finally:
            churn.stop()
            ended = time.monotonic()
            events = [{"client": name, **event} for name, it in processes.items() for event in told(it.lines)]
            if args.logs:
                _write_logs(churn.lives, events, args.logs)
    return [event for event in events if event.get("started", started) >= started], started, ended


def _options(name: str, options: list[str], args: argparse.Namespace) -> list[str]:
    log = ["--log", str(args.logs / f"{name}.log")] if args.logs else []
    return [*options, "--new-tokens", str(args.new_tokens), *log]


def _write_logs(lives: Sequence[Life], events: Sequence[dict[str, Any]], folder: Path) -> None:
    for index, life in enumerate(lives):
        lines = [f"{at:.3f} {line}" for at, line in life.said]
        header = f"server {index}, {life.given or 'chooses'}: died {life.died_at:.3f}, gone {life.gone_at:.3f}"
        (folder / f"server{index}.log").write_text("\n".join([header, *lines]))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def forgotten_after_s(life: Life, routes: Sequence[dict[str, Any]]) -> float:
    """How long after a server's death the last new route went over it; 0 for none."""
    own_id = life.peer_id
    times = [route["at"] for route in routes if any(peer_id == own_id for peer_id, _ in route["hops"])]
    return max([0.0, *(at - life.gone_at for at in times)])


def left_for_s(life: Life, routes: Sequence[dict[str, Any]]) -> list[float]:
    """Of each new route to blocks that a living server did not serve then: how long ago it had left them."""
    own_id, spells, found = life.peer_id, life.spells, []
    for route in routes:
        at = route["at"]
        for blocks in (BlockRange.parse(text) for peer_id, text in route["hops"] if peer_id == own_id):
            had = [it for it in spells if it.blocks.covers(blocks) and it.since <= at]
            if had and had[-1].until < at < life.died_at:
                found.append(at - had[-1].until)
    return found


def report(
    events: Sequence[dict[str, Any]],
    expected: list[list[int]],
    churn: Churn,
    since: float,
    until: float,
    args: argparse.Namespace,
) -> None:
    """Print all."""
    lives = churn.lives
    gaps = gaps_between([spell for life in lives for spell in life.spells], NUM_BLOCKS, since, until)
    routes = [it for it in events if it["kind"] == "route"]
    num_looks = sum(it["kind"] == "look" for it in events)
    answers = report_answers([it for it in events if it["kind"] == "request"], expected, gaps)
    places = report_places(lives, gaps, since, until)
    dead = [life for life in lives if life.died_at < float("inf")]
    killed = [life for life in dead if life.was_killed]
    stopped = [life for life in dead if not life.was_killed and life.gone_at < float("inf")]
    forgotten = [forgotten_after_s(life, routes) for life in (*killed, *stopped)] or [0.0]
    left = [seconds for life in lives for seconds in left_for_s(life, routes)]
    in_doubt = sum(any(0 < it["at"] - life.gone_at < RECORD_S for life in dead) for it in routes)
    leaving_s = [life.gone_at - life.died_at for life in stopped] or [0.0]
    print(f"{len(killed)} killed, {len(dead) - len(killed)} told to stop")
    print(f"{len(routes)} new routes, {in_doubt} of them within {RECORD_S:g} s of a death; {num_looks} only looked")
    print(f"told to stop until gone: median {statistics.median(leaving_s):.1f} s, most {max(leaving_s):.1f} s")
    print(f"last route over a dead server: median {statistics.median(forgotten):.1f} s, worst {max(forgotten):.1f} s")
    print(f"routes to blocks that a server had left: {len(left)}, worst {max(left, default=0.0):.1f} s after it")
    targets = {
        "right answers": judged(answers["right"] / max(1, answers["requests"]), ">=", TARGETS["right"]),
        "dead servers leave routes, s": judged(max(forgotten), "<=", TARGETS["forgotten"]),
    }
    details = {
        "given": args.given,
        "refused": churn.num_refused,
        "killed": len(killed),
        "told_to_stop": len(dead) - len(killed),
        **answers,
        **places,
        "routes": len(routes),
        "routes_after_a_death": in_doubt,
        "used_after_death_s": sorted((round(it, 2) for it in forgotten if it), reverse=True),
        "used_after_move_s": sorted((round(it, 2) for it in left), reverse=True),
    }
    print_report("churn", targets, minutes=args.minutes, clients=args.clients, seed=args.seed, **details)


def report_answers(
    requests: Sequence[dict[str, Any]], expected: list[list[int]], gaps: Sequence[Gap]
) -> dict[str, Any]:
    """What people were told."""
    for it in requests:
        it["is_right"] = it["tokens"] == expected[it["question"]]
        it["had_gap"] = had_gap(gaps, it["started"], it["ended"])
    counted, others = ([it for it in requests if it["had_gap"] is had] for had in (False, True))
    num_right, num_others_right = (sum(it["is_right"] for it in group) for group in (counted, others))
    num_replays, num_moves = (sum(it[key] for it in requests) for key in ("replays", "moves"))
    seconds = [it["ended"] - it["started"] for it in counted] or [0.0]
    stalls = [it["stall_s"] for it in counted if it["stall_s"]] or [0.0]
    print(f"{len(counted)} requests with all blocks served: {num_right} right")
    print(f"{len(others)} while some block was not: {num_others_right} right all the same")
    for it in requests:
        if not it["is_right"]:
            what = it["error"] or "other tokens"
            print(f"    {it['client']}, {it['started']:.1f} to {it['ended']:.1f}, gap {it['had_gap']}: {what}")
    print(f"{num_replays} servers were replaced in an answer, {num_moves} have handed one over")
    print(f"seconds per request: median {statistics.median(seconds):.1f}, p99 {percentile(seconds, 0.99):.1f}")
    print(f"longest pause between two tokens: median {statistics.median(stalls):.1f} s, most {max(stalls):.1f} s")
    return {
        "requests": len(counted),
        "right": num_right,
        "without_coverage": len(others),
        "right_without_coverage": num_others_right,
        "replays": num_replays,
        "moves": num_moves,
        "median_s": round(statistics.median(seconds), 2),
        "p99_s": round(percentile(seconds, 0.99), 2),
        "worst_stall_s": round(max(stalls), 2),
    }


def report_places(lives: Sequence[Life], gaps: Sequence[Gap], since: float, until: float) -> dict[str, Any]:
    """How the swarm has arranged itself."""
    crashed = [life for life in lives if life.server.ended_at < life.died_at]
    online_s = sum(
        max(0.0, min(spell.until, until) - max(spell.since, since)) for life in lives for spell in life.spells
    )
    moves = [move for life in lives for move in moves_of(life.said)]
    starts_s = [life.start_s for life in lives if life.start_s is not None and life.started_at >= since] or [0.0]
    num_for_gaps = sum(move.fills_gap for move in moves)
    part = covered_part(gaps, since, until)
    lasted = [gap.until - gap.since for gap in gaps] or [0.0]
    waited = [gap.waited_s for gap in gaps] or [0.0]
    print(f"{len(lives)} servers, {online_s / (until - since):.1f} of them serve in the mean")
    print(f"from start to service: median {statistics.median(starts_s):.1f} s, most {max(starts_s):.1f} s")
    for life in crashed:
        print(f"    one ended by itself: {' | '.join(life.server.lines[-4:])}")
    print(f"all blocks served {100 * part:.1f} % of the time; {len(moves)} moves, {num_for_gaps} of them into gaps")
    for gap in gaps:
        end = gap.filled_by
        how = "lasted" if end is None else f"a {'neighbour' if end.is_moved else 'newcomer'} filled it"
        print(f"    {name_ranges(gap.blocks):>12} missing from {gap.since - since:.1f} s on for"
              f" {gap.until - gap.since:.1f} s, {gap.waited_s:.1f} of them until somebody loaded; {how}")  # fmt: skip
    print(f"gaps: {len(gaps)}; lasted {statistics.median(lasted):.1f} s (median), {max(lasted):.1f} at most")
    print(f"until somebody loaded: {statistics.median(waited):.1f} s (median), {max(waited):.1f} at most")
    return {
        "servers": len(lives),
        "serving_in_the_mean": round(online_s / (until - since), 2),
        "start_s": round(statistics.median(starts_s), 1),
        "crashed": len(crashed),
        "covered_part": round(part, 4),
        "server_moves": len(moves),
        "server_moves_into_gaps": num_for_gaps,
        "gaps_s": [round(it, 1) for it in lasted],
        "gaps_waited_s": [round(it, 1) for it in waited],
    }


if __name__ == "__main__":
    main()
