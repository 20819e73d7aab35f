"""What clients post to the two completion endpoints, checked field by field: pure.

    body ─parse_chat─► ChatRequest ─┐
    body ─parse_text─► TextRequest ─┴─ .options ─► Options, the same for both

Fields and limits are those of OpenAI's reference, and a few that other servers have added (`top_k`, `ignore_eos`).
Unknown fields are ignored. Known ones that would change the answer, and that are not done here, are refused.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from swarm.api.errors import ApiError

MAX_CHOICES = 128
"""OpenAI's limit of `n`; a gateway may allow fewer."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
DEFAULT_TEXT_TOKENS = 16
"""OpenAI's default of `max_tokens` for plain completions; chats may take all that the model holds."""

Name = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate and how to answer, whichever endpoint was asked."""

    n: int
    """Answers per prompt."""
    max_tokens: int | None
    """Most tokens of an answer, if the request says it ..."""
    usual_max_tokens: int | None
    """... and otherwise as many of these as fit; None: all that fit."""
    temperature: float | None
    """0 takes the likeliest token; None is the model's own default."""
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    """Token id and what is added to its logit."""
    top_logprobs: int | None
    """How many of the likeliest tokens to tell beside the chosen one; None: no logprobs at all."""
    ignore_eos: bool
    """Go on where the model would end, as benchmarks want."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with a chunk of counts."""


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message; only text is understood."""

    type: Name
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Name
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None

    @property
    def text(self) -> str:
        """The words of the turn.

        Raises:
            ApiError: there is something else than text in it.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise ApiError(f"content of type {part.type!r} is not supported, only text", param="messages")
        return "".join(part.text or "" for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both endpoints; null means the default, as in OpenAI's API."""

    model: Name
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1 << 30)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def _options(
        self, max_tokens: int | None, top_logprobs: int | None, usual_max_tokens: int | None = None
    ) -> Options:
        return Options(
            n=self.n or 1,
            max_tokens=max_tokens,
            usual_max_tokens=usual_max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            top_logprobs=top_logprobs,
            ignore_eos=bool(self.ignore_eos),
            stream=bool(self.stream),
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )


class ChatRequest(_Common, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[Any] | None = None

    @property
    def options(self) -> Options:
        """Checked as a whole.

        Raises:
            ApiError: for what contradicts itself or isn't done here.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        _refuse("tools", self.tools)
        _refuse("functions", self.functions)
        _refuse("tool_choice", self.tool_choice, "none", "auto")
        _refuse("response_format", self.response_format, {"type": "text"})
        _refuse("modalities", self.modalities, ["text"])
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._options(self.max_completion_tokens or self.max_tokens, top_logprobs)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as a chat template wants it.

        Raises:
            ApiError: for roles and contents that aren't text of a person or a model.
        """
        return [{"role": _role(message), "content": message.text} for message in self.messages]


class TextRequest(_Common, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def options(self) -> Options:
        """Checked as a whole.

        Raises:
            ApiError: for what isn't done here.
        """
        _refuse("best_of", self.best_of, self.n or 1)
        _refuse("echo", self.echo)
        _refuse("suffix", self.suffix)
        return self._options(self.max_tokens, self.logprobs, DEFAULT_TEXT_TOKENS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several texts or lists of token ids.

        Raises:
            ApiError: for a mixture of them, or none.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        found = [item for item in self.prompt if not isinstance(item, int)]
        if not found or len(found) < len(self.prompt) or len({type(item) for item in found}) > 1:
            raise ApiError("prompt must be a text, a list of texts, token ids, or lists of token ids", param="prompt")
        return found


def parse_chat(body: bytes) -> ChatRequest:
    """The body of a chat completion.

    Raises:
        ApiError: it is no JSON, or a field is missing, of a wrong type or out of range.
    """
    return _parse(_CHAT, body)


def parse_text(body: bytes) -> TextRequest:
    """The body of a plain completion.

    Raises:
        ApiError: as in `parse_chat`.
    """
    return _parse(_TEXT, body)


_CHAT = msgspec.json.Decoder(ChatRequest)
_TEXT = msgspec.json.Decoder(TextRequest)
_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


def _parse(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        place = _PLACE.search(str(error))
        raise ApiError(str(error), param=place[1] if place else None) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error


def _refuse(field: str, value: Any, *neutral: Any) -> None:
    """Refuse a field that is set to something that would matter."""
    if value and value not in neutral:
        raise ApiError(f"{field} is not supported", param=field, code="unsupported_parameter")


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _role(message: ChatMessage) -> str:
    if message.tool_calls or message.role not in _ROLES:
        what = "tool_calls" if message.tool_calls else f"role {message.role!r}"
        raise ApiError(f"{what} is not supported; roles are {', '.join(_ROLES)}", param="messages")
    return _ROLES[message.role]


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise ApiError(f"logit_bias has {len(biases)} entries, at most {MAX_BIASES}", param="logit_bias")
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(f"logit_bias: {token[:20]!r} is no token id", param="logit_bias")
    return tuple((int(token), bias) for token, bias in biases.items())
