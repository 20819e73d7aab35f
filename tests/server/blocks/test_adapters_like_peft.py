"""Rows of one batch, each with an adapter of its own method and rank, get what PEFT gives them alone."""

import peft
import pytest

from swarm.server.quantization import dense_weight
from tests.families.configs import FAMILIES
from tests.families.harness import split_model
from tests.server.blocks.adapter_server import TOLERANCE, Server, cases_of
from tests.server.blocks.peft_adapters import run_peft, save_adapter


def lora(family, pattern="", **options):
    """On all linears that servers adapt, or those of a pattern. PEFT changes configs, so each use makes its own."""
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=pattern or EVERY_LINEAR[family], **options)


EVERY_LINEAR = {
    **dict.fromkeys(("llama", "qwen3", "gemma3_text", "falcon-7b", "falcon-40b", "gpt2"), "all-linear"),
    "qwen3_moe": r".*self_attn\..*_proj",  # its experts are no linears
    "deepseek_v3": r".*self_attn\..*_proj\w*",
}
SOME_BLOCKS = r".*\.[02]\..*(q_proj|q_b_proj|c_attn|query_key_value)"


def loras(family):
    """Ranks and scales of several kinds."""
    return [
        lora(family, r=3, lora_alpha=12),
        lora(family, r=16, lora_alpha=8, use_rslora=True),
        lora(family, r=2, lora_alpha=4, rank_pattern={r".*\.1\..*": 5}, alpha_pattern={"o_proj": 1, "c_proj": 2}),
        lora(family, SOME_BLOCKS, r=4),
    ]


@pytest.mark.parametrize("name", EVERY_LINEAR)
def test_rows_of_different_lora_adapters_equal_peft(name, tmp_path):
    """Any mix of ranks and targets in one batch, chunked prefill and decode, beside a row without an adapter."""
    cases = cases_of(name, loras(name), tmp_path)
    assert max(Server(name, tmp_path / "base").worst(cases)) < TOLERANCE


def methods():
    """One config of each method, as PEFT's users write them."""
    attention = ["q_proj", "v_proj", "o_proj"]
    causal = {"task_type": "CAUSAL_LM"}
    return {
        "LoRA": lora("llama", r=5),
        "DoRA": lora("llama", r=4, use_dora=True),
        "LoRA with a bias of its own": lora("llama", r=4, lora_bias=True),
        "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=8, total_step=10, target_modules=attention,
                                      **causal),
        "VeRA": peft.VeraConfig(r=8, target_modules=["q_proj", "k_proj", "down_proj"], **causal),
        "VeRA from its key": peft.VeraConfig(r=8, target_modules=attention, save_projection=False,
                                             projection_prng_key=7, **causal),
        "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                              **causal),
        "IA3 on inputs of a group": peft.IA3Config(target_modules=["q_proj", "gate_proj"],
                                                   feedforward_modules=["q_proj", "gate_proj"], **causal),
        "BEFT": peft.BeftConfig(target_modules=["v_proj", "up_proj"], **causal),
        "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=9, **causal),
        "prefix tuning, projected": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True,
                                                            encoder_hidden_size=24, **causal),
        "cartridge": peft.CartridgeConfig(num_virtual_tokens=4, **causal),
        "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5, **causal),
        "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **causal),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_all_methods_in_one_batch_equal_peft(tmp_path):
    """LoRA, DoRA, AdaLoRA, VeRA, IA3, biases, prefixes and prompts, each row with another one."""
    cases = cases_of("llama", methods().values(), tmp_path)
    errors = Server("llama", tmp_path / "base").worst(cases)
    found = dict(zip([*methods(), "none"], errors, strict=True))
    assert {name: error for name, error in found.items() if error > TOLERANCE} == {}


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_every_method_changes_its_row(tmp_path):
    """Else equality with PEFT would prove nothing."""
    configs = {name: it for name, it in methods().items() if not name.startswith("VeRA from")}
    cases = cases_of("llama", configs.values(), tmp_path)
    server = Server("llama", tmp_path / "base")
    for name, case in zip(configs, cases[:-1], strict=True):
        tokens = case.entering_TH[case.num_embedded :]
        (without,) = server.run([(tokens, -1)])
        difference = (without - case.leaving_TH[-len(tokens) :]).abs().max() / without.abs().max()
        assert difference > 100 * TOLERANCE, name


@pytest.mark.parametrize(("format", "tolerance"), [("nf4", TOLERANCE), ("int8", 0.03)])
def test_adapters_on_a_quantised_base_see_its_dequantised_weights(format, tolerance, tmp_path):
    """LoRA beside it and DoRA's norms of it: PEFT on a model with just these weights (int8 also rounds activations)."""
    server = Server("llama", tmp_path / "base", quantization=format)
    configs = [lora("llama", r=4, lora_alpha=8), lora("llama", r=4, use_dora=True)]
    directories = [
        save_adapter(FAMILIES["llama"].model(), it, tmp_path / f"{n}", seed=n) for n, it in enumerate(configs)
    ]

    def dequantize(model):
        blocks, _ = split_model(model)
        for loaded, block in zip(server.span._loaded, blocks, strict=True):
            for site in loaded.sites:
                weight = dense_weight(site.product)
                for member in site.members:
                    rows = slice(member.column, member.column + member.shape.num_outputs)
                    block.get_submodule(member.path).weight.copy_(weight[rows])

    cases = [run_peft(FAMILIES["llama"], it, 17, seed=5, edit=dequantize) for it in [*directories, None]]
    assert max(server.worst(cases)) < tolerance


def test_recurrent_blocks_run_adapters_sequence_by_sequence(tmp_path):
    """Linears of recurrent and of attention layers, two adapters and none, each sequence with its own state."""
    pattern = r".*(in_proj_qkvz|in_proj|out_proj|q_proj|o_proj)"
    cases = cases_of("qwen3_next", [lora("", pattern, r=4), lora("", pattern, r=2, lora_alpha=16)], tmp_path)
    assert max(Server("qwen3_next", tmp_path / "base").worst(cases)) < 5 * TOLERANCE
