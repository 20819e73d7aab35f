"""What the API costs: 16 streaming HTTP clients against 16 threads of the Python client, on the same two servers.

    python tests/bench/bench_api.py [--clients 16] [--new-tokens 48] [--rounds 4] [--first-tokens 15]

Two servers of 15 blocks each, fp32, one thread each; the gateway is a process of its own, with one thread for torch, as
is the Python client (this process). Rounds alternate between the two; each has prompts that no server has seen. The
rate is that of all tokens over the whole time, prompts included. Time to first byte is that of the first text, over a
new connection, against the first token of `generate` from ready token ids; one client at a time, and 16 at once.
Answers are greedy, and compared once with each other.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import torch
from common import judged, print_report
from swarms import MODEL, Loopback, answer, connect_here, start_swarm
from transformers import AutoTokenizer

from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped

SPANS = ("0:15", "15:30")
TOPICS = ("rain", "bread", "ships", "moons", "chess", "bees", "glass", "salt")


def main() -> None:
    """Measure, print a table and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        swarm = start_swarm(Loopback(), SPANS, processes)
        gateway = PeerProcess(
            "swarm.api",
            ["--initial-peers", swarm.address, "--port", "0", "--threads", "1"],
            env={"OMP_NUM_THREADS": "1"},
        )
        processes.append(gateway)
        port = int(gateway.wait_for(r"API at http://127\.0\.0\.1:(\d+)", 240)[1])
        model = connect_here(swarm.model, swarm.address)
        try:
            measure(model, port, args)
        finally:
            model.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help="at once (default: 16)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens per answer (default: 48)")
    parser.add_argument("--rounds", type=int, default=4, help="of each kind (default: 4)")
    parser.add_argument("--first-tokens", type=int, default=15, help="first tokens of each kind, alone (default: 15)")
    return parser.parse_args()


def measure(model: Any, port: int, args: argparse.Namespace) -> None:
    """All of it."""
    questions = Questions()
    same = questions.take(args.clients)
    by_api, by_python = run(ask_api, port, same, args.new_tokens), run(ask_model, model, same, args.new_tokens)
    decode = questions.tokenizer.decode
    identical = sum(
        ours["answer"] == decode(theirs["answer"], skip_special_tokens=True)
        for ours, theirs in zip(by_api["answers"], by_python["answers"], strict=True)
    )
    rounds = []
    for _ in range(args.rounds):
        api = run(ask_api, port, questions.take(args.clients), args.new_tokens)
        python = run(ask_model, model, questions.take(args.clients), args.new_tokens)
        rounds.append({"api": summary(api), "python": summary(python)})
    alone: dict[str, list[float]] = {"api": [], "python": []}
    for _ in range(args.first_tokens):
        alone["api"].append(ask_api(port, questions.take(1)[0], 2)["first_s"])
        alone["python"].append(ask_model(model, questions.take(1)[0], 2)["first_s"])
    report(rounds, alone, identical, args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and the same as the prompt that the chat template makes of it."""

    text: str
    tokens: tuple[int, ...]


class Questions:
    """Questions of about equal length, each asked once."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(resolve(MODEL).path)
        self._count = 0

    def take(self, count: int) -> list[Question]:
        found = range(self._count, self._count + count)
        self._count += count
        return [self._make(f"Chapter {1000 + it}: tell me some facts about {TOPICS[it % 8]}.") for it in found]

    def _make(self, text: str) -> Question:
        chat = [{"role": "user", "content": text}]
        tokens = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return Question(text=text, tokens=tuple(tokens))


def run(ask: Any, target: Any, questions: list[Question], new_tokens: int) -> dict:
    """All questions at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: ask(target, question, new_tokens), questions))
    return {"answers": answers, "seconds": time.perf_counter() - started}


def summary(result: dict) -> dict:
    tokens = sum(it["tokens"] for it in result["answers"])
    return {
        "tokens_per_s": round(tokens / result["seconds"], 2),
        "first_ms": round(1e3 * statistics.median(it["first_s"] for it in result["answers"]), 1),
    }


def ask_model(model: Any, question: Question, new_tokens: int) -> dict:
    """Through the Python client, from ready tokens."""
    found = answer(model, question.tokens, new_tokens)
    return {"answer": found.tokens[len(question.tokens) :], "tokens": new_tokens, "first_s": found.first_token_s}


def ask_api(port: int, question: Question, new_tokens: int) -> dict:
    """Through the API, as a stream."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question.text}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content", "")
            if piece and not first:
                first = time.perf_counter() - started
            text += piece
        if chunk["usage"]:
            tokens = chunk["usage"]["completion_tokens"]
    connection.close()
    return {"answer": text, "tokens": tokens, "first_s": first}


def report(rounds: list[dict], alone: dict, identical: int, args: argparse.Namespace) -> None:
    """Tables and JSON."""
    print(f"{'round':>5} {'API tok/s':>10} {'Python':>8} {'ratio':>6} {'first ms API':>13} {'Python':>8}")
    for index, row in enumerate(rounds):
        api, python = row["api"], row["python"]
        row["ratio"] = round(api["tokens_per_s"] / python["tokens_per_s"], 3)
        print(
            f"{index:5} {api['tokens_per_s']:10} {python['tokens_per_s']:8} {row['ratio']:6}"
            f" {api['first_ms']:13} {python['first_ms']:8}"
        )
    first = {kind: 1e3 * statistics.median(values) for kind, values in alone.items()}
    print(f"alone, first after {first['api']:.1f} ms (API), {first['python']:.1f} ms (Python)")
    targets = {
        "rate_over_python_client": judged(statistics.median(row["ratio"] for row in rounds), ">=", 0.9),
        "first_byte_overhead_ms": judged(first["api"] - first["python"], "<=", 20.0),
        "identical": judged(identical / args.clients, "==", 1.0),
    }
    first_alone_ms = {kind: round(value, 1) for kind, value in first.items()}
    print_report(
        "api", targets, clients=args.clients, new_tokens=args.new_tokens, rounds=rounds, first_alone_ms=first_alone_ms
    )


if __name__ == "__main__":
    main()
