"""A second stock client: `huggingface_hub.InferenceClient`, whose HTTP and event parsing are its own."""

from collections.abc import Callable, Iterator

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from swarm.api.keys import Keys, add_key
from tests.api.conftest import RunningApi
from tests.client.conftest import Pair

QUESTION = [{"role": "user", "content": "w3 w4 w5"}]


@pytest.fixture
def client(serve: Callable[..., RunningApi]) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=serve().url, api_key="any") as client:
        yield client


def test_a_chat_and_its_stream_are_the_same(client: InferenceClient, pair: Pair) -> None:
    """Text, reason and counts."""
    options = {"model": pair.path.name, "temperature": 0.0, "max_tokens": 9}
    whole = client.chat_completion(QUESTION, **options)
    stream = list(client.chat_completion(QUESTION, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert whole.choices[0].finish_reason == stream[-2].choices[0].finish_reason == "length"
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens == 9


def test_logprobs_seeds_and_stop_strings(client: InferenceClient, pair: Pair) -> None:
    """Its own types can hold what we say."""
    options = {"model": pair.path.name, "temperature": 1.0, "seed": 3, "max_tokens": 9}
    first = client.chat_completion(QUESTION, logprobs=True, top_logprobs=2, **options).choices[0]
    assert len(first.logprobs.content) == 9 and len(first.logprobs.content[0].top_logprobs) == 2
    word = first.message.content.split()[4]
    stopped = client.chat_completion(QUESTION, stop=[word], **options).choices[0]
    assert stopped.finish_reason == "stop"
    assert first.message.content.startswith(stopped.message.content) and word not in stopped.message.content.split()


def test_errors_are_its_own(serve: Callable[..., RunningApi], pair: Pair, tmp_path) -> None:
    """With our words in them."""
    path = tmp_path / "keys.txt"
    key = add_key(path, "ann")
    api = serve(keys=Keys([path]))
    stranger = InferenceClient(base_url=api.url, api_key="wrong")
    with stranger, pytest.raises(HfHubHTTPError, match="401"):
        stranger.chat_completion(QUESTION, model=pair.path.name)
    client = InferenceClient(base_url=api.url, api_key=key)
    with client, pytest.raises(HfHubHTTPError, match="does not exist here"):
        client.chat_completion(QUESTION, model="nobody")
