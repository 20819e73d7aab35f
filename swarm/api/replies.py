"""What the two completion endpoints answer, as OpenAI's objects: pure.

    JobPiece ─► Form.chunk ─► one object of a stream        all of them ─► Form.whole ─► one object
    counts   ─► Form.counts ─► the stream's last object

A `Form` is made for one request: it knows its id, its model, and which of the two shapes it wants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from swarm.api.generation import FinishReason, Piece, RouteHop
from swarm.api.sampling import Logprob

Spell = Callable[[int], str]
"""The text of one token."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Our own addition: which servers an answer went through."""

    route: tuple[RouteHop, ...]


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of a chat."""

    content: list[ChosenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of a plain completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class DeltaChoice(msgspec.Struct, frozen=True, kw_only=True):
    """News of one answer of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a plain completion, whole or in part."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, or a chunk of it."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    """Names the content of the checkpoint, which the model's name doesn't."""
    choices: Sequence[DeltaChoice] | Sequence[ChatChoice] | Sequence[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    swarm: Route | UnsetType = UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What all objects of one answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(slots=True)
class Whole:
    """One answer, collected from its pieces."""

    text: str = ""
    tokens: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """The next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason


class Form(Protocol):
    """How one endpoint writes its answers."""

    def start(self, index: int) -> Reply | None:
        """What a stream says before an answer begins."""
        ...

    def chunk(self, index: int, piece: Piece) -> Reply:
        """A piece of an answer, in a stream."""
        ...

    def counts(self, usage: Usage, route: Sequence[RouteHop]) -> Reply:
        """What a stream says at its end if asked to: a chunk without choices, on which others may stumble."""
        ...

    def whole(self, answers: Sequence[Whole], usage: Usage, route: Sequence[RouteHop]) -> Reply:
        """All answers at once."""
        ...


class _Form:
    """What both forms share.

    Args:
        header: of this answer.
        spell: the text of one token.
        with_logprobs: whether they were asked for.
        with_usage: whether the stream's last chunk has counts; the others then have a null.
    """

    chunk_object = ""
    whole_object = ""

    def __init__(self, header: Header, spell: Spell, *, with_logprobs: bool, with_usage: bool):
        self._header, self._spell = header, spell
        self._with_logprobs, self._no_usage = with_logprobs, None if with_usage else UNSET

    def counts(self, usage: Usage, route: Sequence[RouteHop]) -> Reply:
        """Tokens and servers."""
        return self._reply(self.chunk_object, (), usage, route)

    def _chunk(self, choice: DeltaChoice | TextChoice) -> Reply:
        return self._reply(self.chunk_object, (choice,), self._no_usage)  # type: ignore[arg-type]

    def _reply(
        self,
        kind: str,
        choices: Sequence[DeltaChoice] | Sequence[ChatChoice] | Sequence[TextChoice],
        usage: Usage | UnsetType | None,
        route: Sequence[RouteHop] = (),
    ) -> Reply:
        header = self._header
        return Reply(
            id=header.id,
            object=kind,
            created=header.created,
            model=header.model,
            system_fingerprint=header.fingerprint,
            choices=choices,
            usage=usage,
            swarm=Route(route=tuple(route)) if route else UNSET,
        )


class ChatForm(_Form):
    """Answers of /v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def start(self, index: int) -> Reply | None:
        """Who speaks."""
        return self._chunk(DeltaChoice(index=index, delta=Delta(role="assistant", content="")))

    def chunk(self, index: int, piece: Piece) -> Reply:
        """What was said."""
        delta = Delta(content=piece.text) if piece.text else Delta()
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return self._chunk(DeltaChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=piece.finish_reason))

    def whole(self, answers: Sequence[Whole], usage: Usage, route: Sequence[RouteHop]) -> Reply:
        """All answers."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=answer.text),
                logprobs=self._logprobs(answer.tokens) if self._with_logprobs else None,
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return self._reply(self.whole_object, choices, usage, route)

    def _logprobs(self, tokens: Sequence[Logprob]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                ChosenLogprob(
                    token=self._spell(it.token),
                    logprob=it.logprob,
                    bytes=_bytes(self._spell(it.token)),
                    top_logprobs=[
                        TokenLogprob(token=(text := self._spell(token)), logprob=value, bytes=_bytes(text))
                        for token, value in it.top
                    ],
                )
                for it in tokens
            ]
        )


class TextForm(_Form):
    """Answers of /v1/completions."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, header: Header, spell: Spell, *, with_logprobs: bool, with_usage: bool):
        super().__init__(header, spell, with_logprobs=with_logprobs, with_usage=with_usage)
        self._offsets: dict[int, int] = {}
        """Where the next token's text begins, per answer."""

    def start(self, index: int) -> Reply | None:
        """Nothing."""
        return None

    def chunk(self, index: int, piece: Piece) -> Reply:
        """What was written."""
        return self._chunk(self._choice(index, piece.text, piece.tokens, piece.finish_reason))

    def whole(self, answers: Sequence[Whole], usage: Usage, route: Sequence[RouteHop]) -> Reply:
        """All answers."""
        choices = [self._choice(index, it.text, it.tokens, it.finish_reason) for index, it in enumerate(answers)]
        return self._reply(self.whole_object, choices, usage, route)

    def _choice(self, index: int, text: str, tokens: Sequence[Logprob], reason: FinishReason | None) -> TextChoice:
        logprobs = self._logprobs(index, tokens) if self._with_logprobs else None
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, index: int, tokens: Sequence[Logprob]) -> TextLogprobs:
        texts, offsets = [self._spell(it.token) for it in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return TextLogprobs(
            tokens=texts,
            token_logprobs=[it.logprob for it in tokens],
            top_logprobs=[{self._spell(token): value for token, value in it.top} for it in tokens],
            text_offset=offsets,
        )


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Counts with their sum."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _bytes(text: str) -> list[int] | None:
    """None for half a character, whose bytes a tokenizer doesn't tell."""
    return None if "\ufffd" in text else list(text.encode())
