"""Step times of the embedded model with adapters: what simulations of policies run on.

    BlockSpan of all 30 blocks ─ add_lora behind each linear ─► measure(kinds) ─► [(kind, seconds)] ─► fit

One thread. Adapters of random weights are on all seven linears of every block, in pools of each block as a server has
them. A kind of batch is decode rows and prompt tokens and the adapter of each; kinds are interleaved round by round,
and the least time of a kind counts, since whatever else a machine does only adds.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarm.checkpoint.source import resolve
from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, add_lora
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.packing import PackedLinear
from swarm.server.pages import PAGE_SIZE
from swarm.types import BlockRange

MODEL = "smollm2-135m-instruct"
CONTEXT = 96
"""Tokens that a decode row has behind it."""
PAGES_PER_ROW = 8
MAX_PROMPT_PAGES = 32


@dataclass(frozen=True)
class Kind:
    """A batch: the adapter of each decode row, and of each prompt with its number of tokens; -1 for none."""

    decode: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...] = ()

    @property
    def num_prompt(self) -> int:
        return sum(count for _, count in self.prompts)

    @property
    def adapters(self) -> set[int]:
        return ({*self.decode} | {adapter for adapter, _ in self.prompts}) - {-1}

    @property
    def rows(self) -> list[int]:
        """The adapter of each token."""
        return [*self.decode, *(adapter for adapter, count in self.prompts for _ in range(count))]


class Machine:
    """The embedded model with adapters of these ranks.

    Args:
        ranks: of each adapter.
        quantization: of the base.
    """

    def __init__(self, ranks: Sequence[int], quantization: str = "none"):
        checkpoint = resolve(MODEL)
        blocks = BlockRange(0, int(checkpoint.config().num_hidden_layers))
        num_pages = 64 * PAGES_PER_ROW + MAX_PROMPT_PAGES
        self.ranks = list(ranks)
        self.span = BlockSpan.load(checkpoint, blocks, num_pages=num_pages, quantization=quantization)
        self.batch: LoraBatch | None = None
        self.num_linears = 0
        starts = [sum(ranks[:index]) for index in range(len(ranks))]
        spans = [range(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
        self._table = {index: AdapterRanks(a_rows=it, b_rows=it, scale=0.5) for index, it in enumerate(spans)}
        for block in self.span._loaded:
            attention, mlp = block.layer.self_attn, block.layer.mlp
            for group in (attention.swarm_group_0, mlp.swarm_group_0):
                self._adapt(group.linear, group.sizes)
            for linear in (attention.o_proj, mlp.down_proj):
                self._adapt(linear, [linear.out_features])

    @property
    def rank_rows(self) -> list[int]:
        """Of each adapter, in all blocks."""
        return [rank * self.num_linears for rank in self.ranks]

    def linears(self) -> list[PackedLinear]:
        """Of all blocks, in fp32 on a CPU."""
        layers = (block.layer for block in self.span._loaded)
        return [it for layer in layers for it in layer.modules() if isinstance(it, PackedLinear)]

    def run(self, kind: Kind, kept: LoraBatch | None) -> float:
        """Seconds of one step."""
        self.batch = kept
        chunks = self._chunks(kind)
        started = time.perf_counter()
        self.span.run(chunks)
        return time.perf_counter() - started

    def measure(self, kinds: Sequence[Kind], rounds: int) -> list[list[float]]:
        """Seconds of each kind in each round; one more round is run first and not counted."""
        kept = [LoraBatch(kind.rows) if kind.adapters else None for kind in kinds]
        seconds: list[list[float]] = [[] for _ in kinds]
        for turn in range(rounds + 1):
            for index in random.Random(turn).sample(range(len(kinds)), len(kinds)):
                took = self.run(kinds[index], kept[index])
                if turn:
                    seconds[index].append(took)
        return seconds

    def _adapt(self, linear: Any, sizes: Sequence[int]) -> None:
        """Have a linear add what adapters add."""
        columns = [sum(sizes[:index]) for index in range(len(sizes))]
        targets = [self._target(linear.in_features, size, at) for size, at in zip(sizes, columns, strict=True)]
        plain = type(linear).forward
        self.num_linears += len(targets)

        def forward(input: Tensor) -> Tensor:
            output: Tensor = plain(linear, input)
            if self.batch is not None:
                rows = output.view(-1, output.shape[-1])
                add_lora(rows, input.reshape(-1, input.shape[-1]), targets, self.batch)
            return output

        assert isinstance(linear, nn.Module)
        linear.__dict__["forward"] = forward

    def _target(self, width: int, columns: int, at: int) -> LoraTarget:
        num_ranks = sum(self.ranks)
        a_pool, b_pool = (torch.randn(num_ranks, size) * 0.01 for size in (width, columns))
        return LoraTarget(a_pool_RI=a_pool, b_pool_RO=b_pool, ranks=self._table, column=at)

    def _chunks(self, kind: Kind) -> list[Chunk]:
        first, chunks = 0, []
        for count, position in [*((1, CONTEXT) for _ in kind.decode), *((count, 0) for _, count in kind.prompts)]:
            num_pages = PAGES_PER_ROW if position else -(-count // PAGE_SIZE)
            chunks.append(
                Chunk(
                    hidden_states=torch.zeros(count, self.span.hidden_size).normal_(),
                    position=position,
                    pages=range(first, first + num_pages),
                    entry=self.span.blocks.start,
                    exit=self.span.blocks.end,
                )
            )
            first += num_pages
        return chunks
