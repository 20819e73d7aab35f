"""Four verbs over real servers: the numbers of a local loop, a policy that follows its reward, exact states."""

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed

from swarm.checkpoint.source import resolve
from swarm.client.model import distribute
from swarm.client.peft_model import get_peft_model
from swarm.client.training_client import AdamParams, Datum, TrainingClient
from swarm.errors import InvalidRequest
from tests.integration.conftest import LocalSwarm, closing

DATA = [Datum(tokens=[5, 6, 7, 8, 9], weights=[0, 0, 1, 1, 0.5]), Datum(tokens=[10, 11, 12])]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
STEP = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def make_client(swarm: LocalSwarm):
    """Clients with the same LoRA."""
    clients = []
    with closing(swarm.connect()) as service:

        def make() -> TrainingClient:
            base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
            set_seed(5)
            clients.append(TrainingClient(get_peft_model(base, config())))
            return clients[-1]

        yield make
        for client in clients:
            client.close()


def test_gradients_add_up_to_those_of_a_local_loop(make_client, swarm):
    """Two sequences together, or one after the other: the same steps as AdamW at home."""
    client = make_client()
    set_seed(5)
    local = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(swarm.model, dtype=torch.float32), config())
    optimizer = torch.optim.AdamW(
        [it for it in local.parameters() if it.requires_grad], lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
    )
    for number in range(3):
        calls = [client.forward_backward([datum]) for datum in DATA] if number else [client.forward_backward(DATA)]
        norm = client.optim_step(STEP).result()
        total = torch.zeros(())
        for datum in DATA:
            ids = torch.tensor([datum.tokens])
            logprobs = local(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total = total - (logprobs * torch.tensor(datum.weights or [1.0] * len(datum.tokens))[1:]).sum()
        total.backward()
        expected = torch.nn.utils.clip_grad_norm_(local.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert sum(call.result().loss for call in calls) == pytest.approx(total.item(), rel=1e-4)
        assert norm == pytest.approx(float(expected), rel=1e-3)


def test_a_policy_follows_its_reward(make_client):
    """Sampled tokens with their log-probabilities go back as they are, and become likelier where that is rewarded."""
    client = make_client()
    answers = client.sample([5, 6, 7], max_tokens=4, num_samples=3, seed=1).result()
    again = client.sample([5, 6, 7], max_tokens=4, num_samples=3, seed=1).result()
    assert answers == again and len(answers) == 3 and all(len(it.tokens) == len(it.logprobs) for it in answers)
    best = answers[0]
    datum = Datum(
        tokens=[5, 6, 7, *best.tokens],
        logprobs=[0.0] * 3 + best.logprobs,
        advantages=[0.0] * 3 + [1.0] * len(best.tokens),
    )
    first = client.forward_backward([datum], "importance_sampling").result()
    assert first.loss == pytest.approx(-len(best.tokens), rel=1e-3)  # the ratio is 1 as long as nothing was learnt
    assert first.logprobs[0][2:].tolist() == pytest.approx(best.logprobs, abs=1e-3)
    client.optim_step(STEP)
    later = client.forward_backward([datum], "ppo", clip=0.01).result()
    assert later.logprobs[0][2:].sum() > first.logprobs[0][2:].sum() and later.metrics["clipped"] > 0


class Fails(torch.autograd.Function):
    """A way back that is lost."""

    @staticmethod
    def forward(ctx, numbers):
        return numbers.clone()

    @staticmethod
    def backward(ctx, gradients):
        raise RuntimeError("lost on the way back")


def test_a_way_back_that_fails_leaves_no_gradients(make_client):
    """Half of them would be of one call and half of two; the next step says that there are none."""
    client = make_client()
    client.forward_backward(DATA).result()
    with pytest.raises(RuntimeError, match="lost on the way back"):
        client.forward_backward(DATA, lambda logprobs, data: (Fails.apply(logprobs[0]).sum(), {})).result()
    assert all(it.grad is None for it in client._parameters)
    with pytest.raises(InvalidRequest, match="there are no gradients"):
        client.optim_step(STEP).result()
    client.forward_backward(DATA).result()
    assert client.optim_step(STEP).result() > 0


def test_a_state_goes_on_exactly(make_client, tmp_path):
    """Saved after two steps, and loaded into another client: the third is the same to the bit."""
    first, second = make_client(), make_client()
    for _ in range(2):
        first.forward_backward(DATA)
        first.optim_step(STEP)
    first.save_state(tmp_path)
    first.forward_backward(DATA)
    first.optim_step(STEP).result()
    second.forward_backward(DATA)  # forgotten by load_state
    second.load_state(tmp_path)
    second.forward_backward(DATA)
    second.optim_step(STEP).result()
    assert second.num_steps == 3
    for ours, right in zip(second._parameters, first._parameters, strict=True):
        assert torch.equal(ours, right)


def test_a_loss_of_ones_own(make_client):
    """A function of the log-probabilities."""
    client = make_client()
    done = client.forward_backward(DATA, lambda logprobs, data: (logprobs[0].square().sum(), {"rows": len(data)}))
    assert done.result().metrics == {"rows": 2} and done.result().loss > 0


def test_what_does_not_fit_is_refused_by_name(make_client, tmp_path):
    """At once, or by the future."""
    client = make_client()
    with pytest.raises(InvalidRequest, match="datum 0: 1 tokens"):
        client.forward_backward([Datum(tokens=[1])])
    with pytest.raises(InvalidRequest, match="datum 0: 2 weights for 3 tokens"):
        client.forward_backward([Datum(tokens=[1, 2, 3], weights=[1, 1])])
    with pytest.raises(InvalidRequest, match="loss_fn is 'mse'"):
        client.forward_backward(DATA, "mse")
    with pytest.raises(InvalidRequest, match="no logprobs"):
        client.forward_backward(DATA, "ppo").result()
    with pytest.raises(InvalidRequest, match="there are no gradients"):
        client.optim_step().result()
    with pytest.raises(InvalidRequest, match="no optimizer.pt"):
        client.load_state(tmp_path).result()
