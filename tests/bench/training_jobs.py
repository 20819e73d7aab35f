"""Jobs of training for benchmarks: the same adapter, data and steps through a swarm and in one local process.

Data ─► batch(step) ─┐
local_model ─────────┼─► train_step ─► loss        remote_model: PEFT's config over remote blocks, same first values
remote_model ────────┘
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from swarms import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from swarm.checkpoint.source import resolve
from swarm.client.config import SessionConfig

LEARNING_RATE = 5e-4


def lora() -> PeftConfig:
    """Rank 8 on q and v."""
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def prompt_tuning() -> PeftConfig:
    """16 virtual tokens."""
    return PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM")


METHODS = {"lora": lora, "prompt": prompt_tuning}


def local_model(config: PeftConfig, *, seed: int = 0, model: str = MODEL) -> Any:
    """PEFT on plain transformers."""
    base = AutoModelForCausalLM.from_pretrained(resolve(model).path, dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def remote_model(config: PeftConfig, address: str, *, seed: int = 0, model: str = MODEL, **session: Any) -> Any:
    """PEFT over remote blocks; its `close` leaves the swarm."""
    base = swarm.AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[address], dtype=torch.float32, session_config=SessionConfig(**session)
    )
    torch.manual_seed(seed)
    return swarm.get_peft_model(base, config)


def traffic_of(model: Any) -> tuple[int, int]:
    """Bytes that a remote model has sent and received for training."""
    remote = remote_of(model)
    return remote.bytes_sent, remote.bytes_received


def remote_of(model: Any) -> Any:
    """The run of a remote model."""
    blocks = model.get_base_model().blocks
    return blocks._remote.trained(blocks.blocks).training.remote


@dataclass(slots=True, eq=False)
class Job:
    """A model, what is trained of it, and its losses so far."""

    model: Any
    losses: list[float] = field(default_factory=list)
    _optimizer: torch.optim.Optimizer | None = None

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """One step of AdamW; the loss before it."""
        if self._optimizer is None:
            own = [it for it in self.model.parameters() if it.requires_grad]
            self._optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE)
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        """Mean loss."""
        return sum(float(self.model(**batch).loss) for batch in batches) / len(batches)


def random_batch(rows: int, columns: int, *, seed: int, vocab_size: int = 49152) -> dict[str, torch.Tensor]:
    """Any tokens, for timing."""
    ids = torch.randint(3, vocab_size, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def text_rows(text: str, columns: int, *, model: str = MODEL) -> torch.Tensor:
    """Rows of consecutive tokens of a text, [N, columns]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(model).path)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // columns * columns].view(-1, columns)
