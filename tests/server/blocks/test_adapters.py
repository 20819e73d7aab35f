"""Rows of one batch, each with an adapter of its own method and rank, get what PEFT gives them alone."""

import peft
import pytest
import torch

from swarm.adapters.format import decode_shard
from swarm.adapters.peft import read_adapter
from swarm.checkpoint.layout import model_layout
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PageAllocator, PageTable
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint
from tests.server.blocks.peft_adapters import run_peft, save_adapter

NUM_PAGES = 512
TOLERANCE = 1e-4
LENGTHS = (37, 5, 22, 18, 1, 9)


def lora(family, pattern="", **options):
    """On all linears that servers adapt, or those that a pattern names. PEFT changes configs, so each use makes its own."""
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


class Server:
    """A span of all blocks of a tiny model, some adapters in pages and some in memory of their own."""

    def __init__(self, name, directory, **options):
        model = FAMILIES[name].model()
        model.save_pretrained(directory)
        checkpoint = SavedCheckpoint(directory)
        self.config = checkpoint.config()
        self.num_blocks = self.config.get_text_config(decoder=True).num_hidden_layers
        self.span = BlockSpan.load(checkpoint, BlockRange(0, self.num_blocks), num_pages=NUM_PAGES, **options)
        self.allocator = PageAllocator(NUM_PAGES)

    def attach(self, directory, *, paged):
        """Through our reader and the bytes that cross the network -> (handle, virtual positions)."""
        if directory is None:
            return -1, 0
        loaded = read_adapter(directory, layout=model_layout(self.config))
        num_virtual = loaded.manifest.num_virtual
        deltas = {
            info.block: decode_shard(loaded.shards[info.block], info, self.span.shape(info.block), num_virtual)
            for info in loaded.manifest.shards
        }
        pages = [] if paged else None
        while paged and (missing := self.span.adapter_pages(deltas, pages)):
            pages += self.allocator.allocate(missing, after=pages[-1] if pages else None)
        return self.span.attach(deltas, pages), num_virtual

    def run(self, sequences, *, chunk=7):
        """All sequences together: prefill in chunks of several lengths beside decode rows -> outputs of each.

        Args:
            sequences: (hidden states, handle) of each.
        """
        tables = [PageTable(self.allocator) for _ in sequences]
        states = [self.span.new_state() for _ in sequences]
        outputs = [[] for _ in sequences]
        positions = [0] * len(sequences)
        while any(position < len(rows) for position, (rows, _) in zip(positions, sequences, strict=True)):
            batch, who = [], []
            for index, (rows, handle) in enumerate(sequences):
                left = len(rows) - positions[index]
                if left:
                    count = 1 if left <= 3 else min(chunk + index, left - 3)  # the last tokens one by one
                    part = rows[positions[index] : positions[index] + count]
                    self.span.copy_pages(tables[index].grow(positions[index] + count))
                    batch.append(Chunk(hidden_states=part, position=positions[index], pages=list(tables[index].pages),
                                       entry=0, exit=self.num_blocks, state=states[index],
                                       adapter=handle))  # fmt: skip
                    who.append(index)
            for index, output in zip(who, self.span.run(batch), strict=True):
                outputs[index].append(output)
                positions[index] += len(output)
        for table in tables:
            table.free()
        return [torch.cat(parts) for parts in outputs]

    def worst(self, cases):
        """Largest difference to PEFT over all cases run in one batch, relative to each one's largest number."""
        attached = [self.attach(case.directory, paged=index % 2 == 0) for index, case in enumerate(cases)]
        sequences = []
        for case, (handle, num_virtual) in zip(cases, attached, strict=True):
            virtual = torch.zeros(num_virtual - case.num_embedded, self.span.hidden_size)
            sequences.append((torch.cat([virtual, case.entering_TH]), handle))
        outputs = self.run(sequences)
        errors = []
        for case, output in zip(cases, outputs, strict=True):
            ours = output[len(output) - len(case.leaving_TH) :]
            assert torch.isfinite(ours).all()
            errors.append(float((ours - case.leaving_TH).abs().max() / case.leaving_TH.abs().max()))
        for handle, _ in attached:
            if handle >= 0:
                self.span.detach(handle)
        return errors


def cases_of(name, configs, tmp_path):
    """A case for the base, and one for each config."""
    family = FAMILIES[name]
    directories = [
        save_adapter(family.model(), config, tmp_path / f"adapter-{index}", seed=index)
        for index, config in enumerate(configs)
    ]
    return [
        run_peft(family, directory, LENGTHS[index % len(LENGTHS)], seed=index)
        for index, directory in enumerate([*directories, None])
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
        "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=8, total_step=10, target_modules=attention, **causal),
        "VeRA": peft.VeraConfig(r=8, target_modules=["q_proj", "k_proj", "down_proj"], **causal),
        "VeRA from its key": peft.VeraConfig(r=8, target_modules=attention, save_projection=False,
                                             projection_prng_key=7, **causal),
        "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **causal),
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
