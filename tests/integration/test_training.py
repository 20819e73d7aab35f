"""Training through real servers: the gradients of local autograd, whatever is lost on the way."""

import asyncio
import threading

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.model import distribute
from swarm.errors import InvalidRequest, PeerError
from swarm.protocol import TRAIN_SERVICE, DType, OpenTraining, TensorSpec, TrainBackward, TrainForward, TrainOutputs
from swarm.server.host_pages import HostBudget
from tests.integration.conftest import HIDDEN, NUM_BLOCKS, LocalSwarm, closing

COUNT = 4
"""Tokens of a deep prompt."""


@pytest.fixture
def trainer(swarm: LocalSwarm):
    """A distributed model over the swarm."""
    with closing(swarm.connect()) as service:
        yield distribute(resolve(str(swarm.model)), service, dtype=torch.float32)


def make_batch(rows=6, columns=40, seed=0):
    """Rows of different lengths, padded on the right; enough tokens for several micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, columns - 3 * row :] = 0
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def make_prompts():
    return torch.randn(NUM_BLOCKS, COUNT, HIDDEN, generator=torch.Generator().manual_seed(1)) / 4


def local_loss(model, batch, prompts):
    """The loss with prompts at every block, by plain transformers."""

    def enter(index):
        def add(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :COUNT] + prompts[index], hidden[:, COUNT:]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return add

    hooks = [
        layer.register_forward_pre_hook(enter(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        return model(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()


def remote_loss(model, batch, prompts):
    """The same, with the blocks elsewhere and the rest here."""
    hidden = model.get_input_embeddings()(batch["input_ids"])
    hidden = model.blocks(hidden, attention_mask=batch["attention_mask"], prompts=prompts)
    logits = model.lm_head(model.model.norm(hidden))
    return model.loss_function(logits, batch["labels"], vocab_size=model.config.vocab_size)


def local_gradients(local_model, batch):
    """Loss, gradients of the embeddings, gradients of the prompts."""
    local_model.requires_grad_(False)
    prompts, weight = make_prompts().requires_grad_(), local_model.get_input_embeddings().weight
    weight.requires_grad_()
    loss = local_loss(local_model, batch, prompts)
    found = torch.autograd.grad(loss, [weight, prompts])
    local_model.requires_grad_(False)
    return [loss.detach(), *found]


def remote_gradients(model, batch, between=lambda: None):
    prompts, weight = make_prompts().requires_grad_(), model.get_input_embeddings().weight
    weight.requires_grad_()
    loss = remote_loss(model, batch, prompts)
    between()
    found = torch.autograd.grad(loss, [weight, prompts])
    weight.requires_grad_(False)
    return [loss.detach(), *found]


def assert_near(found, expected):
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).abs().max() <= 1e-4 * right.abs().max()


def training_of(model):
    remote = model.blocks
    return remote._remote.trained(remote.blocks).training.remote


def test_gradients_are_those_of_local_autograd(trainer, local_model):
    """Embeddings and prompts at every block, through two servers, in several micro-batches."""
    batch = make_batch()
    assert_near(remote_gradients(trainer, batch), local_gradients(local_model, batch))
    remote = training_of(trainer)
    assert len(remote.route) == 2 and remote.num_chains == 1 and remote.pipeline.num_restarts == 0


def test_the_loss_of_the_model_itself_goes_back(trainer, local_model):
    """`model(input_ids, labels=...).loss.backward()`."""
    batch = make_batch(seed=3)
    gradients = []
    for model in (trainer, local_model):
        model.requires_grad_(False)
        weight = model.get_input_embeddings().weight.requires_grad_()
        weight.grad = None
        model(**batch).loss.backward()
        gradients.append(weight.grad)
        weight.grad = None
        model.requires_grad_(False)
    assert_near(gradients[:1], gradients[1:])


def test_modules_of_ones_own_between_slices_are_trained(trainer, local_model):
    """A linear between blocks 2 and 3 gets the gradient that it would get at home."""
    hidden = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(4))
    own = torch.nn.Linear(HIDDEN, HIDDEN)
    trainer.blocks[3:](own(trainer.blocks[:3](hidden))).square().sum().backward()
    found = [parameter.grad.clone() for parameter in own.parameters()]
    own.zero_grad()
    layers, positions = local_model.model.layers, torch.arange(9)[None]
    ropes = local_model.model.rotary_emb(hidden, positions)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    x = hidden
    for index, layer in enumerate(layers):
        x = layer(own(x) if index == 3 else x, position_embeddings=ropes, position_ids=positions, attention_mask=mask)
    x.square().sum().backward()
    assert_near(found, [parameter.grad for parameter in own.parameters()])


@pytest.mark.parametrize("moment", ["between forward and backward", "before forward"])
@pytest.mark.parametrize("politely", [True, False])
def test_a_lost_server_changes_no_bit(moment, politely, make_swarm):
    """What it held is done again elsewhere, and counts once."""
    swarm = make_swarm("0:3", "3:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        expected = remote_gradients(model, batch)
        victim = swarm.servers[1]
        swarm.add_server("2:6")

        def lose():
            swarm.remove_server(victim, politely=politely)

        if moment == "before forward":
            lose()
        found = remote_gradients(model, batch, lose if moment != "before forward" else lambda: None)
        assert training_of(model).num_chains == 2
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_a_server_that_comes_too_late_ends_the_wait(make_swarm):
    """Without the blocks, patience ends with an error, and the next attempt with the blocks succeeds."""
    swarm = make_swarm("0:3")
    with closing(swarm.connect(max_wait_s=0.5)) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        with pytest.raises(Exception, match="no server holds blocks 3:6"):
            remote_gradients(model, make_batch())
        swarm.add_server("3:6")
        assert torch.isfinite(remote_gradients(model, make_batch())[0])


def test_without_memory_nothing_is_kept_and_all_is_right(make_swarm, local_model):
    """Micro-batches that a server could not keep go forth again, a few at a time, when their gradients are there."""
    swarm = make_swarm("0:6")
    trainer = swarm.servers[0].executor.trainer
    trainer.budget = HostBudget(2 * 40 * HIDDEN * 4)  # the inputs of two of six rows
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        batch["attention_mask"][:] = 1
        training_of(model)
        found = remote_gradients(model, batch)
        assert_near(found, local_gradients(local_model, batch))
        assert training_of(model).pipeline.num_restarts > 0


def test_a_client_that_leaves_leaves_nothing(make_swarm):
    """Whatever was kept for it is given back."""
    swarm = make_swarm("0:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        prompts = make_prompts().requires_grad_()
        loss = remote_loss(model, make_batch(), prompts)
        assert held(swarm) > 0
        del loss, model
    swarm.loop.run(eventually(lambda: held_now(swarm) == 0))


def held_now(swarm):
    return swarm.servers[0].executor.trainer.budget.used


def held(swarm):
    done = threading.Event()
    swarm.servers[0].executor.train(lambda trainer: done.set())
    assert done.wait(10)
    return held_now(swarm)


async def eventually(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_gradients_that_are_not_finite_are_refused_and_the_server_lives(trainer, swarm):
    """The error names what was wrong, and the same model goes on."""
    hidden = torch.randn(1, 5, HIDDEN).requires_grad_()
    with pytest.raises(InvalidRequest, match="gradients have numbers that are not finite"):
        trainer.blocks(hidden).backward(torch.full((1, 5, HIDDEN), float("nan")))
    trainer.blocks(hidden).sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_sequences_beyond_the_models_context_are_refused(trainer):
    """With both numbers."""
    hidden = torch.zeros(1, 513, HIDDEN).requires_grad_()
    with pytest.raises(InvalidRequest, match="513 tokens, limits 1 and 512"):
        trainer.blocks(hidden)


def forward(number, tokens=3, **fields):
    spec = TensorSpec(DType.FLOAT32, (tokens, HIDDEN))
    given = {"micro_batch": number, "version": -1, "num_tokens": (tokens,), "keep": True, "hidden_states": spec}
    return TrainForward(**{**given, **fields}), bytes(spec.num_bytes)


HOSTILE = [
    ([forward(0), forward(0)], "numbers ascend"),
    ([forward(0, version=3)], "version 3 of the parameters is stale"),
    ([forward(0, num_tokens=(2,))], r"hidden_states of shape \(3, 64\), expected \(2, 64\)"),
    ([forward(0, num_tokens=(3, 0))], "sequences of 0 to 3 tokens"),
    ([(forward(0)[0], b"short")], "tensor body of 5 bytes, 768 declared"),
    ([(TrainBackward(micro_batch=0, gradients=TensorSpec(DType.FLOAT32, (3, HIDDEN))), bytes(768))], "not been sent"),
    ([(OpenTraining(model="a" * 64, start=0, end=1), b"")], "expected a message of training"),
]


@pytest.mark.parametrize(("messages", "reason"), HOSTILE)
def test_hostile_messages_end_their_run_with_the_reason(messages, reason, swarm):
    """Checked before anything is allocated or run; the server goes on."""
    with closing(swarm.connect()) as service:

        async def talk():
            peer_id = swarm.servers[0].node.peer_id
            async with asyncio.timeout(20):
                async with await service._transport.open(peer_id, TRAIN_SERVICE, timeout_s=10) as stream:
                    await stream.send(OpenTraining(model=resolve(str(swarm.model)).digest, start=0, end=3))
                    await stream.receive()
                    for message, body in messages:
                        await stream.send(message, body)
                    while True:
                        answer, _ = await stream.receive()
                        assert isinstance(answer, TrainOutputs)

        with pytest.raises((InvalidRequest, PeerError), match=reason):
            service._loop.run(talk(), 30)


def test_generation_goes_on_beside_training(trainer, swarm, local_model):
    """Tokens are the same to the letter while another thread trains."""
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = local_model.generate(ids, max_new_tokens=12, do_sample=False)
    errors = []

    def train():
        try:
            for seed in range(3):
                remote_gradients(trainer, make_batch(seed=seed))
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        found = model.generate(ids, max_new_tokens=12, do_sample=False)
    thread.join(60)
    assert torch.equal(found, expected) and not errors


def test_tenants_share_servers(swarm, local_model):
    """Four clients train at once, each with prompts and a batch of its own, and get their own gradients."""
    batches = [make_batch(rows=2, columns=12 + index, seed=index) for index in range(4)]
    expected = [local_gradients(local_model, batch) for batch in batches]
    found = [None] * 4

    def train(index):
        with closing(swarm.connect()) as service:
            model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
            for _ in range(3):
                found[index] = remote_gradients(model, batches[index])

    threads = [threading.Thread(target=train, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for ours, right in zip(found, expected, strict=True):
        assert_near(ours, right)
