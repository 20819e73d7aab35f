"""Decode steps of a server whose rows have adapters of their own: against none, against PEFT, against one at a time.

    python tests/bench/bench_lora.py [--rounds 15] [--rows 32] [--context 32] [--threads 1]

All 30 blocks of SmolLM2-135M in one span, fp32; a batch of decode rows, each of its own sequence with `context` tokens
in the cache; LoRA on q, k, v, o, gate, up and down, its rank rows in pages of the KV cache. Rows are spread evenly over
the adapters. All ways are run in turn, round by round, so that a drift of the machine's speed hits all alike; figures
are medians over rounds of the ratio to the same round's step without adapters (or to what is named).

    new company     the rows of "32 of rank 16" in another order at every step, so that nothing derived from it is kept
    PEFT            transformers' own blocks with PEFT's `adapter_names`, the same batch, tokens and adapters
    one at a time   our blocks, but every row is a step of its own: what a server does that doesn't batch users
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import judged, print_report
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.checkpoint.source import resolve
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PageAllocator, PageTable
from swarm.types import BlockRange

MODEL = "smollm2-135m-instruct"
CASES = {
    "1 of rank 16": [16],
    "4 of rank 16": [16] * 4,
    "8 of rank 16": [16] * 8,
    "32 of rank 16": [16] * 32,
    "4 of ranks 8/16/32/64": [8, 16, 32, 64],
    "32 of ranks 8/16/32/64": [8, 16, 32, 64] * 8,
}
WITH_PEFT = ("1 of rank 16", "8 of rank 16", "32 of rank 16")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds; one more is run first and not counted")
    parser.add_argument("--rows", type=int, default=32, help="decode rows of the batch")
    parser.add_argument("--context", type=int, default=32, help="tokens of each sequence in the cache")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    server = Server(args.rows, args.context)
    handles = {case: [server.attach(rank) for rank in ranks] for case, ranks in CASES.items()}
    runs: dict[str, Callable[[], object]] = {"none": lambda: server.step([-1] * args.rows)}
    for case, mine in handles.items():
        adapters = [mine[row * len(mine) // args.rows] for row in range(args.rows)]
        runs[case] = lambda adapters=adapters: server.step(adapters)
    mixed = handles["32 of rank 16"]
    turns = itertools.count()
    runs["32 of rank 16, new company"] = lambda: server.step(rotated(mixed, next(turns), args.rows))
    runs["one at a time"] = lambda: server.one_at_a_time(handles["32 of rank 16"])
    if not args.no_peft:
        peft = Peft(args.rows, args.context)
        runs["PEFT none"] = lambda: peft.step(["__base__"] * args.rows)
        for case in WITH_PEFT:
            names = [f"a{row * len(CASES[case]) // args.rows}" for row in range(args.rows)]
            runs[f"PEFT {case}"] = lambda names=names: peft.step(names)
    attached = sorted(seconds for rank, _, seconds in server.attached if rank == 16)
    pages = next(pages for rank, pages, _ in server.attached if rank == 16)
    print(f"attach, rank 16: median {attached[len(attached) // 2] * 1e3:.1f} ms, {pages} pages\n")
    report(measure(runs, args.rounds), args)


def rotated(handles: list[int], by: int, rows: int) -> list[int]:
    return [handles[(row + by) % len(handles)] for row in range(rows)]


class Server:
    """All blocks of the model, sequences with `context` tokens each, and one new row for each of them."""

    def __init__(self, rows: int, context: int):
        pages = sum(len(ranks) for ranks in CASES.values()) * 128 + rows * (context // 16 + 2)
        self.span = BlockSpan.load(resolve(MODEL), BlockRange(0, 30), num_pages=pages)
        self.allocator = PageAllocator(pages)
        self.context = context
        self.attached: list[tuple[int, int, float]] = []
        """(rank, pages, seconds) of each adapter."""
        self.tables = [PageTable(self.allocator) for _ in range(rows)]
        prompt = torch.randn(context, self.span.hidden_size)
        for table in self.tables:
            table.grow(context + 1)
            self.span.run([self.chunk(table, prompt, 0, -1)])
        self.new = torch.randn(rows, 1, self.span.hidden_size)

    def attach(self, rank: int) -> int:
        """A random adapter in pages of its own -> its handle."""
        deltas = {block: random_delta(self.span, block, rank) for block in range(30)}
        pages: list[int] = []
        start = time.perf_counter()
        while missing := self.span.adapter_pages(deltas, pages):
            pages += self.allocator.allocate(missing, after=pages[-1] if pages else None)
        handle = self.span.attach(deltas, pages)
        self.attached.append((rank, len(pages), time.perf_counter() - start))
        return handle

    def chunk(self, table: PageTable, rows: Tensor, position: int, adapter: int) -> Chunk:
        return Chunk(hidden_states=rows, position=position, pages=table.pages, entry=0, exit=30, adapter=adapter)

    def step(self, adapters: list[int]) -> None:
        self.span.run(
            [
                self.chunk(table, row, self.context, adapter)
                for table, row, adapter in zip(self.tables, self.new, adapters, strict=True)
            ]
        )

    def one_at_a_time(self, handles: list[int]) -> None:
        for index, (table, row) in enumerate(zip(self.tables, self.new, strict=True)):
            self.span.run([self.chunk(table, row, self.context, handles[index % len(handles)])])


def random_delta(span: BlockSpan, block: int, rank: int) -> BlockDelta:
    linears = {
        path: LinearDelta(
            a_rI=torch.randn(rank, shape.num_inputs) * shape.num_inputs**-0.5,
            b_Or=torch.randn(shape.num_outputs, rank) * 0.02,
            scale=2.0,
        )
        for path, shape in span.shape(block).linears.items()
    }
    return BlockDelta(linears=linears)


class Peft:
    """The same model with 32 LoRA adapters of rank 16 by PEFT."""

    def __init__(self, rows: int, context: int):
        model = AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS), init_lora_weights=False)
        self.model: PeftModel = get_peft_model(model, config, adapter_name="a0")
        for index in range(1, 32):
            self.model.add_adapter(f"a{index}", config)
        self.model.eval()
        self.decoder: Any = self.model.base_model.model.model
        self.context = context
        self.cache = DynamicCache()
        with torch.inference_mode(), self.model.disable_adapter():
            self.decoder(inputs_embeds=torch.randn(rows, context, 576), past_key_values=self.cache, use_cache=True)
        self.new = torch.randn(rows, 1, 576)

    @torch.inference_mode()
    def step(self, names: list[str]) -> None:
        """One new token per row; without the head, as in a server."""
        with self.model.base_model._enable_peft_forward_hooks(adapter_names=names):
            self.decoder(inputs_embeds=self.new, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            run()  # what was run before has left the caches in a state of its own
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Table and JSON."""

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))

    print(f"{'':28}{'ms, median':>12}{'ms, least':>12}{'x none':>10}")
    for name, values in seconds.items():
        own = "PEFT none" if name.startswith("PEFT") else "none"
        print(f"{name:28}{statistics.median(values) * 1e3:12.1f}{min(values) * 1e3:12.1f}{ratio(name, own):10.2f}")
    targets = {
        "1 adapter / none": judged(ratio("1 of rank 16", "none"), "<=", 1.15),
        "32 adapters / none": judged(ratio("32 of rank 16", "none"), "<=", 1.6),
        "one at a time / 32 in a batch": judged(ratio("one at a time", "32 of rank 16"), ">=", 6.0),
    }
    if not args.no_peft:
        targets["PEFT / 8 adapters"] = judged(ratio("PEFT 8 of rank 16", "8 of rank 16"), ">=", 3.0)
    milliseconds = {name: round(statistics.median(values) * 1e3, 2) for name, values in seconds.items()}
    print_report("lora", targets, model=MODEL, rows=args.rows, context=args.context, threads=args.threads,
                 rounds=args.rounds, ms=milliseconds)  # fmt: skip


if __name__ == "__main__":
    main()
