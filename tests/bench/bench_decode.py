"""Greedy decode, single stream: through 1, 2 and 3 servers on loopback against transformers' own generate.

    python tests/bench/bench_decode.py [--rounds 7] [--new-tokens 48]

Everything uses one thread: each server, the client and the local model. All swarms run side by side and are asked in
turn with the local model, round by round, so that a drift of the machine's speed hits all alike; ratios are medians
over rounds. The rate counts tokens after the first. A hop's overhead is its round trip at the client less the compute
that the server reports.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from swarm import AutoDistributedModelForCausalLM
from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess, all_stopped, start_bootstrap, start_server

MODEL = "smollm2-135m-instruct"
SWARMS = {
    "1 server": (("0:30",), "none"),
    "2 servers": (("0:15", "15:30"), "none"),
    "3 servers": (("0:10", "10:20", "20:30"), "none"),
    "1 server int8": (("0:30",), "int8"),
}
TARGETS = {"1 server": 0.90, "2 servers": 0.88, "3 servers": 0.85, "int8_over_fp32": 1.8, "hop_overhead_ms": 2.0}
PROMPT = "Explain in a few sentences why the sky looks blue during the day and red in the evening."


class Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tokens_per_s(self) -> float:
        """Rate of the tokens after the first (the streamer is given the prompt, then each token)."""
        first, last = self.times[1], self.times[-1]
        return (len(self.times) - 2) / (last - first)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; one more is run first and not counted")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens per answer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        models = {"transformers": AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)}
        models |= {name: start_swarm(spans, quantization, processes) for name, (spans, quantization) in SWARMS.items()}
        rates, texts, overheads = run_rounds(models, inputs, args.rounds, args.new_tokens)
        for name in SWARMS:
            models[name].close()
    report(rates, texts, overheads, tokenizer, args)


def start_swarm(
    spans: tuple[str, ...], quantization: str, processes: list[PeerProcess], *, kv_tokens: int = 4096
) -> Any:
    """A swarm of its own for these spans, and a client of it."""
    bootstrap = start_bootstrap()
    processes.append(bootstrap)
    address = bootstrap.address()
    args = ("--quantization", quantization, "--threads", "1", "--kv-cache", str(kv_tokens))
    servers = [start_server(span, [address], *args, model=MODEL) for span in spans]
    processes.extend(servers)
    for server in servers:
        server.wait_for(r"^ONLINE", 180)
    return AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[address], dtype=torch.float32)


def run_rounds(models: dict[str, Any], inputs: Any, rounds: int, new_tokens: int) -> tuple[dict, dict, dict]:
    """Tokens/s per model and round, the tokens, and hop overheads in seconds."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[int]] = {}
    overheads: dict[str, list[float]] = {name: [] for name in models if name != "transformers"}
    for index in range(rounds + 1):
        for name, model in models.items():
            clock = Clock()
            settings = {
                "max_new_tokens": new_tokens,
                "min_new_tokens": new_tokens,
                "do_sample": False,
                "streamer": clock,
            }
            if name == "transformers":
                tokens = model.generate(**inputs, **settings)
            else:
                with model.inference_session(max_length=inputs["input_ids"].shape[1] + new_tokens) as session:
                    tokens = model.generate(**inputs, **settings, session=session)
                    if index:
                        timings = session.session.timings
                        overheads[name] += [timing.overhead_s for timing in timings if timing.num_tokens == 1]
            texts[name] = tokens[0].tolist()
            if index:
                rates[name].append(clock.tokens_per_s)
    return rates, texts, overheads


def report(rates: dict, texts: dict, overheads: dict, tokenizer: Any, args: argparse.Namespace) -> None:
    """Table and JSON."""
    local, one = rates["transformers"], rates["1 server"]
    rows = []
    for name, values in rates.items():
        hop = overheads.get(name)
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(statistics.median(values), 2),
                "over_transformers": round(statistics.median(a / b for a, b in zip(values, local, strict=True)), 3),
                "hop_overhead_ms": round(statistics.median(hop) * 1000, 2) if hop else None,
                "same_tokens": texts[name] == texts["transformers"],
            }
        )
    int8 = round(statistics.median(a / b for a, b in zip(rates["1 server int8"], one, strict=True)), 2)
    print(f"{'':16}{'tokens/s':>9}{'x transformers':>16}{'hop overhead ms':>17}{'same tokens':>13}")
    for row in rows:
        overhead = "-" if row["hop_overhead_ms"] is None else row["hop_overhead_ms"]
        print(
            f"{row['name']:16}{row['tokens_per_s']:9}{row['over_transformers']:16}{overhead:>17}{row['same_tokens']!s:>13}"
        )
    print(f"int8 / fp32 through one server: {int8}")
    print(
        json.dumps(
            {
                "bench": "decode",
                "model": MODEL,
                "threads": 1,
                "rounds": args.rounds,
                "new_tokens": args.new_tokens,
                "rows": rows,
                "int8_over_fp32": int8,
                "targets": TARGETS,
            }
        )
    )


if __name__ == "__main__":
    main()
