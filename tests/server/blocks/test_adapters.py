"""Adapters come and go on a span, and rows with and without them share its steps."""

from dataclasses import replace

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.checkpoint.layout import model_layout
from swarm.errors import InvalidRequest
from swarm.server.blocks import Chunk
from tests.server.blocks.adapter_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return Server("llama", tmp_path_factory.mktemp("llama"))


def random_deltas(span, rank=4, *, seed=0, blocks=None, paths=None):
    generator = torch.Generator().manual_seed(seed)

    def linear(shape):
        return LinearDelta(
            a_rI=torch.randn(rank, shape.num_inputs, generator=generator) * 0.3,
            b_Or=torch.randn(shape.num_outputs, rank, generator=generator) * 0.3,
            scale=0.5,
        )

    return {
        block: BlockDelta(
            linears={
                path: linear(it) for path, it in span.shape(block).linears.items() if paths is None or path in paths
            }
        )
        for block in (blocks if blocks is not None else range(span.blocks.start, span.blocks.end))
    }


def hidden(count, span, seed=0):
    return torch.randn(count, span.hidden_size, generator=torch.Generator().manual_seed(seed))


def chunk(rows, pages, adapter, *, entry=0, exit=3, position=0):
    return Chunk(hidden_states=rows, position=position, pages=pages, entry=entry, exit=exit, adapter=adapter)


def test_rows_with_adapters_enter_and_leave_at_any_block(server):
    """A segment has the adapters of the chunks that are active in it."""
    span = server.span
    handles = [span.attach(random_deltas(span, seed=seed)) for seed in (1, 2)]
    ways = [(0, 3, handles[0]), (1, 3, handles[1]), (0, 2, -1), (1, 2, handles[0]), (2, 3, handles[1])]
    rows = [hidden(5, span, seed) for seed in range(len(ways))]
    alone = [span.run([chunk(it, [0], handle, entry=start, exit=end)])[0]
             for it, (start, end, handle) in zip(rows, ways, strict=True)]  # fmt: skip
    together = span.run([chunk(it, [n], handle, entry=start, exit=end)
                         for n, (it, (start, end, handle)) in enumerate(zip(rows, ways, strict=True))])  # fmt: skip
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    for handle in handles:
        span.detach(handle)


@pytest.mark.parametrize("paged", [False, True])
def test_an_adapter_full_of_nan_disturbs_nobody_else(server, paged):
    """Other rows of the batch, and whoever gets its pages afterwards, see nothing of it."""
    span = server.span
    good = random_deltas(span, seed=1)
    bad = {block: BlockDelta(linears={path: replace(it, a_rI=it.a_rI * float("nan"), b_Or=it.b_Or * float("nan"),
                                                    output_scale_O=it.b_Or[:, 0] * float("nan"))
                                      for path, it in delta.linears.items()})
           for block, delta in random_deltas(span, seed=2).items()}  # fmt: skip
    pages = list(range(100, 120)) if paged else None
    mine, other = span.attach(good, pages), span.attach(bad, list(range(120, 140)) if paged else None)
    rows = [hidden(4, span, 1), hidden(3, span, 2), hidden(2, span, 3)]
    expected = [
        span.run([chunk(it, [n], handle)])[0] for n, (it, handle) in enumerate(zip(rows, (mine, -1, mine), strict=True))
    ]
    got = span.run([chunk(rows[0], [0], mine), chunk(hidden(6, span, 4), [3], other), chunk(rows[1], [1], -1),
                    chunk(rows[2], [2], mine)])  # fmt: skip
    assert got[1].isnan().any()
    for output, wanted in zip((got[0], got[2], got[3]), expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-4)
    span.detach(other)
    if paged:
        torch.testing.assert_close(span.run([chunk(rows[0], [125], mine)])[0], expected[0], atol=2e-5, rtol=1e-4)
    span.detach(mine)


def test_a_step_without_adapters_runs_what_it_ran_before(server):
    """No product's forward is replaced then, and the numbers are the same to the bit."""
    span = server.span
    products = [site.product for block in span._loaded for site in block.sites]
    rows = hidden(5, span)
    before = span.run([chunk(rows, [0], -1)])[0]
    handle = span.attach(random_deltas(span))
    span.run([chunk(rows, [0], handle)])
    assert all("forward" in product.__dict__ for product in products)
    assert torch.equal(span.run([chunk(rows, [0], -1)])[0], before)
    assert not any("forward" in product.__dict__ for product in products)
    span.detach(handle)


def test_pages_and_memory_of_its_own_give_the_same(server):
    """Scattered pages, one run of pages, no pages: where rank rows lie changes nothing."""
    span, deltas = server.span, random_deltas(server.span, rank=7)
    rows = hidden(5, span)
    own = span.attach(deltas)
    scattered = [page for page in range(200, 400) if page % 5]
    assert span.adapter_pages(deltas, scattered) == 0
    assert span.adapter_bytes(deltas, paged=True) == 0
    assert span.adapter_bytes(deltas, paged=False) == 4 * sum(it.numel() for d in deltas.values() for it in d.tensors())
    handles = [own, span.attach(deltas, scattered), span.attach(deltas, range(10, 10 + 40))]
    results = [span.run([chunk(rows, [0], handle)])[0] for handle in handles]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for handle in handles:
        span.detach(handle)


def test_memory_of_its_own_is_used_again(server):
    """Attaching and detaching for a long time takes no more than what was attached at once."""
    span, sizes = server.span, set()
    kept = span.attach(random_deltas(span, rank=2))
    for seed in range(6):
        span.detach(span.attach(random_deltas(span, rank=5, seed=seed)))
        sizes.add(sum(kind.own.num_bytes for kind in span._adapters._kinds))
    assert len(sizes) == 1
    span.detach(kept)
    assert sum(kind.own.num_bytes for kind in span._adapters._kinds) == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(server):
    """Unknown linears, wrong shapes, too few pages, blocks and handles that aren't there."""
    span = server.span
    good = random_deltas(span)[1]
    q = good.linears["self_attn.q_proj"]
    wrong = {
        "mlp.experts.0.w1 is no linear here": {1: BlockDelta(linears={"mlp.experts.0.w1": q})},
        r"a_rI has shape \(4, 31\), expected \(4, 32\)": {
            1: BlockDelta(linears={"self_attn.q_proj": replace(q, a_rI=q.a_rI[:, :31])})
        },
        "only one of A and B": {1: BlockDelta(linears={"self_attn.q_proj": replace(q, b_Or=None)})},
        "block 3 is not among 0:3": {3: good},
        "prefix needs keys and values": {0: BlockDelta(prefix_k_PKD=torch.zeros(2, 2, 8))},
        "prefix of": {0: BlockDelta(prefix_k_PKD=torch.zeros(2, 2, 9), prefix_v_PKE=torch.zeros(2, 2, 9))},
        "prompt of": {0: BlockDelta(prompt_PH=torch.zeros(2, 31))},
        "2 virtual positions in one place, 3 in another": {
            0: BlockDelta(prompt_PH=torch.zeros(2, 32)),
            1: BlockDelta(prompt_PH=torch.zeros(3, 32)),
        },
    }  # fmt: skip
    for message, deltas in wrong.items():
        with pytest.raises(InvalidRequest, match=message):
            span.attach(deltas)
    with pytest.raises(InvalidRequest, match="1 pages have no room for the adapter, it needs"):
        span.attach({1: good}, [5])
    with pytest.raises(InvalidRequest, match="no adapter is attached as 77"):
        span.run([chunk(hidden(1, span), [0], 77)])
    with pytest.raises(InvalidRequest, match="no adapter is attached as 77"):
        span.detach(77)
    assert not any(site.used for block in span._loaded for site in block.sites)


def test_prefixes_are_refused_by_recurrent_blocks(tmp_path):
    """Rows for virtual positions would go through their state."""
    span = Server("qwen3_next", tmp_path).span
    for block in range(4):
        heads, key_width, value_width = span.shape(block).kv_shape or (2, 8, 8)
        k, v = torch.zeros(2, heads, key_width), torch.zeros(2, heads, value_width)
        with pytest.raises(InvalidRequest, match="has no attention|through recurrent states"):
            span.attach({block: BlockDelta(prefix_k_PKD=k, prefix_v_PKE=v)})


def test_deep_prompts_are_added_where_rows_enter_a_block(server):
    """Of the virtual positions only, whatever the chunks; a block's prompt is the same as other hidden states."""
    span = server.span
    prompts = [torch.randn(6, span.hidden_size) for _ in range(3)]
    handle = span.attach({block: BlockDelta(prompt_PH=it) for block, it in enumerate(prompts)})
    rows = hidden(14, span)
    expected = rows
    for block, prompt in enumerate(prompts):
        entering = torch.cat([expected[:6] + prompt, expected[6:]])
        expected = span.run([chunk(entering, [0], -1, entry=block, exit=block + 1)])[0]
    parts = [span.run([chunk(rows[:4], [1], handle), chunk(rows, [2], -1)])[0],
             span.run([chunk(rows[4:], [1], handle, position=4)])[0]]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5, rtol=1e-4)
    span.detach(handle)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "falcon-7b", "falcon-40b", "gemma3_text", "qwen3_moe", "deepseek_v3", "qwen3_next"]
)
def test_a_client_knows_the_layout_that_servers_find(name, tmp_path):
    """From the config alone: the linears that running the blocks shows, and the shape of keys and values."""
    server = Server(name, tmp_path)
    layout = model_layout(server.config)
    for block, known in enumerate(layout.blocks):
        found = server.span.shape(block)
        assert found.kv_shape == known.kv_shape
        assert dict(found.linears).items() <= dict(known.linears).items()
