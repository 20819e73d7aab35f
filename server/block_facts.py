"""What one block of a model takes and gives on this machine: memory and speed, measured and kept in the cache.

    cache/blocks/KEY.json ──known──► BlockFacts
    one block ─BlockSpan.load, measure─► BlockFacts ──► cache/blocks/KEY.json

The key is everything that changes the answer: device, threads, model, formats, versions. A server asks before it knows
which blocks it will hold, so any block stands for all; where others have more parameters, `largest_part` says how many
times more. A machine may have been busy when it was measured: notes are made anew when blocks are loaded a day later,
and set right by what batches take (`swarm.server.speeds`).
"""

import logging
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import transformers

from swarm import __version__
from swarm.checkpoint.cache import default_cache_dir, write_atomically
from swarm.checkpoint.partial import build_model, find_blocks
from swarm.checkpoint.source import Checkpoint
from swarm.errors import ConfigError
from swarm.server.blocks.span import BlockSpan
from swarm.server.blocks.step import Chunk
from swarm.server.hardware import device_name
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 8, 32)
"""Rows in a batch of decoding, for which the speed is measured."""
PROMPT_TOKENS = 128
"""Tokens of the prompt for which it is measured."""
NUM_STEPS = 4
"""Batches of each kind, of which the first does not count."""
CONTEXT_TOKENS = 64
"""Room in the cache for each row."""
ENOUGH_BLOCKS = 4
"""A span of fewer blocks may fit into the processor's caches and look faster than it would be in a longer one."""
MAX_AGE_S = 86400.0
"""What was measured longer ago is measured again when blocks are loaded."""
_FORMAT = 2

_Rate = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class BlockFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and speed of one block."""

    weight_bytes: _Bytes
    page_bytes: _Bytes
    """One page of the KV cache."""
    decode_tps: dict[int, _Rate]
    """Tokens per second in batches of so many rows with one token each."""
    prefill_tps: _Rate
    """Tokens per second in a prompt."""
    num_blocks: Annotated[int, msgspec.Meta(ge=1)]
    """Blocks that were run one after the other when this was measured."""
    measured_tps: dict[int, _Rate] = {}
    """`decode_tps` as it was measured, if use has changed it since (`swarm.server.speeds`)."""

    @property
    def single_tps(self) -> float:
        """Tokens per second of one session that is alone."""
        return self.decode_tps[min(self.decode_tps)]

    @property
    def batch_tps(self) -> float:
        """Tokens per second of full batches."""
        return max(self.decode_tps.values())


class FactsStore:
    """The facts that are known on this machine.

    Args:
        checkpoint: the model.
        device, dtype, quantization: how its blocks are run.
        cache_dir: where facts are kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str,
        cache_dir: Path | None = None,
    ):
        self._checkpoint, self._device, self._dtype, self._quantization = checkpoint, device, dtype, quantization
        parts = (_FORMAT, __version__, torch.__version__, transformers.__version__, device_name(device), dtype,
                 quantization, checkpoint.digest)  # fmt: skip
        key = sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
        self._path = (cache_dir or default_cache_dir()) / "blocks" / f"{key}.json"

    def known(self) -> BlockFacts | None:
        """What was measured before."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=BlockFacts)
        except (OSError, msgspec.MsgspecError):
            return None

    def of_block(self, block: int) -> BlockFacts:
        """What is known, else what this block shows: it is loaded, measured and dropped.

        Raises:
            UnsupportedModel: the block runner would run this model wrongly.
        """
        if (facts := self.known()) is not None:
            return facts
        num_pages = max(BATCH_SIZES) * CONTEXT_TOKENS // PAGE_SIZE
        span = BlockSpan.load(
            self._checkpoint,
            BlockRange(block, block + 1),
            device=self._device,
            dtype=self._dtype,
            quantization=self._quantization,
            num_pages=num_pages,
        )
        return self.of_span(span)

    def of_span(self, span: BlockSpan) -> BlockFacts:
        """What is known; else, or where too few blocks were measured or long ago, what this span shows, which is
        remembered."""
        facts = self.known()
        if facts is not None and facts.num_blocks >= min(len(span.blocks), ENOUGH_BLOCKS) and not self._is_old:
            return facts
        facts = measure(span)
        self.remember(facts)
        return facts

    def remember(self, facts: BlockFacts) -> None:
        """Keep these from now on."""
        try:
            write_atomically(self._path, msgspec.json.encode(facts))
        except ConfigError as error:
            logger.warning("%s; every start will measure this model again", error)

    @property
    def _is_old(self) -> bool:
        """Whether the note was made long ago, or by a clock that was ahead."""
        try:
            return not 0 <= time.time() - self._path.stat().st_mtime <= MAX_AGE_S
        except OSError:
            return True


def measure(span: BlockSpan, clock: Callable[[], float] = time.perf_counter) -> BlockFacts:
    """Memory and speed per block of a span that nobody uses yet; the content of its cache is lost."""
    num_blocks = len(span.blocks)
    decode_tps = {}
    for size in BATCH_SIZES:
        if size == min(BATCH_SIZES) or size * CONTEXT_TOKENS <= span.num_pages * PAGE_SIZE:
            decode_tps[size] = size * num_blocks / _batch_s(span, size, 1, clock)
    num_tokens = min(PROMPT_TOKENS, span.max_positions // NUM_STEPS, span.num_pages * PAGE_SIZE // NUM_STEPS)
    prefill_tps = decode_tps[1]
    if num_tokens > 1:
        prefill_tps = num_tokens * num_blocks / _batch_s(span, 1, num_tokens, clock)
    return BlockFacts(
        weight_bytes=span.num_parameter_bytes // num_blocks,
        page_bytes=span.page_bytes // num_blocks,
        decode_tps=decode_tps,
        prefill_tps=prefill_tps,
        num_blocks=num_blocks,
    )


def largest_part(checkpoint: Checkpoint, block: int) -> float:
    """How many times as many parameters the largest block of a model has as this one."""
    _, layers = find_blocks(build_model(checkpoint.config(), dtype=torch.bfloat16))
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return max(sizes) / max(1, sizes[block])


def _batch_s(span: BlockSpan, num_rows: int, num_tokens: int, clock: Callable[[], float]) -> float:
    """Seconds of one batch of `num_rows` sequences with `num_tokens` each: the median after a warm-up."""
    allocator = PageAllocator(span.num_pages)
    tables = [PageTable(allocator) for _ in range(num_rows)]
    states = [span.new_state() for _ in tables]
    hidden_states = torch.zeros(num_tokens, span.hidden_size)
    seconds = []
    for step in range(NUM_STEPS):
        position = step * num_tokens
        if position + num_tokens > span.max_positions:
            break
        for table in tables:
            table.grow(position + num_tokens)
        batch = [
            Chunk(
                hidden_states=hidden_states,
                position=position,
                pages=table.pages,
                entry=span.blocks.start,
                exit=span.blocks.end,
                state=state,
            )
            for table, state in zip(tables, states, strict=True)
        ]
        started = clock()
        outputs = span.run(batch)
        outputs[-1].cpu()  # waits for the device
        seconds.append(clock() - started)
    later = sorted(seconds[1:] or seconds)
    return max(later[len(later) // 2], 1e-9)
