"""The official `openai` package, as its users use it, against a model of local blocks."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

from swarm.api.config import ApiLimits
from swarm.api.keys import Keys, add_key
from swarm.api.models import ServedModel
from swarm.errors import PeerBusy, RouteNotFound
from tests.api.conftest import RunningApi, wait_until
from tests.client.conftest import Pair

QUESTION = [{"role": "user", "content": "w3 w4 w5"}]
LONG = 12


def connect(api: RunningApi, key: str = "any") -> OpenAI:
    return OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(serve: Callable[..., RunningApi]) -> Iterator[OpenAI]:
    with connect(serve()) as client:
        yield client


@pytest.fixture
def name(pair: Pair) -> str:
    """The model's name."""
    return pair.path.name


@pytest.fixture(scope="module")
def expected(_llama: Pair, tokenizer: PreTrainedTokenizerFast) -> Callable[[int], str]:
    """The greedy answer of plain transformers in so many tokens."""
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)

    def answer(count: int) -> str:
        inputs = torch.tensor([ids])
        output = _llama.local.generate(inputs, max_new_tokens=count, do_sample=False)
        return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    return answer


def ask(client: OpenAI, name: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": LONG, **options}
    return client.chat.completions.create(model=name, messages=QUESTION, **settings)  # type: ignore[call-overload]


def texts(stream: Any) -> list[str]:
    """The answers of a stream, put together."""
    found: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return [found[index] for index in sorted(found)]


def test_models_are_listed(client: OpenAI, name: str, pair: Pair) -> None:
    """And can be looked at by name."""
    assert [model.id for model in client.models.list()] == [name]
    assert client.models.retrieve(name).to_dict()["digest"] == pair.distributed.checkpoint.digest


def test_a_chat_is_answered(client: OpenAI, name: str, expected: Callable[[int], str]) -> None:
    """With transformers' own text, counts, and a reason for the end."""
    answer = ask(client, name)
    assert answer.choices[0].message.content == expected(LONG)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, LONG, 18)
    assert answer.to_dict()["swarm"]["route"][0]["blocks"] == "0:3"


def test_a_stream_is_the_same_answer(client: OpenAI, name: str, expected: Callable[[int], str]) -> None:
    """A role first, a reason at the end, counts only for those who ask."""
    chunks = list(ask(client, name, stream=True))
    assert texts(chunks) == [expected(LONG)]
    assert len(chunks) >= LONG
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_counts_for_those_who_ask(client: OpenAI, name: str) -> None:
    """And with the route."""
    *chunks, last = ask(client, name, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == LONG
    assert last.to_dict()["swarm"]["route"][0]["peer_id"] == "12D3local"


def test_several_answers_are_one_batch(client: OpenAI, name: str, pair: Pair) -> None:
    """One session, whose prompt is sent once; a seed repeats all of them, and the first one alone."""
    options = {"temperature": 1.5, "seed": 7}
    first = ask(client, name, n=3, **options)
    [session] = pair.service.sessions
    assert session.batch_size == 3
    assert session.steps[0].num_tokens == (6, 0, 0)
    found = [choice.message.content for choice in first.choices]
    assert len(set(found)) == 3
    assert texts(ask(client, name, n=3, stream=True, **options)) == found
    assert ask(client, name, **options).choices[0].message.content == found[0]
    assert first.usage.completion_tokens == 3 * LONG


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer(
    client: OpenAI, name: str, expected: Callable[[int], str], as_list: bool, stream: bool
) -> None:
    """Before it, also where it spans tokens; and nothing more is generated."""
    words = expected(LONG).split()
    stop = f"{words[3][-1]} {words[4]}"
    cut = expected(LONG)[: expected(LONG).index(stop)]
    answer = ask(client, name, stop=[stop, "never"] if as_list else stop, stream=stream)
    if stream:
        chunks = list(answer)
        assert texts(chunks) == [cut] and chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == cut
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < LONG


def test_the_models_end_ends_the_answer(client: OpenAI, name: str, expected: Callable[[int], str]) -> None:
    """Token 2 is the end of a text; a benchmark may ignore it."""
    bias = {"2": 100}
    answer = ask(client, name, logit_bias=bias)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    on = ask(client, name, logit_bias=bias, extra_body={"ignore_eos": True})
    assert on.choices[0].finish_reason == "length" and on.usage.completion_tokens == LONG


def test_logprobs_tell_what_else_was_likely(client: OpenAI, name: str) -> None:
    """A greedy answer takes the likeliest token each time; streams tell the same."""
    options = {"logprobs": True, "top_logprobs": 3}
    content = ask(client, name, **options).choices[0].logprobs.content
    assert len(content) == LONG
    for token in content:
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
    chunks = ask(client, name, stream=True, **options)
    streamed = [it for chunk in chunks if chunk.choices[0].logprobs for it in chunk.choices[0].logprobs.content]
    assert [it.token for it in streamed] == [it.token for it in content]


def test_penalties_and_bias_change_the_answer(client: OpenAI, name: str) -> None:
    """Forced to one token, a penalty lets others come."""
    forced = {"logit_bias": {"20": 50}}
    assert len(set(ask(client, name, **forced).choices[0].message.content.split())) == 1
    free = ask(client, name, logit_bias={"20": 5}, presence_penalty=2, frequency_penalty=2)
    assert len(set(free.choices[0].message.content.split())) > 1


def test_texts_and_tokens_are_completed(client: OpenAI, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Several prompts in one request, as text or as ids, with logprobs of the old kind."""
    options: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": 5, "logprobs": 2}
    by_text = client.completions.create(prompt=["w3 w4", "w5"], n=2, **options)
    ids = [tokenizer(text)["input_ids"] for text in ("w3 w4", "w5")]
    by_ids = client.completions.create(prompt=ids, n=2, **options)
    found = [choice.text for choice in by_text.choices]
    assert [choice.text for choice in by_ids.choices] == found
    assert found[0] == found[1] != found[2] == found[3]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    logprobs = by_text.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or ()) == len(logprobs.token_logprobs or ()) == 5
    stream = client.completions.create(prompt=["w3 w4", "w5"], n=2, stream=True, **options)
    streamed = [""] * 4
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == found


def test_errors_have_openais_form(client: OpenAI, name: str, served: ServedModel) -> None:
    """Its package raises its own classes, with field and code."""
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "nobody")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, name, temperature=3)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, name, max_tokens=served.max_positions - 5)
    assert long.value.code == "context_length_exceeded"
    assert f"{served.max_positions} positions; the prompt takes 6" in str(long.value)


def test_limits_are_told_with_both_numbers(serve: Callable[..., RunningApi], name: str) -> None:
    """So that nobody has to guess."""
    with connect(serve(limits=ApiLimits(max_tokens=8, max_rows_per_request=2))) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens is 9, at most 8"):
            ask(client, name, max_tokens=9)
        with pytest.raises(openai.BadRequestError, match="3 answers asked for, at most 2"):
            ask(client, name, n=3, max_tokens=1)
        assert ask(client, name, max_tokens=None).usage.completion_tokens == 8
        text = client.completions.create(model=name, prompt="w3", temperature=0)
        assert text.usage is not None and text.usage.completion_tokens == 8


def test_a_key_is_needed_where_there_are_keys(serve: Callable[..., RunningApi], name: str, tmp_path: Any) -> None:
    """For everything but health and the page."""
    path = tmp_path / "keys.txt"
    key = add_key(path, "ann")
    api = serve(keys=Keys([path]))
    with connect(api, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(stranger, name)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    with connect(api, key) as client:
        assert ask(client, name).choices
    assert httpx2.get(f"{api.url}/healthz").json() == {"status": "ok"}
    assert httpx2.get(api.url).status_code == 200


def test_a_busy_gateway_says_when_to_come_back(serve: Callable[..., RunningApi], name: str, pair: Pair) -> None:
    """429 with Retry-After, while others are served."""
    with connect(serve(limits=ApiLimits(max_rows=1, max_rows_per_request=1, max_waiting=0))) as client:
        stream = ask(client, name, stream=True, max_tokens=40)
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, name)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert texts(stream)
        assert ask(client, name).choices


@pytest.mark.parametrize(
    ("failure", "kind", "status"),
    [
        (PeerBusy("full", retry_after_s=7.2), openai.RateLimitError, 429),
        (RouteNotFound("nobody serves blocks 1:2", missing=[1]), openai.InternalServerError, 503),
    ],
)
def test_what_the_swarm_says_is_passed_on(
    client: OpenAI, name: str, pair: Pair, failure: Exception, kind: type[openai.APIStatusError], status: int
) -> None:
    """With a status of its own, as long as nothing was sent."""

    def fail() -> None:
        raise failure

    pair.service.before_step = fail
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            ask(client, name, stream=stream)
        assert caught.value.status_code == status
        assert int(caught.value.response.headers["retry-after"]) >= 8 - 7 * (status == 503)
    assert pair.service.num_open == 0


def test_a_failure_in_a_stream_is_an_event(client: OpenAI, name: str, pair: Pair) -> None:
    """What came before it counts, and the reason is told."""
    steps: list[None] = []

    def fail() -> None:
        steps.append(None)
        if len(steps) == 4:
            raise RouteNotFound("nobody serves blocks 1:2", missing=[1])

    pair.service.before_step = fail
    stream = ask(client, name, stream=True)
    assert [next(stream).choices[0].delta.role for _ in range(4)] == ["assistant", None, None, None]
    with pytest.raises(openai.APIError, match="nobody serves"):
        next(stream)
    assert pair.service.num_open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_work(
    serve: Callable[..., RunningApi], name: str, pair: Pair, stream: bool
) -> None:
    """Its session is closed, its turn given to the next, and no more steps are made."""
    api = serve(limits=ApiLimits(max_rows=1, max_rows_per_request=1))
    connection = HTTPConnection("127.0.0.1", api.port)
    steps: list[None] = []

    def hang_up() -> None:
        steps.append(None)
        if len(steps) == 3:  # in the middle of the answer
            connection.sock.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: pair.service.num_open == 0)

    pair.service.before_step = hang_up
    body = {"model": name, "messages": QUESTION, "max_tokens": 50, "stream": stream}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    with suppress(OSError, HTTPException):  # a stream has begun, the other answer has not
        connection.getresponse().read()
    connection.close()
    with connect(api) as client:
        assert ask(client, name, max_tokens=1).choices
    assert len(steps) == 3 + 1
