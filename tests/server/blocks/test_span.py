"""A span runs any mix of sessions, in and out at any block, each as if it were alone."""

import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ConfigError, InvalidRequest
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.blocks.plain_decoder import PlainDecoder
from swarm.server.pages import PAGE_SIZE, PageAllocator, PageTable
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint

NUM_PAGES = 32
HIDDEN = 32
NUM_BLOCKS = 4


def save(name, directory):
    FAMILIES[name].model().save_pretrained(directory)
    return SavedCheckpoint(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Windows, soft caps, and rope that differs by layer: four blocks that are not all alike."""
    return save("gemma3_text", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def span(checkpoint):
    return BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=NUM_PAGES)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    checkpoint = save("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))
    return BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=NUM_PAGES)


def hidden(count, seed=0):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def chunk(rows, pages, *, position=0, entry=0, exit=NUM_BLOCKS, state=None):
    return Chunk(hidden_states=rows, position=position, pages=pages, entry=entry, exit=exit, state=state)


def alone(span, rows, *, entry=0, exit=NUM_BLOCKS):
    """The result for one session that nobody disturbs."""
    return span.run([chunk(rows, range(8), entry=entry, exit=exit, state=span.new_state())])[0]


sessions = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS), st.integers(1, 12)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25)
@given(sessions=sessions, seed=st.integers(0, 1 << 30))
def test_any_schedule_gives_each_session_its_own_numbers(span, sessions, seed):
    """Chunks of random lengths, random company and random entry and exit blocks change no session's result."""
    expected, produced, pending = [], [], []
    allocator, dice = PageAllocator(NUM_PAGES), random.Random(seed)
    for number, (length, entry, width, _) in enumerate(sessions):
        rows, exit = hidden(length, number), min(NUM_BLOCKS, entry + width)
        expected.append(alone(span, rows, entry=entry, exit=exit))
        produced.append([])
        pending.append([rows, 0, PageTable(allocator), entry, exit])
    while any(position < len(rows) for rows, position, *_ in pending):
        batch, who = [], []
        for number, item in enumerate(pending):
            rows, position, table, entry, exit = item
            if position == len(rows) or dice.random() < 0.5:
                continue
            count = min(sessions[number][3], len(rows) - position)
            span.copy_pages(table.grow(position + count))
            batch.append(chunk(rows[position : position + count], list(table.pages), position=position, entry=entry,
                               exit=exit))  # fmt: skip
            who.append(number)
            item[1] += count
        if batch:
            for number, output in zip(who, span.run(batch), strict=True):
                produced[number].append(output)
    for outputs, wanted in zip(produced, expected, strict=True):
        torch.testing.assert_close(torch.cat(outputs), wanted, atol=2e-5, rtol=1e-4)


def test_leaving_and_entering_in_the_middle_is_the_same_as_passing_through(span):
    """Two hops inside one span equal one: sub-spans of any length serve a session."""
    rows = hidden(20)
    halfway = span.run([chunk(rows, [0, 1], exit=3)])[0]
    result = span.run([chunk(halfway, [0, 1], entry=3)])[0]
    torch.testing.assert_close(result, alone(span, rows))


def test_beams_share_pages_until_they_write(span):
    """Forked sequences go on apart from each other after a copy-on-write of their common last page."""
    start, left, right = hidden(20, 1), hidden(3, 2), hidden(5, 3)
    allocator = PageAllocator(NUM_PAGES)
    table = PageTable(allocator)
    table.grow(20)
    span.run([chunk(start, list(table.pages))])
    other = table.fork()
    assert allocator.num_used == 2
    span.copy_pages([*table.grow(23), *other.grow(25)])
    assert allocator.num_used == 3
    outputs = span.run([chunk(left, list(table.pages), position=20), chunk(right, list(other.pages), position=20)])
    for output, rows in zip(outputs, (left, right), strict=True):
        torch.testing.assert_close(output, alone(span, torch.cat([start, rows]))[20:], atol=2e-5, rtol=1e-4)


def test_a_rolled_back_sequence_forgets_what_it_dropped(span):
    """Truncate, then other tokens at the same positions: as if the first ones had never been."""
    kept, dropped, instead = hidden(18, 1), hidden(9, 2), hidden(4, 3)
    table = PageTable(PageAllocator(NUM_PAGES))
    table.grow(27)
    span.run([chunk(torch.cat([kept, dropped]), list(table.pages))])
    table.truncate(18)
    table.grow(22)
    output = span.run([chunk(instead, list(table.pages), position=18)])[0]
    torch.testing.assert_close(output, alone(span, torch.cat([kept, instead]))[18:], atol=2e-5, rtol=1e-4)


def test_a_hostile_session_harms_nobody_in_its_batch(span):
    """NaN and infinities stay in the rows of the session that sent them, and in its pages."""
    good = hidden(5)
    expected = alone(span, good)
    bad = torch.full((5, HIDDEN), float("nan"))
    worse = torch.full((1, HIDDEN), float("inf"))
    outputs = span.run([chunk(bad, [8]), chunk(good, [9]), chunk(worse, [10])])
    torch.testing.assert_close(outputs[1], expected)
    torch.testing.assert_close(span.run([chunk(good, [8])])[0], expected)


def test_recurrent_blocks_keep_a_state_per_sequence(recurrent):
    """Two sessions in chunks and one batch, each with its own state; such a span says that it can't roll back."""
    assert recurrent.stateful and not recurrent.can_roll_back
    rows = [hidden(23, 1), hidden(11, 2)]
    expected = [alone(recurrent, it) for it in rows]
    states = [recurrent.new_state(), recurrent.new_state()]
    first = recurrent.run([chunk(rows[0][:9], [8, 9], state=states[0]), chunk(rows[1][:1], [10], state=states[1])])
    second = recurrent.run(
        [
            chunk(rows[0][9:], [8, 9], position=9, state=states[0]),
            chunk(rows[1][1:], [10], position=1, state=states[1]),
        ]
    )
    for part, wanted in zip(zip(first, second, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(part), wanted, atol=2e-5, rtol=1e-4)
    assert states[0].position == 23
    assert states[0].num_bytes > 0


def test_a_forked_state_is_independent(recurrent):
    """Beams over recurrent blocks copy the state."""
    start, left, right = hidden(7, 1), hidden(2, 2), hidden(2, 3)
    state = recurrent.new_state()
    recurrent.run([chunk(start, [8], state=state)])
    other = state.fork()
    recurrent.copy_pages([(8, 9)])
    recurrent.run([chunk(left, [8], position=7, state=state)])
    output = recurrent.run([chunk(right, [9], position=7, state=other)])[0]
    torch.testing.assert_close(output, alone(recurrent, torch.cat([start, right]))[7:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 31)}, r"shape \(2, 31\), expected \(at least 1, 32\)"),
        ({"hidden_states": torch.zeros(0, 32)}, r"shape \(0, 32\)"),
        ({"entry": 2, "exit": 2}, "2:2 are outside this span, 0:4"),
        ({"exit": 5}, "0:5 are outside this span, 0:4"),
        ({"position": -1}, "position -1 is negative"),
        ({"position": 15}, "17 tokens need 2 pages, 1 given"),
        ({"pages": [NUM_PAGES]}, "outside the pool of 32"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_with_both_numbers(span, change, message):
    """Nothing outside the span's own memory is ever touched."""
    fields = {"hidden_states": hidden(2), "position": 0, "pages": [0], "entry": 0, "exit": NUM_BLOCKS}
    with pytest.raises(InvalidRequest, match=message):
        span.run([Chunk(**{**fields, **change})])


def test_a_recurrent_span_insists_on_a_state(recurrent):
    """A missing state would silently start from zero."""
    with pytest.raises(InvalidRequest, match="needs the state"):
        recurrent.run([chunk(hidden(2), [0])])


def test_load_reports_progress_and_sizes(checkpoint):
    """What the server shows while it loads, and what it announces."""
    seen = []
    span = BlockSpan.load(checkpoint, BlockRange(1, 3), kv_bytes=100_000, on_progress=lambda *it: seen.append(it))
    assert seen == [(1, 2), (2, 2)]
    assert span.page_bytes == 2 * PAGE_SIZE * 2 * (16 + 16) * 4
    assert span.num_pages == 100_000 // span.page_bytes
    assert span.max_positions == 128
    assert span.hidden_size == HIDDEN
    assert span.num_parameter_bytes > 0


def test_a_cache_without_room_for_a_page_is_a_configuration_error(checkpoint):
    """The message has both sizes."""
    with pytest.raises(ConfigError, match="100 bytes has no room for one page of 4096 bytes"):
        BlockSpan.load(checkpoint, BlockRange(0, 1), kv_bytes=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_full_precision(checkpoint, span, dtype):
    """The same blocks in the dtypes of GPU servers."""
    half = BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=NUM_PAGES, dtype=dtype)
    rows = hidden(20)
    output = alone(half, rows)
    assert output.dtype == dtype
    assert (output.float() - alone(span, rows)).norm() < 0.05 * alone(span, rows).norm()


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.05), ("nf4", 0.3)])
def test_quantised_blocks_are_near_the_original(checkpoint, span, format, bound):
    """Prefill and decode through quantised linears, in a fraction of the memory."""
    quantized = BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=NUM_PAGES, quantization=format)
    rows = hidden(20)
    expected = alone(span, rows)
    first = quantized.run([chunk(rows[:19], [0, 1])])[0]
    last = quantized.run([chunk(rows[19:], [0, 1], position=19)])[0]
    assert (torch.cat([first, last]) - expected).norm() < bound * expected.norm()
    assert quantized.num_parameter_bytes < 0.5 * span.num_parameter_bytes


def test_experts_that_stay_unquantised_are_announced_in_the_log(tmp_path, caplog):
    """Nobody is left to believe that a mixture of experts got smaller."""
    with caplog.at_level(logging.WARNING):
        BlockSpan.load(save("mixtral", tmp_path), BlockRange(0, 1), num_pages=1, quantization="int8")
    assert "of its weights could be quantised to int8" in caplog.text


@pytest.mark.parametrize(("name", "plain"), [("llama", True), ("qwen3", True), ("smollm3", False), ("gemma2", False)])
def test_the_short_form_of_common_layers_is_really_used(name, plain, tmp_path):
    """The speed of small models hangs on it; layers of another kind keep their own forward."""
    loaded = BlockSpan.load(save(name, tmp_path), BlockRange(0, 2), num_pages=1)
    used = [isinstance(block.layer.__dict__.get("forward"), PlainDecoder) for block in loaded._loaded]
    assert all(used) if plain else not all(used)
