"""Virtual positions: a row with a prompt before its tokens is what PEFT makes of it, whatever stands beside it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from swarm.client.row_adapters import ClientAdapter
from swarm.errors import InvalidRequest
from tests.adapters import MadeAdapter, make_adapter
from tests.client.conftest import Pair

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

NUM_VIRTUAL = 3
PROMPTS = [torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[11, 12, 13]])]
IDS, MASK = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
Prompted = tuple[Pair, Any, MadeAdapter]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma"])
def prompted(
    request: pytest.FixtureRequest, make_pair: Callable[[str], Pair]
) -> Iterator[tuple[Pair, Any, MadeAdapter]]:
    """A pair, PEFT's prompt tuning around a copy of the local model, and the same as an adapter of the other one.

    The families differ in what happens before the first block: nothing, learned positions, scaled embeddings.
    """
    pair = make_pair(request.param)
    local = type(pair.local)(pair.local.config).eval()
    local.load_state_dict(pair.local.state_dict())
    local.generation_config = pair.local.generation_config
    torch.manual_seed(3)
    peft = get_peft_model(local, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL))
    nn.init.normal_(peft.prompt_encoder["default"].embedding.weight, std=0.5)
    peft.eval()
    embeddings = peft.get_prompt_embedding_to_save("default").detach()
    hidden = pair.distributed.block_service.hidden_size
    adapter = make_adapter(
        0, blocks=(), num_blocks=pair.service.num_blocks, hidden=hidden, num_virtual=NUM_VIRTUAL, embeddings=embeddings
    )
    pair.distributed.adapters.add("prompt", adapter)
    yield pair, peft, adapter
    pair.distributed.adapters.remove(["prompt"])


def of_peft(peft: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What PEFT generates for one row alone: with padding it counts the pads as positions, which we don't."""
    found: torch.Tensor = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return found


def test_logits_are_those_of_peft(prompted: Prompted) -> None:
    """One pass without a session: of the tokens alone, all of them or the last."""
    pair, peft, _ = prompted
    with torch.no_grad():
        expected = peft(input_ids=PROMPTS[0], attention_mask=torch.ones_like(PROMPTS[0])).logits[:, NUM_VIRTUAL:]
        found = pair.distributed(input_ids=PROMPTS[0], adapter_name="prompt").logits
        last = pair.distributed(PROMPTS[0], adapter_name="prompt", logits_to_keep=1).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-4, rtol=1e-4)


def test_padded_rows_are_those_of_peft_alone(prompted: Prompted) -> None:
    """A left-padded batch in which one row has the prompt and another none."""
    pair, peft, _ = prompted
    for names in (["prompt", "prompt"], ["prompt", None], [None, "prompt"]):
        found = pair.distributed.generate(IDS, attention_mask=MASK, adapter_name=names, **GREEDY)
        for row, (name, ids) in enumerate(zip(names, PROMPTS, strict=True)):
            alone = of_peft(peft, ids, **GREEDY) if name else pair.local.generate(ids, **GREEDY)
            assert torch.equal(found[row, -6:], alone[0, -6:]), names


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 10},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=["beams", "sampling", "penalty"],
)
def test_all_ways_of_generating_are_those_of_peft(prompted: Prompted, options: dict[str, Any]) -> None:
    """The seed gives the same tokens; a beam takes its prompt along."""
    pair, peft, _ = prompted
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **options}
    torch.manual_seed(1)
    expected = of_peft(peft, PROMPTS[0], **options)
    torch.manual_seed(1)
    found = pair.distributed.generate(PROMPTS[0], adapter_name="prompt", **options)
    assert torch.equal(found, expected)


def test_the_prompt_travels_once(prompted: Prompted) -> None:
    """With the first tokens of a session; what follows counts it, goes back to it, and never sends it again."""
    pair, peft, _ = prompted
    pair.service.sessions = []
    expected = of_peft(peft, PROMPTS[0], **GREEDY)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    with pair.distributed.inference_session(max_length=32, adapter_name="prompt") as session:
        half = pair.distributed.generate(
            PROMPTS[0], session=session, do_sample=False, max_new_tokens=3, min_new_tokens=3
        )
        full = pair.distributed.generate(half, session=session, **greedy)
        again = pair.distributed.generate(half, session=session, **greedy)
        assert session.get_seq_length() == session.length == full.shape[1] - 1
        with pytest.raises(InvalidRequest, match="crop"):
            session.crop(-session.length - 1)
    assert torch.equal(full, expected) and torch.equal(again, expected)
    assert sum(sum(step.num_tokens) for step in pair.service.steps) <= NUM_VIRTUAL + 5 + 6 + 3


def test_guessed_tokens_are_rolled_back_to_the_right_place(prompted: Prompted) -> None:
    """Prompt lookup with virtual positions before the prompt."""
    pair, peft, _ = prompted
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    expected = of_peft(peft, ids, **GREEDY)
    assert torch.equal(
        pair.distributed.generate(ids, adapter_name="prompt", prompt_lookup_num_tokens=3, **GREEDY), expected
    )


def test_a_session_keeps_its_adapters(prompted: Prompted) -> None:
    """A call may name them again, but no others."""
    pair, _, _ = prompted
    with pair.distributed.inference_session(max_length=32, adapter_name="prompt") as session:
        pair.distributed.generate(PROMPTS[0], session=session, adapter_name="prompt", **GREEDY)
        with pytest.raises(InvalidRequest, match="opened with other adapters"):
            pair.distributed.generate(PROMPTS[0], session=session, adapter_name=[None], **GREEDY)


def test_virtual_positions_count_against_the_model(prompted: Prompted) -> None:
    """What does not fit with them is refused before anything is sent."""
    pair, _, adapter = prompted
    limit = pair.local.config.max_position_embeddings
    with pytest.raises(InvalidRequest, match=f"more than the {limit} positions"):
        pair.distributed.generate(PROMPTS[0], adapter_name="prompt", max_length=limit - 1)
    wide: ClientAdapter = adapter
    assert pair.distributed.inference_session(adapter_name="prompt").max_length == limit - wide.manifest.num_virtual
