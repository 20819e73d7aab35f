"""A process of the churn benchmark that is a client: asks all the time, or only looks for routes, until SIGTERM.

    python -m churn_client ask ADDRESS [--first-question 0] [--new-tokens 24] [--log FILE]
    python -m churn_client look ADDRESS

ask     one person: question after question, each in a session of its own
look    strangers, who join, find one route and leave, and others who stay, but want a route only now and then

What comes of it goes to stdout, one JSON object per line; times are of the monotonic clock, which all processes of a
machine share. Every route that a session is given is told, and so is every server that one moves to.
"""

import argparse
import json
import logging
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from swarms import MODEL, answer, chat_tokens, connect_here
from transformers import AutoConfig

from swarm.checkpoint.source import resolve
from swarm.client.peers import Peers
from swarm.client.runtime import SwarmService, connect
from swarm.errors import RouteNotFound, SwarmError
from swarm.types import Hop

QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Explain photosynthesis in one sentence.",
    "Write a short letter to a friend who has moved to another town.",
    "What should I cook for six people who eat no meat?",
    "How does a bicycle stay upright?",
    "Tell me a story about a lighthouse and a storm.",
)
STRANGERS_S = 5.0
"""A stranger comes so often."""
IDLE_S = (12.0, 45.0)
"""So long are the pauses of those that stay."""


def main() -> None:
    """Be a client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("ask", "look"))
    parser.add_argument("address", help="of the bootstrap peer")
    parser.add_argument("--first-question", type=int, default=0, metavar="N", help="where it begins (default: 0)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (default: 24)")
    parser.add_argument("--log", help="file for the log; none if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.log:
        logging.basicConfig(filename=args.log, level=logging.INFO, format="%(created).3f %(name)s: %(message)s")
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    tell_routes()
    if args.role == "ask":
        ask(args.address, args.first_question, args.new_tokens, over)
    else:
        look(args.address, over)


def ask(address: str, first_question: int, new_tokens: int, over: threading.Event) -> None:
    """Ask all the time, and tell each answer."""
    model = connect_here(MODEL, address)
    prompts = [chat_tokens(question) for question in QUESTIONS]
    tell("ready")
    turn = first_question
    while not over.is_set():
        started, found, error = time.monotonic(), None, ""
        question = turn % len(prompts)
        try:
            found = answer(model, prompts[question], new_tokens)
        except SwarmError as failure:
            error = f"{type(failure).__name__}: {failure}"
        tell(
            "request",
            question=question,
            started=started,
            ended=time.monotonic(),
            error=error,
            tokens=found.tokens if found is not None else [],
            replays=found.replays if found is not None else 0,
            stall_s=max(found.gaps, default=0.0) if found is not None else 0.0,
            moves=found.moves if found is not None else 0,
        )
        turn += 1
    model.close()


def look(address: str, over: threading.Event) -> None:
    """Look for routes in different ways at once; `tell_routes` tells them."""
    threads = [threading.Thread(target=send_strangers, args=(address, over))]
    threads += [threading.Thread(target=idle, args=(address, pause_s, over)) for pause_s in IDLE_S]
    for thread in threads:
        thread.start()
    tell("ready")
    for thread in threads:
        thread.join()


def send_strangers(address: str, over: threading.Event) -> None:
    """People who know nothing yet, one after another."""
    while not over.wait(STRANGERS_S):
        service = join(address)
        find_route(service)
        service.close()


def idle(address: str, pause_s: float, over: threading.Event) -> None:
    """One who seldom wants a route."""
    service = join(address)
    while not over.wait(pause_s):
        find_route(service)
    service.close()


def join(address: str) -> SwarmService:
    """A new client, without a model."""
    checkpoint = resolve(MODEL)
    config: Any = AutoConfig.from_pretrained(checkpoint.path)
    return connect(
        checkpoint, num_blocks=config.num_hidden_layers, hidden_size=config.hidden_size, initial_peers=[address]
    )


def find_route(service: SwarmService) -> None:
    """Find one, if there is any."""
    started = time.monotonic()
    try:
        service.find_route()
        error = ""
    except (RouteNotFound, SwarmError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    tell("look", started=started, ended=time.monotonic(), error=error)


def tell_routes() -> None:
    """Tell all routes of this process from now on, and all servers to which sessions move."""
    route, replica = Peers.route, Peers.replica

    async def told_route(peers: Peers, *args: Any, **kwargs: Any) -> tuple[Hop, ...]:
        hops = await route(peers, *args, **kwargs)
        tell_hops(hops)
        return hops

    async def told_replica(peers: Peers, *args: Any, **kwargs: Any) -> Hop:
        hop = await replica(peers, *args, **kwargs)
        tell_hops([hop])
        return hop

    Peers.route = told_route  # type: ignore[method-assign]
    Peers.replica = told_replica  # type: ignore[method-assign]


def tell_hops(hops: Iterable[Hop]) -> None:
    """Tell where a session goes from now on."""
    tell("route", at=time.monotonic(), hops=[[hop.peer_id, str(hop.blocks)] for hop in hops])


def tell(kind: str, **fields: Any) -> None:
    """Print one line."""
    print(json.dumps({"kind": kind, **fields}) + "\n", end="", flush=True)


def told(lines: Iterable[str]) -> list[dict[str, Any]]:
    """What a client's output says, without lines of others."""
    return [json.loads(line) for line in lines if line.startswith('{"kind"')]


if __name__ == "__main__":
    main()
