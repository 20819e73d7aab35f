"""A training pass gives the same numbers whatever is kept, whoever shares it and whatever runs in between."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from swarm.adapters.delta import BlockDelta
from swarm.errors import InvalidRequest
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.blocks.training_pass import Part
from swarm.server.host_pages import HostBudget
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint

HIDDEN = 32
NUM_BLOCKS = 4
PLENTY = 1 << 30


def save(name, directory):
    model = FAMILIES[name].model().requires_grad_(False)
    model.save_pretrained(directory)
    return model, SavedCheckpoint(directory)


@pytest.fixture(scope="module")
def span(tmp_path_factory):
    """Windows, soft caps, and rope that differs by layer: four blocks that are not all alike."""
    _, checkpoint = save("gemma3_text", tmp_path_factory.mktemp("gemma3"))
    return BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=32)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    _, checkpoint = save("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))
    return BlockSpan.load(checkpoint, BlockRange(0, NUM_BLOCKS), num_pages=32)


def rows(count, seed=0):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def make_part(*lengths, seed=0, num_virtual=0, blocks=range(NUM_BLOCKS)):
    """Sequences, with prompts at every block where there are virtual positions."""
    deltas = {}
    if num_virtual:
        deltas = {block: BlockDelta(prompt_PH=rows(num_virtual, 100 * seed + block) / 4) for block in blocks}
    return Part(hidden_states=rows(sum(lengths), seed), lengths=lengths, deltas=deltas, num_virtual=num_virtual)


def drain(steps):
    return sum(1 for _ in steps)


def run(span, *parts, room=PLENTY, blocks=(0, NUM_BLOCKS), upstream=None):
    """Forth and back: the pass."""
    whole = span.training_pass(BlockRange(*blocks), parts, HostBudget(room))
    drain(whole.forward(keep=True))
    if upstream is None:
        upstream = [rows(len(output), 50 + index) for index, output in enumerate(whole.outputs)]
    drain(whole.backward(upstream))
    return whole


def bits(whole):
    """Every number that a pass has found."""
    gradients = [tensor for it in whole.gradients for own in it.deltas.values() for tensor in own]
    return [*whole.outputs, *(it.hidden_states for it in whole.gradients), *gradients]


def assert_same(found, expected, **tolerance):
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", ["span", "recurrent"])
def test_outputs_are_those_of_inference(name, request):
    """What is trained on is what is served."""
    span = request.getfixturevalue(name)
    part = make_part(20, 7, 11)
    found = run(span, part).outputs[0].split(part.lengths)
    for hidden, output in zip(part.hidden_states.split(part.lengths), found, strict=True):
        served = span.run([Chunk(hidden_states=hidden, position=0, pages=[0, 1], entry=0, exit=NUM_BLOCKS,
                                 state=span.new_state())])[0]  # fmt: skip
        torch.testing.assert_close(output, served, rtol=1e-4, atol=2e-5)


def input_bytes(*parts):
    """Of the hidden states of one block."""
    return sum(part.hidden_states.nbytes for part in parts)


@pytest.mark.parametrize("name", ["span", "recurrent"])
def test_what_is_kept_changes_no_bit(name, request):
    """Everything, some graphs, all inputs, some inputs, or the first block's inputs alone."""
    span = request.getfixturevalue(name)
    part = make_part(20, 7, 11, num_virtual=3)
    expected = bits(run(span, part))
    one = input_bytes(part)
    for room in (one, 2 * one, 4 * one, 12 * one, 40 * one):
        assert_same(bits(run(span, part, room=room)), expected)


@pytest.mark.parametrize(
    ("inputs_with_room", "backward_steps"),
    [(1000, NUM_BLOCKS), (NUM_BLOCKS, 2 * NUM_BLOCKS), (1, 2 * NUM_BLOCKS + NUM_BLOCKS - 1)],
)
def test_a_block_is_run_again_once_at_most_where_its_input_is_kept(span, inputs_with_room, backward_steps):
    """Not at all with all graphs, once with all inputs, and once more to find inputs that are not kept."""
    part = make_part(20, 7)
    whole = span.training_pass(span.blocks, [part], HostBudget(inputs_with_room * input_bytes(part)))
    assert drain(whole.forward(keep=True)) == NUM_BLOCKS
    assert drain(whole.backward([rows(27)])) == backward_steps


def test_memory_is_counted_and_given_back(span):
    """After the way back, and after a release, the budget is what it was; graphs never go beyond it."""
    part = make_part(20, 7, num_virtual=2)
    for room in (0, input_bytes(part) - 1, input_bytes(part), 5 * input_bytes(part), PLENTY):
        for ending in ("backward", "release"):
            budget = HostBudget(room)
            whole = span.training_pass(span.blocks, [part], budget)
            drain(whole.forward(keep=True))
            assert whole.num_bytes == budget.used <= room
            assert whole.is_kept == (room >= input_bytes(part))
            if ending == "backward" and whole.is_kept:
                drain(whole.backward([rows(27)]))
            whole.release()
            assert budget.used == 0


def test_a_pass_of_which_nothing_is_kept_goes_forth_only(span):
    """Evaluation keeps nothing, and says so when gradients are asked."""
    budget = HostBudget(PLENTY)
    whole = span.training_pass(span.blocks, [make_part(9)], budget)
    drain(whole.forward(keep=False))
    assert budget.used == 0 and whole.outputs[0].shape == (9, HIDDEN)
    with pytest.raises(InvalidRequest, match="nothing is kept"):
        next(whole.backward([rows(9)]))


@pytest.mark.parametrize("name", ["span", "recurrent"])
def test_others_may_use_the_device_between_blocks(name, request):
    """A pass that rests after every block, while inference and another pass run, finds the same bits."""
    span = request.getfixturevalue(name)
    parts = make_part(20, 7, num_virtual=3), make_part(13, seed=1)
    expected = [bits(run(span, part, room=4 * input_bytes(part))) for part in parts]
    budgets = [HostBudget(4 * input_bytes(part)) for part in parts]
    passes = [span.training_pass(span.blocks, [part], budget) for part, budget in zip(parts, budgets, strict=True)]
    served = []

    def decode():
        position = len(served)
        token = Chunk(hidden_states=rows(1, position), position=position, pages=[0, 1, 2, 3], entry=0, exit=NUM_BLOCKS,
                      state=state)  # fmt: skip
        served.append(span.run([token])[0])

    def take_turns(steps):
        while steps:
            steps = [step for step in steps if next(step, "over") != "over"]
            decode()

    state = span.new_state()
    take_turns([it.forward(keep=True) for it in passes])
    take_turns([it.backward([rows(len(it.outputs[0]), 50)]) for it in passes])
    for whole, right in zip(passes, expected, strict=True):
        assert_same(bits(whole), right)
    state, busy = span.new_state(), list(served)
    served.clear()
    for _ in busy:
        decode()
    assert_same(busy, served)


tenants = st.lists(
    st.tuples(st.lists(st.integers(3, 30), min_size=1, max_size=3), st.sampled_from([0, 3])), min_size=1, max_size=4
)


@settings(max_examples=15)
@given(tenants=tenants, inputs_with_room=st.integers(1, 40), entry=st.integers(0, 2))
def test_each_tenant_of_a_pass_gets_its_own_numbers(span, tenants, inputs_with_room, entry):
    """Several tenants with prompts of their own share a pass through any of the blocks."""
    parts = [make_part(*lengths, seed=seed, num_virtual=count) for seed, (lengths, count) in enumerate(tenants)]
    upstream = [rows(sum(part.lengths), 50 + index) for index, part in enumerate(parts)]
    blocks = (entry, NUM_BLOCKS)
    together = run(span, *parts, room=inputs_with_room * input_bytes(*parts), blocks=blocks, upstream=upstream)
    for index, part in enumerate(parts):
        alone = run(span, part, blocks=blocks, upstream=[upstream[index]])
        assert set(together.gradients[index].deltas) == set(part.deltas) - set(range(entry))
        found = [together.outputs[index], together.gradients[index].hidden_states]
        found += [tensor for own in together.gradients[index].deltas.values() for tensor in own]
        assert_same(found, bits(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["span", "recurrent"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_hostile_tenant_harms_nobody_else(name, value, request):
    """Numbers that are not finite, forth and back, stay with whoever sent them."""
    span = request.getfixturevalue(name)
    good, bad = make_part(20, 7, num_virtual=3), make_part(9, seed=1, num_virtual=3)
    upstream = [rows(27, 50), torch.full((9, HIDDEN), value)]
    alone = run(span, good, upstream=upstream[:1])
    bad.hidden_states[4] = value
    together = run(span, bad, good, upstream=upstream[::-1])
    found = [together.outputs[1], together.gradients[1].hidden_states]
    found += [tensor for own in together.gradients[1].deltas.values() for tensor in own]
    assert_same(found, bits(alone), rtol=1e-4, atol=1e-4)


def test_a_prefix_of_keys_and_values_is_that_of_transformers(tmp_path):
    """Prefix tuning: gradients of keys and values that stand before every sequence, in all blocks."""
    model, checkpoint = save("llama", tmp_path)
    span = BlockSpan.load(checkpoint, BlockRange(0, 3), num_pages=4)
    generator = torch.Generator().manual_seed(0)
    heads, width, count = model.config.num_key_value_heads, model.config.head_dim, 5
    prefixes = torch.randn(3, 2, count, heads, width, generator=generator)
    ids, upstream = torch.randint(3, 90, (2, 11), generator=generator), rows(22, 7)

    def through_transformers():
        leaf = prefixes.clone().requires_grad_()
        cache = DynamicCache()
        for block, (keys, values) in enumerate(leaf):
            cache.update(*(it.transpose(0, 1).expand(2, -1, -1, -1) for it in (keys, values)), block)
        seen = []
        hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
        model(ids, past_key_values=cache, attention_mask=torch.ones(2, count + 11))
        hook.remove()
        output = seen[0].reshape(22, -1)
        return output, torch.autograd.grad((output * upstream).sum(), leaf)[0]

    embedded = torch.cat([torch.zeros(2, count, HIDDEN), model.model.embed_tokens(ids)], 1).reshape(-1, HIDDEN)
    deltas = {
        block: BlockDelta(prefix_k_PKD=keys, prefix_v_PKE=values) for block, (keys, values) in enumerate(prefixes)
    }
    part = Part(hidden_states=embedded, lengths=(count + 11,) * 2, deltas=deltas, num_virtual=count)
    padded = torch.cat([torch.zeros(2, count, HIDDEN), upstream.view(2, 11, -1)], 1).reshape(-1, HIDDEN)
    whole = run(span, part, blocks=(0, 3), upstream=[padded])
    output, gradient = through_transformers()
    ours = whole.outputs[0].view(2, count + 11, -1)[:, count:].reshape(22, -1)
    torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
    found = torch.stack([torch.stack(whole.gradients[0].deltas[block]) for block in range(3)])
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("format", "error"), [("int8", 0.05), ("nf4", 0.4)])
def test_gradients_through_quantised_blocks_are_near_those_of_the_original(format, error, tmp_path):
    """What makes training inside 8-bit and 4-bit blocks possible."""
    _, checkpoint = save("llama", tmp_path)
    spans = [BlockSpan.load(checkpoint, BlockRange(0, 3), num_pages=1, quantization=it) for it in ("none", format)]
    part = make_part(20, 12, num_virtual=3, blocks=range(3))
    exact, rounded = (bits(run(span, part, blocks=(0, 3))) for span in spans)
    for ours, right in zip(rounded, exact, strict=True):
        assert (ours - right).norm() < error * right.norm()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Part(hidden_states=rows(5), lengths=()), "sequences of"),
        (Part(hidden_states=rows(5), lengths=(5, 0)), "need at least 1"),
        (Part(hidden_states=rows(5), lengths=(5,), num_virtual=6), "need at least 6"),
        (Part(hidden_states=rows(5), lengths=(6,)), "expected \\(6, 32\\)"),
        (Part(hidden_states=torch.zeros(5, 31), lengths=(5,)), "expected \\(5, 32\\)"),
        (Part(hidden_states=rows(5), lengths=(5,), num_virtual=2, deltas={1: BlockDelta(prompt_PH=rows(3))}),
         "block 1: prompt_PH has 3 positions, the adapter has 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(span, part, reason):
    """Shapes, lengths and prompts, with both numbers."""
    with pytest.raises(InvalidRequest, match=reason):
        span.training_pass(span.blocks, [part], HostBudget(PLENTY))


def test_blocks_of_others_are_refused(span):
    """A pass stays within the span."""
    with pytest.raises(InvalidRequest, match="0:5 are outside this span, 0:4"):
        span.training_pass(BlockRange(0, 5), [make_part(4)], HostBudget(PLENTY))
