"""Training through real servers: the gradients of local autograd, beside other tenants and inference."""

import asyncio
import threading

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.checkpoint.source import resolve
from swarm.client.model import distribute
from swarm.client.remote_blocks import run_trained
from swarm.errors import InvalidRequest, PeerError
from swarm.protocol import (
    TRAIN_SERVICE,
    DType,
    OpenTraining,
    TensorSpec,
    TrainBackward,
    TrainForward,
    TrainLink,
    TrainLinked,
    TrainOutputs,
    TrainParameters,
)
from tests.integration.conftest import HIDDEN, LocalSwarm, closing
from tests.integration.training_job import assert_near, local_gradients, make_batch, remote_gradients, training_of


@pytest.fixture
def trainer(swarm: LocalSwarm):
    """A distributed model over the swarm."""
    with closing(swarm.connect()) as service:
        yield distribute(resolve(str(swarm.model)), service, dtype=torch.float32)


def test_gradients_are_those_of_local_autograd(trainer, local_model):
    """Embeddings and prompts at every block, through two servers, in several micro-batches."""
    batch = make_batch()
    assert_near(remote_gradients(trainer, batch), local_gradients(local_model, batch))
    remote = training_of(trainer)
    assert len(remote.route) in (2, 3)  # at random, over three servers that overlap
    assert remote.num_chains == 1 and remote.pipeline.num_restarts == 0


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


SPEC = TensorSpec(DType.FLOAT32, (3, HIDDEN))
HOSTILE = [
    ([forward(0), forward(0)], "numbers ascend"),
    ([forward(0, version=3)], "version 3 of the parameters is stale"),
    ([forward(0, num_tokens=(2,))], r"hidden_states of shape \(3, 64\), expected \(2, 64\)"),
    ([forward(0, num_tokens=(3, 0))], "sequences of 0 to 3 tokens"),
    ([(forward(0)[0], b"short")], "tensor body of 5 bytes, 768 declared"),
    ([(TrainBackward(micro_batch=0, gradients=SPEC, wants_inputs=True), bytes(768))], "not been sent"),
    ([(TrainLink(peer_id="nobody", push_key=bytes(16)), b"")] * 2, "a second TrainLink"),
    ([(TrainParameters(base=3, version=4, digest="a" * 64, manifest_bytes=1), b"x")], "has hash"),
    ([(OpenTraining(push_key=bytes(16), model="a" * 64, start=0, end=1), b"")], "expected a message of training"),
]


def test_lora_inside_remote_blocks_is_trained(trainer, local_model):
    """Matrices that stay with the client get the gradients of local autograd; a step makes a new version of them."""
    generator = torch.Generator().manual_seed(3)
    hidden, ahead = (torch.randn(2, 9, HIDDEN, generator=generator) for _ in range(2))
    path, layers = "self_attn.q_proj", local_model.model.layers
    pairs = [[torch.randn(4, HIDDEN, generator=generator) / 8, torch.zeros(HIDDEN, 4)] for _ in layers]
    deltas = {
        block: BlockDelta(linears={path: LinearDelta(a_rI=a.requires_grad_(), b_Or=b.requires_grad_(), scale=2.0)})
        for block, (a, b) in enumerate(pairs)
    }
    tensors = [tensor for pair in pairs for tensor in pair]

    def local():
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(lambda _, args, y, a=a, b=b: y + 2 * args[0] @ a.t() @ b.t())
            for layer, (a, b) in zip(layers, pairs, strict=True)
        ]
        ropes = local_model.model.rotary_emb(hidden, torch.arange(9)[None])
        mask, x = torch.full((9, 9), float("-inf")).triu(1)[None, None], hidden
        for layer in layers:
            x = layer(x, position_embeddings=ropes, attention_mask=mask)
        for hook in hooks:
            hook.remove()
        return torch.autograd.grad((x * ahead).sum(), tensors)

    trained = trainer.blocks._remote.trained(trainer.blocks.blocks)
    for _ in range(3):
        found = torch.autograd.grad((run_trained(trained, hidden, deltas=deltas) * ahead).sum(), tensors)
        assert_near([torch.cat([it.flatten() for it in found])], [torch.cat([it.flatten() for it in local()])])
        with torch.no_grad():
            for tensor, gradient in zip(tensors, found, strict=True):
                tensor -= 1e-3 * gradient


def test_servers_send_to_each_other(make_swarm):
    """The client sends and gets hidden states once each way, whatever the number of hops, and the same comes out."""
    swarm = make_swarm("0:2", "2:4", "4:6")
    batch, traffic, results = make_batch(), {}, {}
    for push in (True, False):
        with closing(swarm.connect(push=push)) as service:
            model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
            results[push] = remote_gradients(model, batch)
            remote = training_of(model)
            assert remote.pipeline.links == ({0, 1} if push else frozenset()) and remote.num_chains == 1
            traffic[push] = remote.bytes_sent, remote.bytes_received
    assert all(torch.equal(ours, other) for ours, other in zip(results[True], results[False], strict=True))
    hidden_states = 4 * HIDDEN * int(batch["attention_mask"].sum())
    assert traffic[True][0] < 2.5 * hidden_states and traffic[False][0] > 6 * hidden_states
    assert traffic[True][1] < 2.5 * hidden_states and traffic[False][1] > 6 * hidden_states


def test_gradients_of_inputs_that_nobody_wants_are_not_sent(trainer):
    """As when only what is inside the blocks is trained."""
    remote, hidden = training_of(trainer), torch.randn(1, 30, HIDDEN)
    prompts = torch.zeros(len(trainer.blocks), 2, HIDDEN).requires_grad_()
    received = []
    for wanted in (True, False):
        before = remote.bytes_received
        trainer.blocks(hidden.requires_grad_(wanted), prompts=prompts).sum().backward()
        received.append(remote.bytes_received - before)
    assert received[0] - received[1] == hidden.nbytes


def test_of_a_new_version_the_difference_is_sent(trainer, swarm):
    """Exactly: the next outputs are those of a run that gets the new version whole."""
    hidden = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(5))
    prompts = torch.randn(len(trainer.blocks), 3, HIDDEN, generator=torch.Generator().manual_seed(6)).requires_grad_()
    remote, sent = training_of(trainer), []
    for _ in range(3):
        before = remote.bytes_sent
        outputs = trainer.blocks(hidden, prompts=prompts)
        sent.append(remote.bytes_sent - before)
        with torch.no_grad():
            prompts *= 1.001
    assert sent[1] - hidden.nbytes < 0.7 * (sent[0] - hidden.nbytes) and sent[2] < sent[0]
    assert len(remote._parameters) <= 2  # what is trained, and what it was before
    with closing(swarm.connect()) as service:
        other = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        assert torch.equal(other.blocks(hidden, prompts=prompts / 1.001), outputs)


@pytest.mark.parametrize(("messages", "reason"), HOSTILE)
def test_hostile_messages_end_their_run_with_the_reason(messages, reason, swarm):
    """Checked before anything is allocated or run; the server goes on."""
    with closing(swarm.connect()) as service:

        async def talk():
            peer_id = swarm.servers[0].node.peer_id
            async with asyncio.timeout(20):
                async with await service._transport.open(peer_id, TRAIN_SERVICE, timeout_s=10) as stream:
                    await stream.send(
                        OpenTraining(push_key=bytes(16), model=resolve(str(swarm.model)).digest, start=0, end=3)
                    )
                    await stream.receive()
                    for message, body in messages:
                        await stream.send(message, body)
                    while True:
                        answer, _ = await stream.receive()
                        assert isinstance(answer, TrainOutputs | TrainLinked)

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
