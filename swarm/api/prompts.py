"""From what a client wrote to the tokens of a prompt, and back from tokens to text.

    turns ─chat template─► token ids          text ─tokenizer─► token ids          token ids ─check─► token ids

One tokenizer serves all threads: nothing here changes its settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from swarm.api.errors import ApiError


class Prompts:
    """The tokenizer of one model.

    Args:
        tokenizer: as loaded.
        vocabulary: how many tokens the model's embeddings know.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int):
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        # A tokenizer's file may come with limits. They are dropped at the first use, which no second thread may meet.
        tokenizer("")

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be put into a prompt."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def chat(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt of a conversation, up to where the answer begins.

        Raises:
            ApiError: there is no template, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise ApiError("this model has no chat template: use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self._encode(str(text), param="messages", add_special_tokens=False)

    def text(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The prompt of a plain completion.

        Raises:
            ApiError: it is empty, or has ids that are none.
        """
        if isinstance(prompt, str):
            return self._encode(prompt, param="prompt")
        if not prompt:
            raise ApiError("the prompt has no tokens", param="prompt")
        if wrong := [token for token in prompt if not 0 <= token < self.vocabulary]:
            raise ApiError(f"token id {wrong[0]} is not in 0..{self.vocabulary - 1}", param="prompt")
        return tuple(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without the marks that end it."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def spell(self, token: int) -> str:
        """One token, whatever it is, for people who look at log probabilities."""
        return str(self._tokenizer.decode([token]))

    def _encode(self, text: str, *, param: str, **options: Any) -> tuple[int, ...]:
        tokens = tuple(int(token) for token in self._tokenizer(text, **options)["input_ids"])
        if not tokens:
            raise ApiError("the prompt has no tokens", param=param)
        return tokens
