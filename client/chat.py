"""A conversation with a model: the chat template, one session for all turns, and how fast the answers come.

    ask(text) ─► template of the whole conversation ─► what the session already holds is kept ─► generate ─► text

Works with any transformers-like model; a distributed one gets a session, so that each turn sends only its new tokens.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from swarm.client.cache import RemoteCache
from swarm.client.generation import DistributedModel, longest
from swarm.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One turn of the model."""

    text: str
    num_prompt_tokens: int
    """Tokens of the conversation before the answer."""
    num_sent_tokens: int
    """Those of them that were new to the session."""
    num_tokens: int
    """Tokens of the answer, the end marker included."""
    first_token_s: float
    """Seconds from the question to the first token."""
    tokens_per_s: float
    """Rate of the tokens after the first; 0 where there is only one."""


class Conversation:
    """Turns with one model through one session.

    Args:
        model: a distributed model.
        tokenizer: its tokenizer; without a chat template, texts are simply continued.
        system: instructions that come before the first turn.
        max_length: most tokens of the whole conversation; the model's limit by default.
    """

    def __init__(
        self,
        model: DistributedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_length: int | None = None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._system = list(self._messages)
        self._ids: list[int] = []
        self._limit = max_length or longest(model)
        self._session: RemoteCache | None = None

    @property
    def session(self) -> RemoteCache | None:
        """The session in use; None before the first question."""
        return self._session

    def ask(self, text: str, *, show: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Put a question and wait for the answer.

        Args:
            text: the user's turn.
            show: called with each piece of the answer as it comes.
            options: for `generate` (max_new_tokens, do_sample, ...).

        Raises:
            InvalidRequest: when the conversation would not fit the model.
        """
        ids = self._tokenize([*self._messages, {"role": "user", "content": text}])
        max_new_tokens = min(options.pop("max_new_tokens", self._limit), self._limit - len(ids))
        if max_new_tokens < 1:
            raise InvalidRequest(
                f"the conversation has {len(ids)} tokens, the model holds {self._limit}: start a new one"
            )
        session = self._resume(ids)
        self._ids = ids  # what the session will hold, however this turn ends
        sent = len(ids) - session.length
        streamer = _Timer(self._tokenizer, show)
        output = self._model.generate(
            torch.tensor([ids], device=self._model.device),
            session=session,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            **options,
        )
        self._ids = [int(token) for token in output[0].tolist()]
        answer = str(self._tokenizer.decode(self._ids[len(ids) :], skip_special_tokens=True))
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return Answer(
            text=answer,
            num_prompt_tokens=len(ids),
            num_sent_tokens=sent,
            num_tokens=len(self._ids) - len(ids),
            first_token_s=streamer.first_token_s,
            tokens_per_s=streamer.tokens_per_s,
        )

    def forget(self) -> None:
        """Start over, with the same system instructions."""
        self.close()
        self._messages, self._ids = list(self._system), []

    def close(self) -> None:
        """Close the session; the next question opens another."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tokenize(self, messages: list[dict[str, str]]) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None):
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            encoded = self._tokenizer("\n".join(message["content"] for message in messages))
        ids: Any = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return [int(token) for token in ids]

    def _resume(self, ids: list[int]) -> RemoteCache:
        """The session, rolled back to where it and `ids` part; at least one token stays to be sent."""
        if self._session is None or self._session.is_closed:
            self._session = self._model.inference_session(max_length=self._limit)
        held = self._ids[: self._session.length]
        common = next(
            (index for index, (old, new) in enumerate(zip(held, ids, strict=False)) if old != new),
            min(len(held), len(ids)),
        )
        self._session.crop(min(common, len(ids) - 1) - self._session.length)
        return self._session


class _Timer(TextStreamer):
    """Hands the text to a callback and notes when tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._started = time.perf_counter()
        self._times: list[float] = []
        self._saw_prompt = False

    @property
    def first_token_s(self) -> float:
        return self._times[0] - self._started if self._times else 0.0

    @property
    def tokens_per_s(self) -> float:
        return (len(self._times) - 1) / (self._times[-1] - self._times[0]) if len(self._times) > 1 else 0.0

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self._times += [time.perf_counter()] * value.numel()
        self._saw_prompt = True
        if self._show is not None:
            super().put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        if self._show is not None:
            super().end()  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._show is not None and text:
            self._show(text)
