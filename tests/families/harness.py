"""Runs a tiny model through two chained spans in ragged, mixed batches and compares it with plain transformers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PageAllocator, PageTable
from swarm.types import BlockRange
from tests.families.configs import VOCABULARY, Family

NUM_PAGES = 24
LENGTHS = (37, 9, 22)
"""Tokens of the three sequences; more than two pages, less than one, and in between."""


class SavedCheckpoint:
    """A checkpoint directory, with what the loader needs of a swarm.checkpoint Checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.weight_map: dict[str, str] = {}
        for shard in sorted(path.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                self.weight_map.update(dict.fromkeys(file.keys(), shard.name))

    def config(self) -> PretrainedConfig:
        return AutoConfig.from_pretrained(self.path)

    def ensure(self, shards: Iterable[str]) -> dict[str, Path]:
        return {shard: self.path / shard for shard in shards}


class Sequence:
    """One session's pages and recurrent states over two chained spans."""

    def __init__(self, spans: list[BlockSpan], allocators: list[PageAllocator]):
        self.tables = [PageTable(allocator) for allocator in allocators]
        self.states = [span.new_state() for span in spans]
        self.position = 0


def split_model(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """(its blocks, the module that holds them)."""
    from swarm.checkpoint.partial import find_blocks

    path, blocks = find_blocks(model)
    return blocks, model.get_submodule(path.rpartition(".")[0])


def block_inputs_and_outputs(model: PreTrainedModel, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What plain transformers gives its first block and takes from its last one, [n, H] each, for one sequence.

    Args:
        model: the whole model.
        parts: the tokens, fed one part after another over transformers' own cache.
    """
    blocks, _ = split_model(model)
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}

    def remember(name: str, value: object) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        assert isinstance(tensor, Tensor)
        seen[name].append(tensor.detach()[0])

    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: remember("in", args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
        ),
        blocks[-1].register_forward_hook(lambda _, args, output: remember("out", output)),
    ]
    cache = None
    with torch.no_grad():
        for tokens in parts:
            output = model(
                input_ids=tokens[None],
                use_cache=len(parts) > 1,
                **({} if cache is None else {"past_key_values": cache}),
            )
            cache = output.past_key_values if len(parts) > 1 else None
    for hook in hooks:
        hook.remove()
    return torch.cat(seen["in"]), torch.cat(seen["out"])


def schedule() -> list[list[tuple[int, int]]]:
    """Batches of (sequence, new tokens): staggered arrivals, chunked prefill beside decode rows, then decode."""
    return [
        [(0, 20)],
        [(0, 16), (1, 5)],
        [(1, 1), (2, 18), (0, 1)],
        [(2, 1), (1, 1)],
        [(1, 1), (2, 1)],
        [(2, 2), (1, 1)],
    ]


def step(spans: list[BlockSpan], sequences: list[Sequence], rows: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Send new hidden states of some sequences through both spans in one batch each."""
    outputs = [hidden for _, hidden in rows]
    for number, span in enumerate(spans):
        chunks = []
        for (index, _), hidden in zip(rows, outputs, strict=True):
            sequence = sequences[index]
            table = sequence.tables[number]
            span.copy_pages(table.grow(sequence.position + hidden.shape[0]))
            chunks.append(
                Chunk(
                    hidden_states=hidden,
                    position=sequence.position,
                    pages=table.pages,
                    entry=span.blocks.start,
                    exit=span.blocks.end,
                    state=sequence.states[number],
                )
            )
        outputs = span.run(chunks)
    for index, hidden in rows:
        sequences[index].position += hidden.shape[0]
    return outputs


def load_spans(checkpoint: SavedCheckpoint, num_blocks: int, **options: object) -> list[BlockSpan]:
    half = num_blocks // 2
    return [
        BlockSpan.load(checkpoint, BlockRange(start, end), num_pages=NUM_PAGES, **options)
        for start, end in ((0, half), (half, num_blocks))
    ]


def compare(family: Family, directory: Path) -> float:
    """Largest difference of logits, relative to the largest logit, over all tokens of all sequences."""
    model = family.model()
    model.save_pretrained(directory)
    blocks, _ = split_model(model)
    spans = load_spans(SavedCheckpoint(directory), len(blocks))
    assert any(span.stateful for span in spans) == family.stateful
    allocators = [PageAllocator(NUM_PAGES) for _ in spans]
    sequences = [Sequence(spans, allocators) for _ in LENGTHS]
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    parts = [
        list(ids.split([count for batch in schedule() for row, count in batch if row == index]))
        if family.incremental
        else [ids]
        for index, ids in enumerate(tokens)
    ]
    reference = [block_inputs_and_outputs(model, part) for part in parts]
    produced: list[list[Tensor]] = [[] for _ in LENGTHS]
    for batch in schedule():
        rows = []
        for index, count in batch:
            start = sequences[index].position
            rows.append((index, reference[index][0][start : start + count]))
        for (index, _), output in zip(batch, step(spans, sequences, rows), strict=True):
            produced[index].append(output)
    worst = 0.0
    for outputs, (_, expected), ids in zip(produced, reference, tokens, strict=True):
        ours = torch.cat(outputs)
        assert ours.shape[0] == len(ids)
        logits, wanted = (logits_of(model, ids, hidden) for hidden in (ours, expected))
        assert torch.isfinite(logits).all() and wanted.abs().max() > 0
        worst = max(worst, float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1)))
    return worst


def logits_of(model: PreTrainedModel, tokens: Tensor, last_hidden: Tensor) -> Tensor:
    """The model's own norm and head on given outputs of its last block."""
    blocks, _ = split_model(model)

    def replace(_: nn.Module, __: object, output: object) -> object:
        return (last_hidden[None], *output[1:]) if isinstance(output, tuple) else last_hidden[None]

    hook = blocks[-1].register_forward_hook(replace)
    try:
        with torch.no_grad():
            return model(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        hook.remove()
