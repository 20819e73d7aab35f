"""The trainers that people know run unchanged, and do over remote blocks what they do on a local PEFT model."""

import math

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from swarm.checkpoint.source import resolve
from swarm.client.auto import AutoDistributedModelForSequenceClassification
from swarm.client.model import distribute
from swarm.client.peft_model import DistributedPeftModel, get_peft_model
from swarm.errors import InvalidRequest
from tests.client.conftest import tokenizer  # noqa: F401 - a fixture
from tests.integration.conftest import LocalSwarm, closing

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "seed": 3,
}

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.fixture
def service(swarm: LocalSwarm):
    """A client of two servers and a third that overlaps both."""
    with closing(swarm.connect()) as service:
        yield service


@pytest.fixture
def models(swarm: LocalSwarm, service):
    """The same LoRA, remote and local."""
    remote = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    local = AutoModelForCausalLM.from_pretrained(swarm.model, dtype=torch.float32)
    made = []
    for get, base in ((get_peft_model, remote), (peft.get_peft_model, local)):
        base.config.pad_token_id = 0
        set_seed(5)
        made.append(get(base, LoraConfig(task_type="CAUSAL_LM", **LORA)))
    return made


def losses(trainer) -> list[float]:
    """Of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found, expected, remote, local):
    """Losses and trained parameters; and something was learnt."""
    assert found == pytest.approx(expected, rel=1e-3) and found[-1] < found[0] and all(map(math.isfinite, found))
    ours = {name: it for name, it in remote.named_parameters() if it.requires_grad}
    right = {name: it for name, it in local.named_parameters() if it.requires_grad}
    assert list(ours) == list(right)
    for name, parameter in right.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-3)


def conversations(count: int = 4) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"w{index} w{index + 1}"},
            {"role": "assistant", "content": " ".join(f"w{index + it}" for it in range(3 + index))},
        ]
        for index in range(count)
    ]


def test_the_trainer_of_transformers(models, tmp_path):
    """With evaluation, and a checkpoint that is a PEFT adapter."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 120, (8,), generator=generator) for _ in range(2)]
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    found = []
    for index, model in enumerate(models):
        args = TrainingArguments(output_dir=str(tmp_path / str(index)), **COMMON)
        trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
        found.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
        trainer.save_model()
    assert_same(*found, *models)
    assert sorted(path.name for path in (tmp_path / "0").glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_sft_with_trl(models, tokenizer: PreTrainedTokenizerFast, tmp_path):  # noqa: F811
    """Chats of different lengths, padded; TRL calls the model without its head, and applies that in pieces."""
    data = Dataset.from_list([{"messages": messages} for messages in conversations()])
    found = []
    for index, model in enumerate(models):
        args = SFTConfig(output_dir=str(tmp_path / str(index)), max_length=32, **COMMON)
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        found.append(losses(trainer))
    assert_same(*found, *models)


def test_trl_may_call_peft_itself(swarm, service, tokenizer: PreTrainedTokenizerFast, tmp_path):  # noqa: F811
    """`peft_config` of a trainer: a plain PeftModel around the distributed one."""
    base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(output_dir=str(tmp_path), max_length=32, **{**COMMON, "per_device_train_batch_size": 4}),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in conversations()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    found = losses(trainer)
    assert found[-1] < found[0]
    ids = torch.tensor([[5, 6, 7]])
    trained = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    trainer.save_model()
    fresh = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    fresh.load_adapter(tmp_path, "mine")
    assert torch.equal(fresh.generate(ids, max_new_tokens=4, do_sample=False), trained)


def test_dpo_with_trl(models, tokenizer: PreTrainedTokenizerFast, tmp_path):  # noqa: F811
    """The reference is a copy of the adapter that TRL puts beside it."""
    data = Dataset.from_list(
        [
            {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "w50 w51"}]}
            for chat in conversations(2)
        ]
    )
    found = []
    for index, model in enumerate(models):
        args = DPOConfig(output_dir=str(tmp_path / str(index)), max_length=32, **COMMON)
        trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        found.append(losses(trainer))
    assert_same(*found, *models)


def classifiers(swarm: LocalSwarm, service, config):
    """A remote and a local classifier with the same head and the same adapter."""
    made = []
    for is_remote in (True, False):
        set_seed(7)
        if is_remote:
            base = AutoDistributedModelForSequenceClassification.from_pretrained(
                swarm.model, num_labels=3, block_service=service, dtype="float32"
            )
        else:
            base = AutoModelForSequenceClassification.from_pretrained(swarm.model, num_labels=3, dtype=torch.float32)
        set_seed(8)
        made.append((get_peft_model if is_remote else peft.get_peft_model)(base, config()))
    return made


CLASSIFY = {
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", **LORA),
    "prefix": lambda: PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", CLASSIFY)
def test_classification_with_a_head_of_ones_own(name, swarm, service, tmp_path):
    """The head is trained here, and saved with the adapter as PEFT does; rows are padded."""
    remote, local = classifiers(swarm, service, CLASSIFY[name])
    assert torch.equal(remote.get_base_model().score.weight, local.get_base_model().score.weight)
    data = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": 0},
        {"input_ids": [8, 9, 10, 11], "attention_mask": [1, 1, 1, 1], "labels": 2},
    ]
    found = []
    for index, model in enumerate((remote, local)):
        args = TrainingArguments(output_dir=str(tmp_path / str(index)), **COMMON)
        found.append(losses(Trainer(model=model, args=args, train_dataset=data)))
    assert_same(*found, remote, local)
    remote.save_pretrained(str(tmp_path / "mine"))
    inputs = {key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "attention_mask")}
    base = AutoModelForSequenceClassification.from_pretrained(swarm.model, num_labels=3, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "mine")).eval()
    served = DistributedPeftModel.from_pretrained(
        AutoDistributedModelForSequenceClassification.from_pretrained(
            swarm.model, num_labels=3, block_service=service, dtype="float32"
        ),
        tmp_path / "mine",
    ).eval()
    remote.eval()
    with torch.no_grad():
        logits = remote(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(served(**inputs).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_inner_model_alone_knows_masks_and_adapters(models):
    """Called without its head, as TRL does, it must not forget padding or what is trained."""
    remote, local = (model.eval() for model in models)
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = (ids != 0).long()
    with torch.no_grad():
        found = remote.get_base_model().base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = local.get_base_model().base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_labels_are_counted(swarm, service):
    """A classifier of nothing is refused."""
    with pytest.raises(InvalidRequest, match="num_labels is 0"):
        AutoDistributedModelForSequenceClassification.from_pretrained(swarm.model, num_labels=0, block_service=service)
