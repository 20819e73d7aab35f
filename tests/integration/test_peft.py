"""PEFT's own configs over real servers: the parameters, gradients, outputs and files of PEFT on a local model."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from peft import IA3Config, LoHaConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, set_seed

import swarm as package
from swarm.checkpoint.source import resolve
from swarm.client.generation import DistributedModel
from swarm.client.model import distribute
from swarm.client.peft_model import DistributedPeftModel, get_peft_model
from swarm.client.runtime import connect
from swarm.errors import AdapterError, InvalidRequest
from tests.families.configs import FAMILIES
from tests.integration.conftest import LocalSwarm, closing

TASK = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **TASK),
    "lora everywhere": lambda: LoraConfig(
        target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"o_proj": 2}, **TASK
    ),
    "lora in some layers": lambda: LoraConfig(target_modules=["up_proj"], layers_to_transform=[1, 4], **TASK),
    "lora with bias": lambda: LoraConfig(target_modules=["o_proj"], lora_bias=True, init_lora_weights=False, **TASK),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **TASK),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "prefix from an encoder": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
}
PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported for parameter efficient tuning",
    "ignore:.*is_gradient_checkpointing",
    "ignore:`lora_bias=True` was passed but",
    "ignore:Adapter 'default'.* invalid shape",  # PEFT takes the bias for a matrix
)


@pytest.fixture
def service(swarm: LocalSwarm):
    """A client of two servers and a third that overlaps both."""
    with closing(swarm.connect()) as service:
        yield service


@pytest.fixture
def make_base(swarm: LocalSwarm, service) -> Callable[[], DistributedModel]:
    """Fresh distributed models."""
    return lambda: distribute(resolve(str(swarm.model)), service, dtype=torch.float32)


@pytest.fixture
def make_local(swarm: LocalSwarm):
    """Fresh local models of the same checkpoint."""
    return lambda: AutoModelForCausalLM.from_pretrained(swarm.model, dtype=torch.float32)


def gradients(model, vocabulary: int = 120):
    """The loss, and the gradients of all that is trained, for a batch with padding on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    model.train()
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    output.loss.backward()
    model.eval()
    return output, {name: it.grad.clone() for name, it in model.named_parameters() if it.requires_grad}


def shake(model, scale: float = 0.3):
    """Give what is trained other numbers, the same for each model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def assert_equal_gradients(found, expected):
    assert list(found) == list(expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_as_peft_has_it_on_a_local_model(name, make_base, make_local, tmp_path):
    """First values, losses, gradients, tokens; then the files, which PEFT and the swarm read alike."""
    models = []
    for get, make in ((get_peft_model, make_base), (peft.get_peft_model, make_local)):
        set_seed(5)
        models.append(get(make(), CONFIGS[name]()))
    remote, local = models
    values = dict(local.named_parameters())
    trained = {key: it for key, it in remote.named_parameters() if it.requires_grad}
    assert trained and all(torch.equal(it, values[key]) for key, it in trained.items())
    assert remote.get_nb_trainable_parameters()[0] == local.get_nb_trainable_parameters()[0]
    for _ in range(2):
        (found, ours), (expected, right) = gradients(remote), gradients(local)
        assert found.logits.shape == expected.logits.shape
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_equal_gradients(ours, right)
        shake(remote, 0.1), shake(local, 0.1)
    tokens = local.generate(input_ids=PROMPT, **GREEDY)
    assert torch.equal(remote.generate(input_ids=PROMPT, **GREEDY), tokens)

    remote.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(make_local(), str(tmp_path))
    assert torch.equal(again.generate(input_ids=PROMPT, **GREEDY), tokens)
    base = make_base()
    base.load_adapter(tmp_path, "mine")
    assert torch.equal(base.generate(PROMPT, adapter_name="mine", **GREEDY), tokens)
    with remote._prompted():
        snapshot = remote.get_base_model().trained().snapshot(base.layout)
    assert snapshot.digest == base.adapters["mine"].digest  # so servers had it before it was saved


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "prefix"])
def test_a_saved_adapter_is_trained_on(name, make_base, make_local, tmp_path):
    """from_pretrained(is_trainable=True): the same parameters, and their gradients."""
    first = get_peft_model(make_base(), CONFIGS[name]())
    shake(first)
    first.save_pretrained(str(tmp_path))
    second = DistributedPeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert_equal_gradients(gradients(second)[1], gradients(first)[1])


def test_a_second_adapter_is_loaded_beside_the_first(make_base, make_local, tmp_path):
    """load_adapter, set_adapter, disable_adapter, and a frozen one, as PEFT has them."""
    first = get_peft_model(make_base(), CONFIGS["lora"]())
    shake(first)
    first.save_pretrained(str(tmp_path))
    both, local = get_peft_model(make_base(), CONFIGS["ia3"]()).unload(), make_local()
    both, local = get_peft_model(both, CONFIGS["lora"]()), peft.get_peft_model(local, CONFIGS["lora"]())
    for model in (both, local):
        model.load_adapter(str(tmp_path), "other", is_trainable=True)
        model.set_adapter("other")
    assert_equal_gradients(gradients(both)[1], gradients(local)[1])
    with both.disable_adapter(), local.disable_adapter():
        assert torch.equal(both.generate(input_ids=PROMPT, **GREEDY), local.generate(input_ids=PROMPT, **GREEDY))
    assert torch.equal(both.generate(input_ids=PROMPT, **GREEDY), local.generate(input_ids=PROMPT, **GREEDY))
    assert torch.equal(both.generate(PROMPT, adapter_name="__base__", **GREEDY), make_base().generate(PROMPT, **GREEDY))


def test_a_session_keeps_the_weights_that_it_was_opened_with(make_base):
    """A step in between changes the next session, and not this one."""
    model = get_peft_model(make_base(), CONFIGS["lora"]())
    before = model.generate(input_ids=PROMPT, **GREEDY)
    with model.inference_session(max_length=64) as session:
        shake(model), shake(model)
        assert torch.equal(model.generate(input_ids=PROMPT, session=session, **GREEDY), before)
    assert not torch.equal(model.generate(input_ids=PROMPT, **GREEDY), before)


def test_sequences_packed_into_a_row_are_kept_apart(make_base):
    """Where positions start anew, another sequence begins: the same losses and gradients as in rows of their own."""
    model = get_peft_model(make_base(), CONFIGS["lora"]())
    ids = torch.randint(3, 120, (2, 6), generator=torch.Generator().manual_seed(3))
    apart = model(input_ids=ids).logits
    packed = model(input_ids=ids.view(1, 12), position_ids=torch.arange(6).repeat(2)[None]).logits
    torch.testing.assert_close(packed.view_as(apart), apart, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(input_ids=ids.view(1, 12)).logits.view_as(apart), apart, atol=1e-3)


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "prefix"])
def test_packed_rows_are_refused_where_virtual_positions_are_trained(name, make_base):
    """A second sequence would have none and see the first; padded rows hold one sequence each, and pass."""
    model = get_peft_model(make_base(), CONFIGS[name]())
    ids, restarting = PROMPT.repeat(1, 2), torch.arange(5).repeat(2)[None]
    for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(InvalidRequest, match="packed rows can't be had with virtual positions"):
            model(position_ids=restarting, **given)
    mask = torch.tensor([[0] * 5 + [1] * 5])
    assert model(input_ids=ids, attention_mask=mask, position_ids=restarting).logits.isfinite().all()


def test_a_mask_given_by_position_is_not_dropped(make_base):
    """It is refused where only input_ids may be, and used elsewhere."""
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with pytest.raises(InvalidRequest, match="only input_ids can be given by position"):
        get_peft_model(make_base(), CONFIGS["prefix"]())(PROMPT, mask)
    model = get_peft_model(make_base(), CONFIGS["prompt"]())
    assert torch.equal(model(PROMPT, mask).logits, model(input_ids=PROMPT, attention_mask=mask).logits)


FAMILIES_TOO = {
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "bloom": {"target_modules": ["query_key_value", "dense"]},
    "gemma2": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("family", FAMILIES_TOO)
def test_other_families_have_the_same_gradients(family, tmp_path):
    """Linears that lie the other way round, fused ones, scaled embeddings."""
    model = FAMILIES[family].model()
    model.save_pretrained(tmp_path)
    small = LocalSwarm(tmp_path)
    try:
        checkpoint = resolve(tmp_path, cache_dir=tmp_path / "cache")
        text = checkpoint.config().get_text_config()
        shape = {"num_blocks": text.num_hidden_layers, "hidden_size": text.hidden_size}
        small.add_server(f"0:{text.num_hidden_layers}")
        with closing(connect(checkpoint, **shape, initial_peers=[small.address])) as service:
            both = []
            for get in (get_peft_model, peft.get_peft_model):
                is_remote = get is get_peft_model
                base = distribute(checkpoint, service, dtype=torch.float32) if is_remote else model
                set_seed(5)
                both.append(get(base, LoraConfig(init_lora_weights=False, **FAMILIES_TOO[family], **TASK)))
            for wrapped in both:
                for module in wrapped.modules():  # blocks of servers have none, wherever a model's config has some
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
            (found, ours), (expected, right) = (gradients(wrapped, vocabulary=96) for wrapped in both)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
            assert_equal_gradients(ours, right)
    finally:
        small.close()


REFUSED = [
    (LoraConfig(lora_dropout=0.1, target_modules=["q_proj"], **TASK), "lora_dropout = 0.1"),
    (LoraConfig(use_dora=True, target_modules=["q_proj"], **TASK), "use_dora = True"),
    (LoraConfig(bias="all", target_modules=["q_proj"], **TASK), "bias = all"),
    (LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"], **TASK), "init_lora_weights = 'pissa'"),
    (LoraConfig(target_modules=["nowhere"], **TASK), "target_modules: .*nowhere"),
    (
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="strata", **TASK),
        "layers_to_trans",
    ),
    (LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj"], **TASK), "modules_to_save has model.layers.0"),
    (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], **TASK), "trainable_token_indices"),
    (LoHaConfig(target_modules=["q_proj"], **TASK), "peft_type = .*LOHA"),
    (PromptTuningConfig(num_virtual_tokens=4), "task_type is missing"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_its_field(config, reason, make_base):
    """And the model is as it was."""
    base = make_base()
    with pytest.raises(InvalidRequest, match=reason):
        get_peft_model(base, config)
    assert base.trained() is None
    get_peft_model(base, CONFIGS["lora"]())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_dropout": 0.2}, "lora_dropout = 0.2"),
        ({"bias": "all"}, "adapter default: bias = all"),
        ({"modules_to_save": ["k_proj"]}, "k_proj: ModulesToSaveWrapper can't be trained"),
    ],
)
def test_the_same_is_refused_where_peft_was_called_itself(settings, reason, make_base):
    """Trainers call it on their own; the first step names the field."""
    model = peft.get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"], **settings, **TASK))
    with pytest.raises(InvalidRequest, match=reason):
        gradients(model)


def test_what_would_be_ignored_is_refused(make_base, tmp_path):
    """Names per row, merging, and a served adapter beside a trained one."""
    base = make_base()
    model = get_peft_model(base, CONFIGS["lora"]())
    with pytest.raises(InvalidRequest, match="adapter_names"):
        model(input_ids=PROMPT, adapter_names=["default"])
    with pytest.raises(InvalidRequest, match="merged"):
        model.merge_and_unload()
    model.save_pretrained(str(tmp_path))
    base.load_adapter(tmp_path, "served")
    with pytest.raises(InvalidRequest, match="adapters served are active beside what is trained"):
        model(input_ids=PROMPT)
    with pytest.raises(AdapterError):
        base.load_adapter(tmp_path / "nothing", "other")


def test_it_is_pushed_to_a_hub(make_base, monkeypatch):
    """push_to_hub saves both files and a card, and uploads them."""
    uploaded = {}

    def upload(self, working_dir, repo_id, files_timestamps, **options):
        uploaded[repo_id] = sorted(path.name for path in Path(working_dir).iterdir())

    monkeypatch.setattr("peft.peft_model.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: RepoUrl(f"hf.co/{repo_id}"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("a card"))
    get_peft_model(make_base(), CONFIGS["lora"]()).push_to_hub("org/mine")
    assert uploaded == {"org/mine": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}


def test_it_is_there_at_the_top():
    """`import swarm; swarm.get_peft_model`."""
    assert package.get_peft_model is get_peft_model
