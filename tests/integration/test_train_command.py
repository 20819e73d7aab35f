"""`python -m swarm.client train`: an adapter out of chats, the same after an interruption, and clear errors."""

import csv
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swarm.adapters.delta import BlockDelta
from swarm.checkpoint.source import resolve
from swarm.client import __main__ as command
from swarm.client import train, train_log
from swarm.client.federated import FederatedRun
from swarm.client.model import distribute
from swarm.client.peft_model import get_peft_model
from tests.client.conftest import tokenizer  # noqa: F401 - a fixture
from tests.integration.conftest import LocalSwarm, closing

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory):
    """Six short conversations."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{index} w{index + 1}"},
                {"role": "assistant", "content": " ".join(f"w{index + it}" for it in range(3 + index))},
            ]
        }
        for index in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm, tokenizer, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """The checkpoint with a tokenizer."""
    path = shutil.copytree(swarm.model, tmp_path_factory.mktemp("model") / "model")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def service(swarm: LocalSwarm):
    """A client of two servers and a third that overlaps both."""
    with closing(swarm.connect()) as service:
        yield service


@pytest.fixture
def run(model, chats, service):
    """The command, small."""

    def run(output, *more, steps=4, rows=1):
        given = ["--data", str(chats), "--model", str(model), "--output", str(output), "--rank", "4", "--seed", "3"]
        given += ["--cache-dir", str(model.parent / "cache")]
        given += ["--batch-size", str(rows), "--max-steps", str(steps), "--save-steps", "2", "--schedule", "constant"]
        return train.main([*given, "--learning-rate", "2e-2", "--max-length", "32", *more], block_service=service)

    return run


def rows_of(output) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_adapter_is_trained_and_served(run, swarm, service, tmp_path, capsys):
    """Accumulated, packed, with evaluation: the loss falls; PEFT and the swarm read what comes out."""
    more = ["--packing", "--accumulate", "2", "--eval-rows", "2", "--eval-steps", "2"]
    assert run(tmp_path, *more, steps=6, rows=2) == 0
    rows = rows_of(tmp_path)
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 6 and min(losses) < losses[0] - 0.2  # packed rows differ
    assert [row["step"] for row in rows if row["eval_loss"]] == ["2", "4", "6"]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows if row["loss"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    bar = capsys.readouterr().err
    assert "tokens/s" in bar and "server-" in bar and "saved" in bar
    prompt = torch.tensor([[5, 6, 7]])
    local = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(swarm.model, dtype=torch.float32), str(tmp_path)
    )
    base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    base.load_adapter(tmp_path, "mine")
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = local.generate(input_ids=prompt, **greedy)
    assert torch.equal(base.generate(prompt, adapter_name="mine", **greedy), expected)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_resumed_run_gives_the_same_adapter_bit_for_bit(method, run, tmp_path, monkeypatch):
    """Ctrl-C during the third of four steps: the step is finished, saved, and gone on from."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--method", method) == 0
    step_end = train_log.RunLog.on_step_end

    def press(self, args, state, control, **more):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step_end(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train_log.RunLog, "on_step_end", press)
        assert run(parts, "--method", method) == 130
    assert train.last_checkpoint(parts).name == "checkpoint-3"
    assert [row["step"] for row in rows_of(parts)] == ["1", "2", "3"]
    assert run(parts, "--method", method, "--resume") == 0
    assert [row["step"] for row in rows_of(parts)] == ["1", "2", "3", "4"]
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (parts, whole))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_data_is_streamed(run, tmp_path):
    """No length is known; steps are."""
    assert run(tmp_path, "--streaming", "--eval-rows", "1", steps=2) == 0
    assert [row["step"] for row in rows_of(tmp_path) if row["loss"]] == ["1", "2"]


BAD = [
    ('{"messages": [{"role": "user"}]}', "line 1: messages, message 0: expected role and content"),
    ('{"text": "w1"}\n{"prompt": "w1", "completion": "w2"}', "line 2: has prompt and completion, others text"),
    ('{"text": "w1"}\nnonsense', "line 2: no JSON"),
    ('{"words": "w1"}', "line 1: has words; expected messages, prompt and completion, or text"),
    ("", "has no rows"),
]


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_bad_data_is_refused_in_one_line(text, reason, run, tmp_path, capsys):
    """With its line, before anything is loaded."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert run(tmp_path / "out", "--data", str(path)) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith("error: ") and error.count("\n") == 1


SETTINGS = [
    (["--rank", "0"], "--rank is 0, need at least 1"),
    (["--eval-rows", "-1"], "--eval-rows is -1, need at least 0"),
    (["--warmup-steps", "-3"], "--warmup-steps is -3, need at least 0"),
    (["--max-steps", "0"], "--max-steps is 0, need at least 1"),
    (["--learning-rate", "-1"], "--learning-rate is -1.0, need more than 0"),
    (["--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
    (["--method", "prefix", "--packing"], "--packing can't be had with --method prefix, only with lora and ia3"),
    (["--resume"], "has no checkpoint to resume from"),
    (["--streaming", "--max-steps", "-1"], "--streaming needs --max-steps"),
    (["--target-modules", "nowhere"], "target_modules: "),
    (["--eval-rows", "6"], "--eval-rows is 6"),
]


@pytest.mark.parametrize(("more", "reason"), SETTINGS)
def test_settings_that_cannot_work_are_refused_in_one_line(more, reason, run, tmp_path, capsys):
    """By the name of the option."""
    assert run(tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error


def test_it_is_a_word_of_the_client(capsys):
    """`swarm client train`, and what it needs first."""
    assert command.main(["train", "--data", "x.jsonl", "--output", "y"]) == 2
    assert "--initial-peers is missing" in capsys.readouterr().err


def test_the_command_trains_one_adapter_with_others(run, swarm, tmp_path, capsys):
    """One is the command, the other a loop in Python; what they have in the end is the same to the bit."""

    def train_another() -> dict[int, BlockDelta]:
        with closing(swarm.connect()) as service:
            base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(base, config)
            with FederatedRun(model, name="chats", host="127.0.0.1", timeout_s=60.0) as other:
                assert all(other.round(10).took_part for _ in range(2))
                return other.current()

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(train_another)
        more = ["--federated", "chats", "--rounds", "2", "--local-steps", "2", "--host", "127.0.0.1"]
        assert run(tmp_path, *more, "--round-timeout", "60", steps=train.UNTIL_THE_END) == 0
        found = ending.result()
    written = load_file(tmp_path / "adapter_model.safetensors")
    for block, delta in found.items():
        for path, linear in delta.linears.items():
            name = f"base_model.model.model.layers.{block}.{path}.lora_{{}}.weight"
            assert torch.equal(written[name.format("A")], linear.a_rI)
            assert torch.equal(written[name.format("B")], linear.b_Or) and bool(linear.b_Or.any())
    assert "round 1: 2 clients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--method", "ia3"], "only with lora"),
        (["--max-steps", "3"], "not --max-steps 3"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_federated_options_that_do_not_fit_are_named(more, why, chats, tmp_path, capsys):
    """In one line, before anything is loaded."""
    given = ["--data", str(chats), "--output", str(tmp_path), "--federated", "run", "--initial-peers", "/ip4/x"]
    assert train.main([*given, *more]) == 2
    assert why in capsys.readouterr().err
