"""A span of consecutive blocks on one device: transformers' own decoder layers over our paged KV cache.

    load: checkpoint --iter_blocks--> layer --quirks, probe, fuse, quantise--> Block         (one at a time)
    run:  [Chunk] --segments--> rows of the active chunks --Block after Block--> [hidden states], one per chunk
    attach: {block: BlockDelta} --adapters--> a handle, which chunks name

Rows of all sequences are flattened into [1, T, H]; a chunk joins the rows at its entry block and leaves them at its
exit block. It does not know sessions, networks or who asks; one thread calls it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from swarm.adapters.delta import BlockDelta
from swarm.adapters.layout import BlockShape
from swarm.checkpoint.partial import build_rotary, iter_blocks
from swarm.errors import ConfigError, InvalidRequest
from swarm.server.blocks.adapter_checks import AdaptableBlock
from swarm.server.blocks.adapters import SpanAdapters
from swarm.server.blocks.attention import LayerAttention
from swarm.server.blocks.block import Block, prepare
from swarm.server.blocks.internals import Ropes, SequenceState, trace_calls
from swarm.server.blocks.parcel import Layout, SavedPages, pack, unpack
from swarm.server.blocks.plain_decoder import RotaryTables
from swarm.server.blocks.probe import Prober
from swarm.server.blocks.quirks import quirks_of
from swarm.server.blocks.sites import Current
from swarm.server.blocks.step import Chunk, Step, check_chunk, segments
from swarm.server.blocks.training_pass import Part, TrainingPass, check_part
from swarm.server.host_pages import HostBudget
from swarm.server.packing import PackedLinear
from swarm.server.pages import PAGE_SIZE
from swarm.server.quantization import Int8Linear
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

_PAGES_WITHOUT_ATTENTION = 1 << 14
"""Pages of a span whose blocks keep no keys and values: they cost nothing, and only count tokens."""


class BlockSpan:
    """Runs blocks for batches of chunks; see the module docstring. Made by `load`."""

    page_size = PAGE_SIZE

    def __init__(
        self,
        blocks: BlockRange,
        loaded: Sequence[Block],
        *,
        config: PretrainedConfig,
        ropes: Ropes,
        step: Step,
        current: Current,
        dtype: torch.dtype,
        device: torch.device,
        num_pages: int,
        quantization: str,
    ):
        self.blocks = blocks
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_pages = num_pages
        self.quantization = quantization
        self.hidden_size = int(config.get_text_config(decoder=True).hidden_size)
        self._loaded = tuple(loaded)
        self._ropes = ropes
        self._step, self._current = step, current
        self._state_template: SequenceState | None = None
        for block in loaded:
            if block.attention is not None:
                block.attention.allocate(num_pages, dtype, device)
        adaptable = [self._adaptable(block) for block in loaded]
        self._adapters = SpanAdapters(adaptable, current, torch.empty(0, dtype=dtype, device=device))

    @classmethod
    def load(
        cls,
        checkpoint: Any,
        blocks: BlockRange,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantization: str = "none",
        num_pages: int | None = None,
        kv_bytes: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "BlockSpan":
        """Load `blocks` of a checkpoint, one at a time, and check that they will be run rightly.

        Args:
            checkpoint: a swarm.checkpoint Checkpoint.
            blocks: which ones.
            device: where they run.
            dtype: of weights, hidden states and KV cache.
            quantization: "none", "int8" or "nf4": of the linear layers.
            num_pages: pages of the KV cache, PAGE_SIZE tokens each.
            kv_bytes: size of the KV cache; either this or `num_pages`.
            on_progress: called with (blocks loaded, blocks to load) after each.

        Raises:
            UnsupportedModel: the runner would run this model wrongly; names the reason.
            InvalidRequest: `blocks` are outside the model.
            ConfigError: no such format on this device, or no room for one page.
        """
        device = torch.device(device)
        config: PretrainedConfig = checkpoint.config()
        quirks = quirks_of(config.get_text_config(decoder=True))
        plan = trace_calls(config, quirks.attn_implementation, quirks.ignored)
        ropes = Ropes(build_rotary(config, device=device) if plan.ropes else {}, plan.ropes)
        prober = Prober(config, quirks, ropes, dtype, device)
        step, current, tables = Step(), Current(), RotaryTables()
        loaded: list[Block] = []
        layers = iter_blocks(
            checkpoint, blocks, dtype=dtype, device=device, attn_implementation=quirks.attn_implementation
        )
        for index, layer in layers:
            loaded.append(prepare(index, layer, plan, prober, step, current, quirks, tables, quantization))
            if on_progress is not None:
                on_progress(len(loaded), len(blocks))
        num_pages = _num_pages(loaded, num_pages, kv_bytes, dtype)
        return cls(blocks, loaded, config=config, ropes=ropes, step=step, current=current, dtype=dtype, device=device,
                   num_pages=num_pages, quantization=quantization)  # fmt: skip

    @property
    def stateful(self) -> bool:
        """Whether any block keeps a recurrent state: then sequences can't be rolled back, nor share a prefix."""
        return any(block.spec.stateful for block in self._loaded)

    @property
    def can_roll_back(self) -> bool:
        """Whether a sequence may go back to an earlier position by truncating its pages."""
        return not self.stateful

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a page holds depends on nothing but the tokens up to its end."""
        return not self.stateful and not self._ropes.depend_on_length

    @property
    def max_positions(self) -> int:
        """Positions that the model was built for; 2**31 - 1 where its config names no limit."""
        text = self.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return next((int(value) for name in names if (value := getattr(text, name, None))), 2**31 - 1)

    @property
    def page_bytes(self) -> int:
        """Memory of one page in all blocks of the span."""
        return _page_bytes(self._loaded, self.dtype)

    @property
    def num_parameter_bytes(self) -> int:
        """Memory of the blocks' own weights."""
        return sum(_num_bytes(block.layer) for block in self._loaded)

    def new_state(self) -> SequenceState | None:
        """The state that a new sequence brings along with each of its chunks; None if no block needs one."""
        return SequenceState(self.config) if self.stateful else None

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all blocks, in order."""
        with torch.inference_mode():
            for source, destination in pairs:
                for block in self._loaded:
                    if block.attention is not None:
                        block.attention.copy_page(source, destination)

    @torch.inference_mode()
    def read_pages(self, pages: Sequence[int], blocks: BlockRange) -> list[tuple[Tensor, Tensor]]:
        """What these pages hold in the blocks of a session, on the host."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        return [attention.read_pages(index) for attention in self._attentions(blocks)]

    @torch.inference_mode()
    def write_pages(self, pages: Sequence[int], blocks: BlockRange, saved: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put what `read_pages` gave for the same blocks into these pages."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for attention, content in zip(self._attentions(blocks), saved, strict=True):
            attention.write_pages(index, content)

    @torch.inference_mode()
    def park_states(self, states: Iterable[SequenceState]) -> None:
        """Move recurrent states to host memory."""
        for state in states:
            state.move_to(torch.device("cpu"))

    @torch.inference_mode()
    def unpark_states(self, states: Iterable[SequenceState]) -> None:
        """Move recurrent states back to the device."""
        for state in states:
            state.move_to(self.device)

    def learn_state(self, page: int) -> None:
        """Run a token in this page, which nobody owns, to learn what rows' recurrent states look like."""
        if self._state_template is not None or not self.stateful:
            return
        state = SequenceState(self.config)
        rows = torch.zeros(1, self.hidden_size)
        self.run([Chunk(hidden_states=rows, position=0, pages=[page], entry=self.blocks.start, exit=self.blocks.end,
                        state=state)])  # fmt: skip
        state.move_to(torch.device("cpu"))
        self._state_template = state

    def layout(self, blocks: BlockRange) -> Layout:
        """How `pack_cache` lays out what sessions have in these blocks.

        Raises:
            InvalidRequest: the blocks keep a recurrent state, and `learn_state` was not called.
        """
        states: Sequence[Tensor] = ()
        if self.stateful:
            if self._state_template is None:
                raise InvalidRequest("what recurrent states look like is not known yet")
            states = self._state_template.tensors(blocks)
        return Layout(
            dtype=self.dtype,
            kv_shapes=tuple(attention.kv_shape for attention in self._attentions(blocks)),
            states=tuple((tuple(tensor.shape), tensor.dtype) for tensor in states),
        )

    def pack_cache(self, saved: SavedPages, states: Sequence[SequenceState], blocks: BlockRange) -> bytearray:
        """What `read_pages` gave, and recurrent states, as bytes.

        Raises:
            as `layout`.
        """
        return pack(self.layout(blocks), saved, (state.tensors(blocks) for state in states))

    @torch.inference_mode()
    def unpack_cache(
        self, data: memoryview | bytearray, num_pages: int, num_states: int, blocks: BlockRange
    ) -> tuple[SavedPages, list[SequenceState]]:
        """What `pack_cache` was given; the states lie in host memory.

        Raises:
            InvalidRequest: the data has another size; or as `layout`.
        """
        pages, rows = unpack(self.layout(blocks), data, num_pages, num_states if self.stateful else 0)
        states = []
        for tensors in rows:
            assert self._state_template is not None
            states.append(self._state_template.fork())
            for own, given in zip(states[-1].tensors(blocks), tensors, strict=True):
                own.copy_(given)
        return pages, states

    def shape(self, block: int) -> BlockShape:
        """What adapters may change in a block.

        Raises:
            InvalidRequest: it is not in the span.
        """
        return self._adapters.shape(block)

    def training_pass(self, blocks: BlockRange, parts: Sequence[Part], budget: HostBudget) -> TrainingPass:
        """Whole sequences, to be run through `blocks` with gradients; nothing of them is cached.

        Args:
            blocks: of this span.
            parts: sequences of one tenant each.
            budget: of memory for what is kept for the way back.

        Raises:
            InvalidRequest: a part has a wrong shape, or lengths or a delta that don't fit.
        """
        if not self.blocks.covers(blocks):
            raise InvalidRequest(f"blocks {blocks} are outside this span, {self.blocks}")
        for part in parts:
            check_part(part, self.hidden_size)
            for block in set(part.deltas) & set(blocks):
                if unknown := set(part.deltas[block].linears) - set(self.shape(block).linears):
                    raise InvalidRequest(f"block {block} has no linears {', '.join(sorted(unknown))} to be trained")
        first = self.blocks.start
        return TrainingPass(self._loaded[blocks.start - first : blocks.end - first], parts, step=self._step,
                            current=self._current, ropes=self._ropes, device=self.device, dtype=self.dtype,
                            budget=budget)  # fmt: skip

    def adapter_pages(self, deltas: Mapping[int, BlockDelta], pages: Sequence[int] = ()) -> int:
        """Pages that an adapter needs beside these, if they follow the last of these; 0 if these have room for it.

        How much of a run of pages can be used depends on where it begins, so ask again once the pages are known.
        """
        return self._adapters.pages_missing(deltas, pages)

    def adapter_bytes(self, deltas: Mapping[int, BlockDelta], *, paged: bool) -> int:
        """Memory that an adapter takes outside of its pages; all of it if it gets none."""
        return self._adapters.own_bytes(deltas, paged=paged)

    @torch.inference_mode()
    def attach(self, deltas: Mapping[int, BlockDelta], pages: Sequence[int] | None = None) -> int:
        """Copy an adapter to the device, so that chunks may name it.

        Args:
            deltas: what it does to blocks of this span.
            pages: of the KV cache, for its rank rows, owned by nobody else until it is detached; None for memory of
                its own.

        Returns:
            Its handle, which never names another one.

        Raises:
            InvalidRequest: it can't be applied to these blocks, or the pages have no room for it; nothing has changed.
        """
        return self._adapters.attach(deltas, pages)

    @torch.inference_mode()
    def detach(self, handle: int) -> None:
        """Forget an adapter; its pages may be used for something else then.

        Raises:
            InvalidRequest: no adapter has this handle.
        """
        self._adapters.detach(handle)

    def _adaptable(self, block: Block) -> AdaptableBlock:
        linears = {member.path: member.shape for site in block.sites for member in site.members}
        kv_shape = block.attention.kv_shape if block.attention is not None else None
        shape = BlockShape(hidden_size=self.hidden_size, linears=linears, kv_shape=kv_shape)
        return AdaptableBlock(index=block.index, shape=shape, sites=block.sites, attention=block.attention,
                              stateful=block.spec.stateful)  # fmt: skip

    def _attentions(self, blocks: BlockRange) -> list[LayerAttention]:
        first = self.blocks.start
        loaded = self._loaded[blocks.start - first : blocks.end - first]
        return [block.attention for block in loaded if block.attention is not None]

    @torch.inference_mode()
    def run(self, batch: Sequence[Chunk]) -> list[Tensor]:
        """Run each chunk through its blocks and cache its keys and values.

        Args:
            batch: chunks of different sequences, at least one.

        Returns:
            [n, H] per chunk, in the order of the batch, in the span's dtype.

        Raises:
            InvalidRequest: a chunk has a wrong shape, range, position or page.
        """
        for chunk in batch:
            check_chunk(chunk, start=self.blocks.start, end=self.blocks.end, hidden_size=self.hidden_size,
                        num_pages=self.num_pages, stateful=self.stateful)  # fmt: skip
            self._adapters.check(chunk)
        hidden = [chunk.hidden_states.to(self.device, self.dtype) for chunk in batch]
        for segment in segments(batch):
            active = [batch[index] for index in segment.active]
            rows = [hidden[index] for index in segment.active]
            self._enter(active)
            output_TH = self._run_blocks(torch.cat(rows) if len(rows) > 1 else rows[0], segment.start, segment.end)
            for index, part in zip(segment.active, output_TH.split([row.shape[0] for row in rows]), strict=True):
                hidden[index] = part
        for chunk in batch:
            if chunk.state is not None:
                chunk.state.position = chunk.position + chunk.num_tokens
        return hidden

    def _enter(self, chunks: Sequence[Chunk]) -> None:
        self._step.set(chunks, self.device)
        self._adapters.enter(self._step)

    def _run_blocks(self, hidden_TH: Tensor, start: int, end: int) -> Tensor:
        hidden_1TH = hidden_TH[None]
        step, chunks = self._step, self._step.chunks
        ropes = self._ropes.compute(hidden_1TH, step.positions_1T, [chunk.num_tokens for chunk in chunks])
        arguments: dict[int, dict[str, Any]] = {}
        offset = self.blocks.start
        for block in self._loaded[start - offset : end - offset]:
            if step.virtual:
                hidden_1TH = self._adapters.add_prompts(block.index, hidden_1TH, step.virtual)
            if block.spec.stateful:
                hidden_1TH = self._run_by_sequence(block, hidden_1TH)
                continue
            given = arguments.get(id(block.call))
            if given is None:
                given = arguments[id(block.call)] = block.call.arguments(ropes, step.positions_1T)
            hidden_1TH = block.run(hidden_1TH, given)
        return hidden_1TH[0]

    def _run_by_sequence(self, block: Block, hidden_1TH: Tensor) -> Tensor:
        """A block with a recurrent state: each sequence is called on its own rows with its own state."""
        chunks, parts = self._step.chunks, []
        rows = hidden_1TH.split([chunk.num_tokens for chunk in chunks], dim=1)
        for chunk, own_1nH in zip(chunks, rows, strict=True):
            pieces = chunk.split() if block.spec.token_by_token and chunk.position > 0 else [chunk]
            for piece, piece_1nH in zip(pieces, own_1nH.split([it.num_tokens for it in pieces], dim=1), strict=True):
                parts.append(self._run_one(block, piece, piece_1nH))
        self._enter(chunks)
        return torch.cat(parts, dim=1)

    def _run_one(self, block: Block, chunk: Chunk, hidden_1nH: Tensor) -> Tensor:
        self._enter([chunk])
        positions_1n = self._step.positions_1T
        ropes = self._ropes.compute(hidden_1nH, positions_1n, [chunk.num_tokens])
        given = block.call.arguments(ropes, positions_1n)
        assert block.call.cache_argument is not None
        chunk.state.position = chunk.position
        given[block.call.cache_argument] = chunk.state
        return block.run(hidden_1nH, given)


def _num_pages(loaded: Sequence[Block], num_pages: int | None, kv_bytes: int | None, dtype: torch.dtype) -> int:
    if (num_pages is None) == (kv_bytes is None):
        raise InvalidRequest("give the size of the KV cache either in pages or in bytes")
    if num_pages is None:
        assert kv_bytes is not None
        page_bytes = _page_bytes(loaded, dtype)
        num_pages = kv_bytes // page_bytes if page_bytes else _PAGES_WITHOUT_ATTENTION
    if num_pages < 1:
        raise ConfigError(
            f"KV cache of {kv_bytes} bytes has no room for one page of {_page_bytes(loaded, dtype)} bytes"
        )
    return num_pages


def _page_bytes(loaded: Sequence[Block], dtype: torch.dtype) -> int:
    return sum(block.attention.page_bytes(dtype) for block in loaded if block.attention is not None)


def _num_bytes(module: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    packed = sum(it.num_bytes for it in module.modules() if isinstance(it, Int8Linear | PackedLinear))
    return packed + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
