"""The API in front of real servers: the swarm's own answers, its names, its identities, and its pages freed."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from swarm import AutoDistributedModelForCausalLM
from swarm.api.config import ApiLimits
from swarm.api.gateway import make_app
from swarm.api.identities import Identities, derive
from swarm.api.keys import Keys, add_key
from swarm.api.models import Models, serve_model
from swarm.checkpoint.source import resolve
from swarm.client.adapters import BASE
from swarm.client.config import SessionConfig
from swarm.client.model import distribute
from swarm.client.runtime import SwarmService, connect
from swarm.identity import Identity
from tests.api.conftest import RunningApi
from tests.client.conftest import tokenizer
from tests.server.blocks.peft_adapters import save_adapter

from .conftest import HIDDEN, NUM_BLOCKS, LocalSwarm

__all__ = ["tokenizer"]

SECRET = b"a gateway's secret"
TIMEOUT_S = 120.0


@pytest.fixture
def gateway(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., RunningApi]]:
    """Put the API in front of a swarm."""
    with ExitStack() as stack:

        def start(
            swarm: LocalSwarm, keys: Keys | None = None, adapters: dict[str, Path] | None = None, **limits: Any
        ) -> RunningApi:
            checkpoint = resolve(str(swarm.model))

            def join(identity: Identity) -> SwarmService:
                return connect(
                    checkpoint,
                    num_blocks=NUM_BLOCKS,
                    hidden_size=HIDDEN,
                    initial_peers=[swarm.address],
                    identity=identity,
                    config=SessionConfig(max_wait_s=60.0),
                )

            service = join(Identity.generate())
            stack.callback(service.close)
            identities = Identities(join, secret=SECRET, max_clients=4) if keys else None
            base = serve_model(distribute(checkpoint, service), tokenizer=tokenizer)
            for name, path in (adapters or {}).items():
                base.model.load_adapter(path, adapter_name=name)
            models = Models([base, *map(base.with_adapter, adapters or {})])
            app = make_app(
                models,
                service,
                check_health=service.find_route,
                keys=keys,
                identities=identities,
                limits=ApiLimits(**limits),
            )
            api = RunningApi(app)
            stack.callback(api.close)
            return api

        yield start


def ask(api: RunningApi, key: str = "", **options: Any) -> HTTPResponse:
    """A request whose answer has begun."""
    body = {"model": "tiny-llama", "prompt": "w3 w4 w5", "temperature": 0, "max_tokens": 8, **options}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection = HTTPConnection("127.0.0.1", api.port, timeout=TIMEOUT_S)
    connection.request("POST", "/v1/completions", json.dumps(body), {**headers, "Connection": "close"})
    return connection.getresponse()


def test_the_swarm_answers(
    swarm: LocalSwarm, gateway: Callable[..., RunningApi], tokenizer: PreTrainedTokenizerFast, local_model: Any
) -> None:
    """With the text of plain transformers; the route has the servers' names, blocks and times."""
    with ask(gateway(swarm), ignore_eos=True) as response:
        answer = json.loads(response.read())
    ids = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, local_model(expected).logits[:, -1:].argmax(-1)], 1)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    route = answer["swarm"]["route"]
    assert [hop["name"] for hop in route] and all(hop["name"].startswith("server-") for hop in route)
    assert all(hop["ms_per_token"] > 0 for hop in route)


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that PEFT has saved; one has virtual tokens before the prompt."""
    root, kinds = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, config) in enumerate(
        {
            "lora": peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }.items()
    ):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        kinds[name] = save_adapter(base, config, root / name, seed=seed)
    return kinds


def test_adapters_are_models_of_their_own(
    swarm: LocalSwarm,
    gateway: Callable[..., RunningApi],
    tokenizer: PreTrainedTokenizerFast,
    adapters: dict[str, Path],
) -> None:
    """Listed by name, and each answers as `generate` does with it; several at once, and several answers each."""
    api = gateway(swarm, adapters=adapters)
    names = ["tiny-llama", "tiny-llama:lora", "tiny-llama:prompt"]
    with urlopen(f"{api.url}/v1/models") as response:
        listed = {model["id"]: model["max_model_len"] for model in json.load(response)["data"]}
    assert listed == dict(zip(names, (512, 512, 509), strict=True))

    def answer(name: str) -> list[str]:
        with ask(api, model=name, n=2, ignore_eos=True) as response:
            assert response.status == 200, response.read()
            return [choice["text"] for choice in json.load(response)["choices"]]

    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(answer, names), strict=True))
    ids = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    with AutoDistributedModelForCausalLM.from_pretrained(swarm.model, initial_peers=[swarm.address]) as model:
        model.generation_config.eos_token_id = None
        for name, path in adapters.items():
            model.load_adapter(path, adapter_name=name)
        for name in names:
            adapter = name.partition(":")[2] or BASE
            output = model.generate(ids, adapter_name=adapter, max_new_tokens=8, do_sample=False)
            expected = tokenizer.decode(output[0, 3:], skip_special_tokens=True)
            assert found[name] == [expected, expected]
    assert len({texts[0] for texts in found.values()}) == 3


def test_a_client_that_hangs_up_frees_the_pages(swarm: LocalSwarm, gateway: Callable[..., RunningApi]) -> None:
    """On all servers, within two seconds."""
    visible = {"logit_bias": {"20": 100}}  # else this model says nothing that can be read
    response = ask(gateway(swarm), stream=True, max_tokens=500, **visible)
    assert response.readline().startswith(b"data: {")
    assert swarm.pages_in_use() > 0
    response.close()
    late = threading.Event()
    threading.Timer(2.0, late.set).start()
    while swarm.pages_in_use():
        assert not late.is_set(), "pages are still in use 2 s after the client hung up"


def test_a_client_that_hangs_up_while_a_step_is_stuck_frees_its_turn(
    make_swarm: Callable[..., LocalSwarm], gateway: Callable[..., RunningApi]
) -> None:
    """As while blocks are missing, for which the swarm is patient; the next one answers when they come."""
    swarm = make_swarm("0:3")
    api = gateway(swarm, max_rows=1, max_rows_per_request=1)
    health = HTTPConnection("127.0.0.1", api.port, timeout=TIMEOUT_S)
    health.request("GET", "/healthz")
    with health.getresponse() as response:
        assert response.status == 503 and json.loads(response.read())["error"]["code"] == "blocks_missing"
    health.close()
    stuck = HTTPConnection("127.0.0.1", api.port, timeout=TIMEOUT_S)
    body = json.dumps({"model": "tiny-llama", "prompt": "w3", "max_tokens": 4})
    stuck.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    stuck.close()
    swarm.add_server("3:6")
    with ask(api) as response:
        assert response.status == 200, response.read()


def test_each_account_is_a_client_of_its_own(
    swarm: LocalSwarm, gateway: Callable[..., RunningApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers see the identity that follows from the gateway's secret, and so share themselves fairly."""
    path = tmp_path / "keys.txt"
    keys = {name: add_key(path, name) for name in ("ann", "bob")}
    clients: list[str] = []
    for server in swarm.servers:
        monkeypatch.setattr(server.serving.handler, "_admit", _noting(server.serving.handler._admit, clients))
    api = gateway(swarm, keys=Keys([path]))
    for name, key in keys.items():
        clients.clear()
        with ask(api, key) as response:
            assert response.status == 200, response.read()
        assert set(clients) == {derive(SECRET, name).peer_id}
    with ask(api) as response:
        assert response.status == 401


def _noting(admit: Callable[..., None], clients: list[str]) -> Callable[..., None]:
    def noting(message: Any, peer_id: str) -> None:
        clients.append(peer_id)
        admit(message, peer_id)

    return noting
