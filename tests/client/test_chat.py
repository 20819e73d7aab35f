"""A conversation answers like plain generate on the whole text, but sends each token once."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from swarm.client.chat import Conversation
from swarm.errors import InvalidRequest
from tests.client.conftest import Pair

OPTIONS: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.5, "suppress_tokens": [2]}


def expected_answer(pair: Pair, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], count: int) -> str:
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    output = pair.local.generate(ids, max_new_tokens=count, **OPTIONS)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_turns_equal_plain_generate_and_send_only_new_tokens(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two turns with a system text; the second sends what came after the first answer's last but one token."""
    messages = [{"role": "system", "content": "w1 w2"}]
    shown: list[str] = []
    with Conversation(pair.distributed, tokenizer, system="w1 w2") as talk:
        for question in ("w3 w4 w5", "w6"):
            messages.append(user(question))
            expected = expected_answer(pair, tokenizer, messages, 6)
            answer = talk.ask(question, show=shown.append, max_new_tokens=6, **OPTIONS)
            assert answer.text == expected
            messages.append({"role": "assistant", "content": answer.text})
        assert 0 < answer.num_sent_tokens < answer.num_prompt_tokens
        assert answer.num_tokens == 6 and answer.first_token_s > 0 and answer.tokens_per_s > 0
    assert len(pair.service.sessions) == 1
    assert pair.service.num_open == 0
    assert "".join(shown) == "".join(it["content"] for it in messages if it["role"] == "assistant")


def test_a_template_that_rewrites_history_rolls_back(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the new prompt parts from what the session holds, it goes back to there."""
    with Conversation(pair.distributed, tokenizer) as talk:
        first = talk.ask("w3 w4", max_new_tokens=4, **OPTIONS)
        talk._messages[-1] = {"role": "assistant", "content": "w9"}
        messages = [user("w3 w4"), {"role": "assistant", "content": "w9"}, user("w5")]
        expected = expected_answer(pair, tokenizer, messages, 4)
        second = talk.ask("w5", max_new_tokens=4, **OPTIONS)
    assert second.text == expected
    assert second.num_sent_tokens == second.num_prompt_tokens - first.num_prompt_tokens


def test_forgetting_starts_over(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same question gets the same answer, in a new session."""
    with Conversation(pair.distributed, tokenizer) as talk:
        first = talk.ask("w3 w4", max_new_tokens=4, **OPTIONS)
        talk.forget()
        assert talk.ask("w3 w4", max_new_tokens=4, **OPTIONS).text == first.text
    assert [session.is_closed for session in pair.service.sessions] == [True, True]


def test_a_session_lost_in_a_turn_is_replaced(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """A closed session costs a resend, not an answer."""
    with Conversation(pair.distributed, tokenizer) as talk:
        talk.ask("w3 w4", max_new_tokens=4, **OPTIONS)
        assert talk.session is not None
        talk.session.close()
        answer = talk.ask("w5", max_new_tokens=4, **OPTIONS)
    assert answer.num_sent_tokens == answer.num_prompt_tokens


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_turn_can_be_asked_again(pair: Pair, tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    """Ctrl-C in the second answer leaves conversation and session as after the first, whatever had been rewritten."""
    seen: list[None] = []

    def interrupt() -> None:
        seen.append(None)
        if len(seen) == step:
            raise KeyboardInterrupt

    with Conversation(pair.distributed, tokenizer) as talk:
        first = talk.ask("w3 w4", max_new_tokens=4, **OPTIONS)
        answer = talk._messages[-1]
        talk._messages[-1] = {"role": "assistant", "content": "w9"}
        pair.service.before_step = interrupt
        with pytest.raises(KeyboardInterrupt):
            talk.ask("w5 w6 w7", max_new_tokens=4, **OPTIONS)
        talk._messages[-1] = answer
        messages = [user("w3 w4"), {"role": "assistant", "content": first.text}, user("w8")]
        assert talk.ask("w8", max_new_tokens=4, **OPTIONS).text == expected_answer(pair, tokenizer, messages, 4)
        assert len(pair.service.sessions) == pair.service.num_open == 1
    assert pair.service.num_open == 0


def test_a_full_conversation_is_refused(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """With both numbers; answers are cut to what is left."""
    with Conversation(pair.distributed, tokenizer, max_length=12) as talk:
        answer = talk.ask("w3 w4", max_new_tokens=50, **OPTIONS)
        assert answer.num_prompt_tokens + answer.num_tokens == 12
        with pytest.raises(InvalidRequest, match="the model holds 12"):
            talk.ask("w5")


def test_a_model_without_template_continues_the_text(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    """Base models get the bare words."""
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with Conversation(pair.distributed, tokenizer) as talk:
            answer = talk.ask("w3 w4 w5", max_new_tokens=4, **OPTIONS)
    finally:
        tokenizer.chat_template = template
    ids: Any = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    expected = pair.local.generate(ids, max_new_tokens=4, **OPTIONS)
    assert answer.text == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
