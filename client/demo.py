"""`python -m swarm.client.demo`: a real model answers through three servers here, checked against plain transformers.

bootstrap + 3 servers (processes on loopback) ─► client streams an answer ─► same text as transformers in one process?
then the same question through int8 servers, and both rates
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap, start_server
from swarm.command import HelpFormatter, exit_status, program

MODEL = "smollm2-135m-instruct"
QUESTION = "Why is the sky blue? Answer in two sentences."
SPANS = ("0:12", "8:22", "18:30")
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one generation gave."""

    text: str
    num_tokens: int
    first_token_s: float
    tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 only if the swarm's text equals that of plain transformers, 2 an error, 130 interrupted."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: _demo(args.question or QUESTION, args.max_new_tokens))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("demo"),
        description="Three servers and a client on this machine: a real model answers, through the swarm and without.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length of the answer, in tokens")
    return parser


def _demo(question: str, max_new_tokens: int) -> int:
    from swarm.checkpoint.source import resolve

    checkpoint = resolve(MODEL)
    exact = _through_swarm(question, max_new_tokens, "none")
    print("\nThe same question to plain transformers, in this process:")
    local = _answer(_load_local(checkpoint), checkpoint, question, max_new_tokens)
    int8 = _through_swarm(question, max_new_tokens, "int8")
    print(f"\n{'':22}{'first token':>13}{'tokens/s':>10}")
    rows = (("transformers, local", local), ("swarm, float32", exact), ("swarm, int8", int8))
    for name, answer in rows:
        print(f"{name:22}{answer.first_token_s * 1000:10.0f} ms{answer.tokens_per_s:10.1f}")
    if exact.text != local.text:
        print("\nFAILED: the swarm's text differs from that of plain transformers")
        return 1
    print(f"\nOK: the swarm's {exact.num_tokens} tokens equal those of plain transformers")
    return 0


def _through_swarm(question: str, max_new_tokens: int, quantization: str) -> Answer:
    """Start a swarm, ask it, stop it."""
    from swarm import AutoDistributedModelForCausalLM
    from swarm.checkpoint.source import resolve

    label = "unquantised" if quantization == "none" else quantization
    print(f"\nStarting a bootstrap peer and {len(SPANS)} {label} servers of {MODEL} ...", flush=True)
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        processes.append(start_bootstrap())
        initial_peers = [processes[0].address()]
        args = ("--quantization", quantization, "--threads", "1", "--kv-cache", "4096")
        for index, span in enumerate(SPANS):
            name = ("--public-name", f"server-{index + 1}")
            processes.append(start_server(span, initial_peers, *args, *name, model=MODEL))
        _wait_online(processes[1:])
        model = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=initial_peers)
        try:
            print(f"\nQ: {question}\nA: ", end="", flush=True)
            answer = _answer(model, resolve(MODEL), question, max_new_tokens)
            print("route: " + " -> ".join(f"{name} [{hop.blocks}]" for name, hop in model.last_route))
        finally:
            model.close()
    return answer


def _wait_online(servers: Sequence[PeerProcess]) -> None:
    num_blocks = max(int(span.split(":")[1]) for span in SPANS)
    online: set[int] = set()
    for server, span in zip(servers, SPANS, strict=True):
        server.wait_for(r"^ONLINE", START_TIMEOUT_S)
        start, end = map(int, span.split(":"))
        online |= set(range(start, end))
        bar = "".join("#" if block in online else "." for block in range(num_blocks))
        print(f"  [{bar}] {len(online)}/{num_blocks} blocks online", flush=True)


def _load_local(checkpoint: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)


def _answer(model: Any, checkpoint: Any, question: str, max_new_tokens: int) -> Answer:
    """Greedy answer to a chat question, streamed to the terminal."""
    from transformers import AutoTokenizer, TextStreamer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.path)

    class TimedStreamer(TextStreamer):
        """Prints the text and notes when each token came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times = [time.perf_counter()]

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)  # type: ignore[no-untyped-call]

    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer = TimedStreamer()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    tokens = output[0, inputs["input_ids"].shape[1] :]
    start, _prompt, first, *rest = streamer.times
    last = rest[-1] if rest else first
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        num_tokens=len(tokens),
        first_token_s=first - start,
        tokens_per_s=len(rest) / (last - first) if rest else 0.0,
    )


if __name__ == "__main__":
    sys.exit(main())
