"""`loss.backward()` through remote blocks gives the gradients of plain transformers, and leaves nothing behind."""

import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from swarm.client.autograd import TrainedBlocks
from swarm.client.remote_blocks import run_trained
from swarm.client.train_log import route_of
from swarm.errors import InvalidRequest
from swarm.types import BlockRange, Hop
from tests.client.conftest import Pair

FAMILIES = ("llama", "gemma2", "gpt2", "bloom", "falcon-7b", "opt", "qwen3_moe", "gpt_oss")


def batch(padding: str) -> dict[str, torch.Tensor]:
    """Three rows of nine columns, two of them padded."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in ((0, 4), (2, 1)):
        mask[row, slice(0, count) if padding == "left" else slice(9 - count, 9)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for row, count in ((0, 4), (2, 1)):
        if padding == "left":
            labels[row, count] = -100  # it would be predicted from padding, which is never sent
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, inputs):
    """The loss, and the gradients of everything between the tokens and the blocks, and of the head."""
    model.requires_grad_(False)
    trained = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not trained[0]:
        trained.append(head.weight)
    for weight in trained:
        weight.requires_grad_()
    try:
        loss = model(**inputs).loss
        return loss.detach(), torch.autograd.grad(loss, trained)
    finally:
        model.requires_grad_(False)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_transformers(name, padding, make_pair: Callable[[str], Pair]):
    """Padded batches with labels: the padding is never sent, and counts for nothing."""
    pair, inputs = make_pair(name), batch(padding)
    expected, wanted = loss_and_gradients(pair.local, inputs)
    found, gradients = loss_and_gradients(pair.distributed, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


def embedded(pair: Pair) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8]])
    return pair.local.get_input_embeddings()(ids).detach().requires_grad_()


def training_of(pair: Pair):
    remote = pair.distributed.blocks
    return remote._remote.trained(remote.blocks).training


def test_without_gradients_a_session_runs_it(pair: Pair):
    """Evaluation is inference."""
    before = training_of(pair).num_calls
    with torch.no_grad():
        pair.distributed(inputs_embeds=embedded(pair))
    pair.distributed(inputs_embeds=embedded(pair).detach())
    assert training_of(pair).num_calls == before and len(pair.service.steps) == 2


def test_a_graph_that_is_gone_is_told(pair: Pair):
    """With or without a way back, the servers learn that nobody will come (again)."""
    training = training_of(pair)
    training.dropped.clear()
    loss = pair.distributed(inputs_embeds=embedded(pair)).logits.sum()
    assert not training.dropped
    del loss
    gc.collect()
    assert len(training.dropped) == 1
    pair.distributed(inputs_embeds=embedded(pair)).logits.sum().backward()
    gc.collect()
    assert len(training.dropped) == 2


def test_a_graph_may_be_gone_through_twice(pair: Pair):
    """As torch allows with retain_graph."""
    inputs = embedded(pair)
    loss = pair.distributed(inputs_embeds=inputs).logits.square().sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0


def test_what_does_not_fit_is_refused(pair: Pair):
    """Sessions have no gradients, every row needs a token, and prompts must fit blocks and rows."""
    blocks, hidden = pair.distributed.blocks, embedded(pair)
    width, count = hidden.shape[-1], len(blocks)
    with pair.distributed.inference_session(max_length=8) as session, pytest.raises(InvalidRequest, match="a session"):
        pair.distributed(inputs_embeds=hidden, past_key_values=session)
    with pytest.raises(InvalidRequest, match="row 0 has 0 tokens, need 1"):
        blocks(hidden, attention_mask=torch.zeros(1, 4))
    with pytest.raises(InvalidRequest, match=r"attention_mask is \(1, 5\), need \(1, 4\)"):
        blocks(hidden, attention_mask=torch.ones(1, 5))
    with pytest.raises(InvalidRequest, match=rf"prompts have shape \(1, 2, {width}\), need \({count}, P, {width}\)"):
        blocks(hidden, prompts=torch.zeros(1, 2, width))
    with pytest.raises(InvalidRequest, match="row 0 has 4 tokens, need 5"):
        blocks(hidden, prompts=torch.zeros(count, 5, width))


def test_virtual_positions_and_several_sequences_in_a_row_exclude_each_other(pair: Pair):
    """They would stand at the wrong place of all sequences but the first."""
    trained, positions = pair.distributed.blocks._remote.trained(BlockRange(0, 3)), torch.arange(2).repeat(2)[None]
    with pytest.raises(InvalidRequest, match="several sequences can't begin with 2 virtual positions"):
        run_trained(trained, embedded(pair), num_virtual=2, positions=positions)


def test_the_route_of_training_has_the_names_of_its_servers(pair: Pair):
    """Nobody before the first use; peer ids where the service knows no names."""
    assert pair.distributed.training_route == ()
    hops = (Hop(peer_id="ann", blocks=BlockRange(0, 2)), Hop(peer_id="bob", blocks=BlockRange(2, 3)))
    training_of(pair).route = hops
    assert pair.distributed.training_route == (("ann", hops[0]), ("bob", hops[1]))
    assert route_of(SimpleNamespace(get_base_model=lambda: pair.distributed)) == "ann 0:2 > bob 2:3"
    training_of(pair).route = ()


def test_slices_count_like_lists(pair: Pair):
    """From either end, and of slices."""
    blocks = pair.distributed.blocks
    assert [str(it.blocks) for it in (blocks, blocks[1:], blocks[:-1], blocks[1:][0], blocks[-1])] == [
        "0:3", "1:3", "0:2", "1:2", "2:3",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        blocks[3]
    for wrong in (slice(None, None, 2), slice(2, 2)):
        with pytest.raises(InvalidRequest):
            blocks[wrong]


def test_a_graph_that_ends_in_a_garbage_collection_hangs_nobody():
    """The collection may come while the same thread takes a new version of the parameters."""
    forgotten: list[int] = []
    training = SimpleNamespace(drop=lambda call: None, forget=forgotten.append)
    blocks = TrainedBlocks(training, num_blocks=1, hidden_size=2)
    parameters = SimpleNamespace(version=0)
    blocks.use(parameters)
    with blocks._lock:
        blocks.unuse(None, parameters)
    assert forgotten == [0]
