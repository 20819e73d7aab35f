"""What may be posted, and what is made of it: everything else is an ApiError with a place to look at."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.api.errors import ApiError
from swarm.api.requests import MAX_BIASES, ChatRequest, TextRequest, parse_chat, parse_text

MESSAGES = [{"role": "user", "content": "hello"}]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*ChatRequest.__struct_fields__, *TextRequest.__struct_fields__, "unknown"})
bodies = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=8)


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def text(**fields: Any) -> TextRequest:
    return parse_text(json.dumps({"model": "m", "prompt": "hello", **fields}).encode())


def test_defaults_are_openais() -> None:
    """One answer, no stop strings, no logprobs; 16 tokens for plain completions and no limit for chats."""
    options = chat().options
    assert (options.n, options.max_tokens, options.temperature, options.stop) == (1, None, None, ())
    assert (options.top_logprobs, options.stream, options.seed) == (None, False, None)
    assert (text().options.max_tokens, text().options.usual_max_tokens) == (None, 16)


def test_null_is_the_default() -> None:
    """As many clients write what they leave out."""
    names = set(ChatRequest.__struct_fields__) - {"model", "messages"}
    assert chat(**dict.fromkeys(names)).options == chat().options


def test_both_names_of_the_longest_answer() -> None:
    """The new one counts where both are given."""
    assert chat(max_tokens=5).options.max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).options.max_tokens == 7


def test_stop_is_a_string_or_a_list() -> None:
    """Both mean the same."""
    assert chat(stop="x").options.stop == ("x",)
    assert text(stop=["x", "yz"]).options.stop == ("x", "yz")


def test_logprobs_of_the_two_endpoints() -> None:
    """A boolean and a number in one, only a number in the other."""
    assert chat(logprobs=True).options.top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).options.top_logprobs == 3
    assert text(logprobs=2).options.top_logprobs == 2


def test_contents_may_come_in_parts() -> None:
    """Text parts are joined; the roles of instructions are one."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]
    turns = chat(messages=messages).turns
    assert turns == [{"role": "system", "content": "ab"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    """Text or token ids, one or several."""
    assert text(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [1, "a"], ["a", [1]], [[1], 2]])
def test_mixed_prompts_are_refused(prompt: Any) -> None:
    """Nobody can tell what they mean."""
    with pytest.raises(ApiError, match="prompt must be"):
        _ = text(prompt=prompt).prompts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("top_p", -0.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", 0),
        ("seed", 1 << 64),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {str(token): 1 for token in range(MAX_BIASES + 1)}),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("messages", []),
        ("messages", "hello"),
        ("model", None),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
    ],
)
def test_what_cant_be_is_refused_with_its_name(field: str, value: Any) -> None:
    """The field that is to blame is named, as OpenAI does."""
    with pytest.raises(ApiError) as caught:
        _ = chat(**{field: value}).options
    assert caught.value.status == 400
    assert (caught.value.param or "").split("[")[0].split(".")[0] == field


@pytest.mark.parametrize(("field", "value"), [("best_of", 2), ("echo", True), ("suffix", "x")])
def test_what_is_not_done_is_refused(field: str, value: Any) -> None:
    """Rather than answered wrongly."""
    with pytest.raises(ApiError, match="not supported"):
        _ = text(**{field: value}).options


@pytest.mark.parametrize(
    "neutral", [{"tools": []}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]}]
)
def test_what_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    """Clients write out defaults."""
    assert chat(**neutral).options == chat().options


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "assistant", "tool_calls": [{"id": "x"}]},
    ],
)
def test_only_text_is_understood(message: dict[str, Any]) -> None:
    """Images, tools and their answers are refused."""
    with pytest.raises(ApiError, match="not supported"):
        _ = chat(messages=[message]).turns


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b'{"model":"\xed\xa0\x80","messages":[]}',
        b'{"model":"\\ud800","messages":[]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\udc00"}]}',
        b'{"model":"m","messages":' + b"[" * 100_000,
        b'{"model":"m","tools":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","x":' + b'{"":' * 100_000,
        b'{"model":"m","temperature":NaN,"messages":[]}',
        b'{"model":"m","seed":' + b"9" * 100_000 + b"}",
    ],
)
def test_broken_bodies_are_errors_of_the_client(body: bytes) -> None:
    """No JSON, broken unicode, deep nesting, huge numbers."""
    for parse in (parse_chat, parse_text):
        with pytest.raises(ApiError):
            parse(body)


@given(body=st.binary(max_size=64) | bodies.map(lambda fields: json.dumps(fields).encode()))
def test_anything_is_a_request_or_an_api_error(body: bytes) -> None:
    """Whatever a stranger posts, nothing else is raised."""
    for parse in (parse_chat, parse_text):
        with suppress(ApiError):
            request = parse(body)
            _ = request.options
            _ = request.turns if isinstance(request, ChatRequest) else request.prompts


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 128),
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0, 1),
            "seed": st.integers(-(1 << 63), (1 << 63) - 1),
            "stop": st.lists(st.text(min_size=1, max_size=9), max_size=4),
            "frequency_penalty": st.floats(-2, 2),
            "max_tokens": st.integers(1, 1 << 30),
            "stream": st.booleans(),
        },
    )
)
def test_what_is_in_range_arrives_as_it_is(fields: dict[str, Any]) -> None:
    """Every field of both endpoints."""
    for options in (chat(**fields).options, text(**fields).options):
        for name, value in fields.items():
            found = getattr(options, name)
            assert (list(found) if name == "stop" else found) == value
