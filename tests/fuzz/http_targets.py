"""Readers of what comes over HTTP: requests to the API, and a server's metrics."""

import msgspec

from swarm.api.requests import parse_chat, parse_text
from swarm.top.scrape import parse
from tests.fuzz.target import Target
from tests.top.test_view import METRICS


def api_request(data: bytes) -> None:
    """A body posted to one of the two endpoints: all that is asked of it later, or a refusal."""
    chat, body = data[:1] < b"\x80", data[1:]
    request = parse_chat(body) if chat else parse_text(body)
    options = request.options
    assert 1 <= options.n <= 128 and (options.max_tokens is None or options.max_tokens >= 1)
    assert all(0 <= token < 10**9 for token, _ in options.logit_bias)
    conversation = parse_chat(body).turns if chat else parse_text(body).prompts
    assert conversation is not None


def api_seeds() -> list[bytes]:
    common = {
        "model": "m",
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["\n", "x"],
        "frequency_penalty": -1,
        "presence_penalty": 1.5,
        "logit_bias": {"17": -100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts = [{"type": "text", "text": "hi"}]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    chat = {**common, "messages": turns, "logprobs": True, "top_logprobs": 3}
    texts = ("one", ["one", "two"], [1, 2], [[1], [2, 3]])
    return [
        b"\0" + msgspec.json.encode(chat),
        *(b"\xff" + msgspec.json.encode({**common, "prompt": text, "logprobs": 2}) for text in texts),
    ]


def metrics(data: bytes) -> None:
    """What a URL answers that should be a server's metrics."""
    parse(data.decode(errors="replace"))


HTTP_TARGETS = {
    "api_request": Target(run=api_request, seeds=api_seeds),
    "metrics": Target(run=metrics, seeds=lambda: [(METRICS % (1, 2, 3, 4, 0.5, 6)).encode()]),
}
