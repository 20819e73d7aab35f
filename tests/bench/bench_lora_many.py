"""Many registered adapters, of which few fit on the device: throughput, and what the first use of an adapter costs.

    python tests/bench/bench_lora_many.py [--requests 60] [--rounds 4] [--threads 1] [--no-swarm]

Saturated: S-LoRA's trace (Sheng et al., MLSys 2024; benchmarks/trace.py of its artifact), drawn anew: of n adapters
number i is asked with probability ((i+1)/n)^alpha - (i/n)^alpha, gaps are Gamma of shape 1/cv^2, lengths uniform, and
shorter than theirs since this is a CPU. All 30 blocks of the embedded model in one device thread, its own scheduler,
pages and adapters, at most 32 requests at once; LoRA of rank 8 on q, k, v, o, in the host memory of the server from the
start. The pages have room for 32 adapters beside the keys and values. n = 5, 100, 1000 in turn, and no adapters.

Alone: time to the first token of a prompt of 128 tokens, one request at a time, with the adapter on the device or not.

Through a swarm: the same with a server process and a client on loopback, for adapters that the server has, and for ones
that it has never seen and that the client uploads.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from common import judged, percentile, print_report
from swarms import Loopback, connect_here, start_swarm

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.peft_save import save_lora
from swarm.checkpoint.layout import model_layout
from swarm.checkpoint.source import resolve
from swarm.client.processes import PeerProcess
from swarm.errors import SwarmError
from swarm.server.blocks import BlockSpan
from swarm.server.executor import Executor
from swarm.server.work import Produced, Work
from swarm.types import BlockRange

MODEL = "smollm2-135m-instruct"
NUMBERS = (5, 100, 1000)
RANK = 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
RESIDENT = 32
MAX_AT_ONCE = 32
PROMPT, ANSWER = (8, 64), (8, 32)
"""Lengths, uniform; theirs are 8 to 511."""
ALONE_PROMPT = 128


@dataclass(frozen=True)
class Request:
    """One line of a trace."""

    at: float
    adapter: int
    prompt: int
    answer: int


def make_trace(number: int, n: int, *, alpha: float, cv: float, rate: float, seed: int) -> list[Request]:
    """So many requests for n adapters, as S-LoRA's generator draws them."""
    dice = numpy.random.default_rng(seed)
    adapters = (dice.power(alpha, number) * n).astype(int)
    gaps = dice.gamma(1 / cv**2, cv**2 / rate, number)
    prompts, answers = dice.integers(*PROMPT, number), dice.integers(*ANSWER, number)
    return [
        Request(float(at), int(adapter), int(prompt), int(answer))
        for at, adapter, prompt, answer in zip(gaps.cumsum(), adapters, prompts, answers, strict=True)
    ]


class Answer:
    """Listens to one session: feeds each output as the next input until the answer is long enough."""

    def __init__(self, server: "Server", length: int):
        self._server, self._left = server, length
        self.session: Any = None
        self.first_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._position = 0

    def start(self, hidden_TH: torch.Tensor) -> None:
        self._submit(hidden_TH)

    def _submit(self, hidden_TH: torch.Tensor) -> None:
        self._position += len(hidden_TH)
        work = Work(
            step_id=self._position,
            order=None,
            base=None,
            num_tokens=(len(hidden_TH),),
            outputs_from=(self._position - 1,),
            hidden_states=hidden_TH,
        )
        self._server.executor.submit(self.session, work)

    def produced(self, produced: Produced) -> None:
        if not produced.rows:
            return
        self.first_at = self.first_at or time.perf_counter()
        self._left -= 1
        if self._left:
            self._submit(produced.rows[0].hidden_states[-1:])
        elif not self.done.done():
            self.done.set_result(None)

    def failed(self, step_id: int, error: SwarmError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def waiting(self, step_id: int, expected_s: float) -> None:
        pass


class Server:
    """The device thread of a server, and adapters in its host memory."""

    def __init__(self) -> None:
        checkpoint = resolve(MODEL)
        self.num_blocks = int(checkpoint.config().num_hidden_layers)
        self.blocks = BlockRange(0, self.num_blocks)
        self.layout = model_layout(checkpoint.config())
        self.adapters = [make_deltas(self.layout, seed) for seed in range(max(NUMBERS))]
        probe = BlockSpan.load(checkpoint, self.blocks, num_pages=64)
        each = probe.adapter_pages(self.adapters[0])
        kv_pages = MAX_AT_ONCE * -(-(PROMPT[1] + ANSWER[1]) // 16)
        del probe
        self.num_pages, self.pages_each = RESIDENT * each + kv_pages, each
        self.span = BlockSpan.load(checkpoint, self.blocks, num_pages=self.num_pages)
        self.dice = torch.Generator().manual_seed(0)
        self.executor: Executor

    async def answer(self, adapter: int | None, prompt: int, length: int) -> tuple[float, bool]:
        """One request: (time to the first token, whether its adapter was on the device)."""
        digest = None if adapter is None else f"{adapter:064x}"
        was_there = digest is None or digest in self.executor.attached_adapters
        started, listener = time.perf_counter(), Answer(self, length)
        session = listener.session = self.executor.open(
            self.blocks, 1, client="bench", listener=listener, adapters=(digest,)
        )
        if digest is not None and adapter is not None:
            self.executor.add_adapter(digest, self.adapters[adapter], client="bench")  # as a session's lease does
            self.executor.adapters_ready(session)
        listener.start(torch.randn(prompt, self.span.hidden_size, generator=self.dice))
        try:
            await listener.done
        finally:
            self.executor.close(session)
        return listener.first_at - started, was_there

    async def run(self, trace: Sequence[Request], has_adapters: bool) -> dict[str, Any]:
        """All requests of a trace."""
        room, first_s, failures, cold = asyncio.Semaphore(MAX_AT_ONCE), [], 0, 0
        attached = self.executor._memory.adapters.num_attached
        started = time.perf_counter()

        async def one(request: Request) -> None:
            nonlocal failures, cold
            await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - started)))
            async with room:
                try:
                    seconds, was_there = await self.answer(
                        request.adapter if has_adapters else None, request.prompt, request.answer
                    )
                except SwarmError:
                    failures += 1
                    return
                cold += not was_there
                first_s.append(seconds)

        await asyncio.gather(*map(one, trace))
        seconds = time.perf_counter() - started
        assert await self.executor.pages_in_use() == 0
        return {
            "requests_per_s": len(first_s) / seconds,
            "tokens_per_s": sum(request.prompt + request.answer for request in trace) / seconds,
            "first_token_p50_s": percentile(first_s, 0.5),
            "cold_share": cold / len(trace),
            "attached": self.executor._memory.adapters.num_attached - attached,
            "failures": failures,
        }


def make_deltas(layout: Any, seed: int) -> dict[int, BlockDelta]:
    """LoRA of RANK on the linears of attention, in bfloat16 as adapters are stored."""
    dice = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 16, generator=dice).to(torch.bfloat16) * 0.02
    deltas = {}
    for block, shape in enumerate(layout.blocks):
        linears = {}
        for path, linear in shape.linears.items():
            if path.rpartition(".")[2] in LINEARS:
                numbers = RANK * (linear.num_inputs + linear.num_outputs)
                own = noise.roll(97 * block)[:numbers].clone()
                a, b = own[: RANK * linear.num_inputs], own[RANK * linear.num_inputs :]
                linears[path] = LinearDelta(a_rI=a.view(RANK, -1), b_Or=b.view(-1, RANK), scale=2.0)
        deltas[block] = BlockDelta(linears=linears)
    return deltas


async def saturated(server: Server, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each n in turn, round by round; all requests of a run come in a quarter of the time that they take."""
    warm = make_trace(40, 5, alpha=args.alpha, cv=args.cv, rate=1000.0, seed=1)
    rate = 4 * (await server.run(warm, True))["requests_per_s"]
    found: dict[str, list[dict[str, Any]]] = {}
    cases = (0, *NUMBERS)
    for round_ in range(args.rounds):
        for n in (*cases[round_ % len(cases) :], *cases[: round_ % len(cases)]):  # another one first each time
            trace = make_trace(args.requests, n or 5, alpha=args.alpha, cv=args.cv, rate=rate, seed=10 + round_)
            found.setdefault(str(n), []).append(await server.run(trace, n > 0))
    return found


async def alone(server: Server, times: int) -> dict[str, float]:
    """Median time to the first token without others, with the adapter on the device and not."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(times):
        for _ in range(3):
            first_s, was_there = await server.answer(500 + number, ALONE_PROMPT, 2)
            seconds[was_there].append(first_s)
    none = [(await server.answer(None, ALONE_PROMPT, 2))[0] for _ in range(times)]
    return {
        "none_s": statistics.median(none),
        "warm_s": statistics.median(seconds[True]),
        "cold_s": statistics.median(seconds[False]),
    }


def through_a_swarm(server: Server, times: int) -> dict[str, float]:
    """Median time to the first token for a client, with adapters that the server has and others that it must get."""
    processes: list[PeerProcess] = []
    prompt = torch.randint(10, 1000, (1, ALONE_PROMPT), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"none": [], "warm": [], "upload": []}
    with tempfile.TemporaryDirectory() as directory:
        try:
            swarm = start_swarm(Loopback(), ["0:30"], processes, "--device", "cpu")
            with connect_here(swarm.model, swarm.address) as model:
                for number in range(times):
                    path, name = Path(directory) / str(number), str(number)
                    save_lora(path, server.adapters[number], layout=server.layout)
                    model.load_adapter(path, adapter_name=name)
                    for kind, used in (("upload", name), ("warm", name), ("none", "__base__")):
                        started = time.perf_counter()
                        model.generate(prompt + number, adapter_name=used, max_new_tokens=1, do_sample=False)
                        seconds[kind].append(time.perf_counter() - started)
                        prompt = prompt + 1  # or it would be known
        finally:
            for process in processes:
                process.stop()
    return {f"{kind}_s": statistics.median(values[1:]) for kind, values in seconds.items()}


def main() -> None:
    """Measure, print tables and one JSON line."""
    args = parse()
    torch.set_num_threads(args.threads)
    server = Server()
    print(f"{RESIDENT} adapters of {server.pages_each} pages fit beside the KV cache; {server.num_pages} pages in all")
    runs, single = asyncio.run(measure(server, args))
    swarm = {} if args.no_swarm else through_a_swarm(server, args.times)
    report(args, runs, single, swarm)


async def measure(server: Server, args: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    server.executor = Executor(server.span, asyncio.get_running_loop())
    server.executor.start()
    try:
        return await saturated(server, args), await alone(server, args.times)
    finally:
        await server.executor.stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="in each run (default: 60)")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each n (default: 4)")
    parser.add_argument("--times", type=int, default=9, help="requests alone, of each kind (default: 9)")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="1: all adapters equally often; smaller: fewer of them"
    )
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of the gaps (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--no-swarm", action="store_true", help="leave out the part with processes")
    return parser.parse_args()


def report(
    args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], single: dict[str, float], swarm: dict[str, float]
) -> None:
    """Tables and JSON."""
    keys = ("requests_per_s", "tokens_per_s", "first_token_p50_s", "cold_share", "attached", "failures")
    print("  ".join(f"{title:>18}" for title in ("adapters", *keys)))
    means = {n: {key: statistics.mean(run[key] for run in found) for key in keys} for n, found in runs.items()}
    for n, mean in means.items():
        print("  ".join(f"{value:>18}" for value in (n, *(f"{mean[key]:.3f}" for key in keys))))
    for n, found in runs.items():
        print(f"requests/s of each round, {n} adapters:", *(f"{run['requests_per_s']:.2f}" for run in found))
    print("alone, first token:", {key: round(value, 4) for key, value in single.items()})
    print("swarm, first token:", {key: round(value, 4) for key, value in swarm.items()})
    ratios = [b["requests_per_s"] / a["requests_per_s"] for a, b in zip(runs["5"], runs["1000"], strict=True)]
    targets = {
        "throughput_1000_over_5": judged(statistics.median(ratios), ">=", 0.9),
        "cold_over_warm_first_token": judged(single["cold_s"] / single["warm_s"], "<=", 2.0),
        "failures": judged(sum(run["failures"] for found in runs.values() for run in found), "==", 0),
    }
    if swarm:
        targets["uploaded_over_warm_first_token"] = judged(swarm["upload_s"] / swarm["warm_s"], "<=", 2.0)
    print_report("lora_many", targets, runs=means, alone=single, swarm=swarm, alpha=args.alpha, cv=args.cv)


if __name__ == "__main__":
    main()
