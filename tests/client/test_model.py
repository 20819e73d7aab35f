"""The local part of a distributed model: only what it needs, in the right type, or a typed refusal."""

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from swarm.checkpoint.source import resolve
from swarm.client import model as model_module
from swarm.client.generation import DistributedModel
from swarm.client.model import distribute
from swarm.client.remote_blocks import RemoteBlocks
from swarm.errors import CheckpointMismatch, UnsupportedModel
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockService


def test_it_is_a_transformers_model_without_blocks(pair: Pair) -> None:
    """Same class, generation and config; embeddings, norm and head are its only parameters."""
    model = pair.distributed
    assert isinstance(model, type(pair.local))
    assert isinstance(model, GenerationMixin)
    assert isinstance(model, DistributedModel)
    assert type(model).__name__ == "DistributedLlamaForCausalLM"
    names = {name for name, _ in model.named_parameters()}
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.model.layers[0], RemoteBlocks)


def test_dtype_is_the_checkpoints_unless_given(pair: Pair) -> None:
    """A float32 checkpoint stays float32, or becomes what was asked for; hidden states keep that type."""
    seen = []

    class Noting(LocalBlockService):
        def open_session(self, *, batch_size: int, max_length: int):  # type: ignore[no-untyped-def]
            session = super().open_session(batch_size=batch_size, max_length=max_length)
            step = session.step

            def noting_step(hidden_states: torch.Tensor, **options: object) -> torch.Tensor:
                seen.append(hidden_states.dtype)
                return step(hidden_states.float(), **options)  # type: ignore[arg-type]

            session.step = noting_step  # type: ignore[method-assign, assignment]
            return session

    checkpoint = pair.distributed.checkpoint
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = distribute(checkpoint, Noting(pair.local), dtype=dtype)
        assert model(torch.tensor([[5, 6]])).logits.dtype == expected
        assert seen.pop() == expected


def test_another_number_of_blocks_is_refused(pair: Pair) -> None:
    """The remote blocks must be those of the checkpoint."""
    service = LocalBlockService(pair.local)
    service.num_blocks = 5
    with pytest.raises(CheckpointMismatch, match=r"\(3, 32\).*\(5, 32\)"):
        distribute(pair.distributed.checkpoint, service)


def test_a_forward_that_can_not_be_driven_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run notices, and names the reason."""

    def broken(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(model_module, "_dry_run", broken)
    with pytest.raises(UnsupportedModel, match="DistributedLlamaForCausalLM.*list index out of range"):
        distribute(pair.distributed.checkpoint, LocalBlockService(pair.local))


@pytest.mark.parametrize(
    ("family", "takes_tuples", "needs_masks"),
    [("llama", False, False), ("bloom", True, False), ("falcon-7b", True, True), ("mpt", True, True)],
)
def test_the_dry_run_finds_out_how_a_model_treats_its_layers(
    make_pair: Callable[[str], Pair], family: str, takes_tuples: bool, needs_masks: bool
) -> None:
    """Whether it takes [0] of what a layer returns, and whether it can do without masks."""
    model: PreTrainedModel = make_pair(family).distributed
    [blocks] = [module for module in model.modules() if isinstance(module, RemoteBlocks)]
    assert blocks.returns_tuple is takes_tuples
    assert (model.config._attn_implementation == "eager") is needs_masks


def test_generation_settings_come_from_the_checkpoint(pair: Pair) -> None:
    """As with from_pretrained of transformers; without the file, from the config."""
    checkpoint = resolve(pair.path, cache_dir=pair.path / "cache")
    settings = distribute(checkpoint, LocalBlockService(pair.local)).generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (2, 0)
    (pair.path / "generation_config.json").rename(pair.path / "moved.json")
    try:
        settings = distribute(checkpoint, LocalBlockService(pair.local)).generation_config
    finally:
        (pair.path / "moved.json").rename(pair.path / "generation_config.json")
    assert settings.eos_token_id == pair.local.config.eos_token_id
